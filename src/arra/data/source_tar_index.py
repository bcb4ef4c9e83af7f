"""Where the samples of a WebDataset tar are: an index of offsets, from its headers alone.

Legend: N samples; 6 = offset and size of the image, the text part and the JSON part.
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from arra.data.source_folders import IMAGE_SUFFIXES
from arra.data.source_tables import bad_path
from arra.data.sources import digest, is_utf8

MAX_TEXT = 2**24
"""Bytes. A longer caption or JSON part rejects its sample: it is no caption."""

IMAGE, TEXT, JSON = 0, 2, 4
"""Where a part's offset stands in a row's span; its size follows, -1 without such a part."""


@dataclass(frozen=True)
class TarIndex:
    """Where the rows of one tar are.

    Attributes:
        keys: of N samples, in the tar's order.
        spans_N6: int64, offset and size of the image, the text part and the JSON part.
        reasons: why a row cannot be used, by row.
        kinds: names of the types that each key of the JSON parts has.
        has_text: whether any sample has the text part.
        parts: every part that some sample has.
        content: sha256 over names, offsets, sizes, and the bytes of text and JSON parts.
    """

    keys: tuple[str, ...]
    spans_N6: np.ndarray
    reasons: dict[int, str]
    kinds: dict[str, frozenset[str]]
    has_text: bool
    parts: frozenset[str]
    content: str


def part_of(handle: BinaryIO, span_6: np.ndarray, which: int) -> bytes:
    handle.seek(int(span_6[which]))
    return handle.read(int(span_6[which + 1]))


def json_of(data: bytes) -> dict[str, Any] | str:
    """The object of a JSON part, or why there is none."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "the JSON part is not valid UTF-8"
    except (json.JSONDecodeError, RecursionError) as error:
        return f"the JSON part is not valid JSON ({error})"
    return value if isinstance(value, dict) else "the JSON part is not an object"


@cache
def index_of(path: Path, size: int, changed_ns: int, text_part: str, image_column: str) -> TarIndex:
    """The index of one tar. `size` and `changed_ns` keep a changed file from an old index."""
    keys: list[str] = []
    spans: list[list[int]] = []
    reasons: dict[int, str] = {}
    kinds: dict[str, set[str]] = {}
    contents: list[object] = []
    first_with: dict[str, int] = {}
    seen: set[str] = set()
    with path.open("rb") as handle:
        for key, members in _samples(path):
            row = len(keys)
            parts, reason = _parts(members)
            seen.update(parts)
            image = _image_part(parts, image_column)
            if reason is None:
                bad = bad_path(key) is not None
                reason = f"the name {key!r} in the tar is no plain relative path" if bad else None
            if reason is None and key in first_with:
                reason = f"duplicate id, first seen in row {first_with[key]} of this tar"
            if reason is None and len(image) != 1:
                reason = _image_reason(image, image_column)
            texts = [part for part in (text_part, "json") if part in parts]
            if reason is None and any(parts[part].size > MAX_TEXT for part in texts):
                reason = f"the caption or JSON part is longer than {MAX_TEXT} bytes"
            first_with.setdefault(key, row)
            span_6 = [0, -1] * 3
            chosen = {TEXT: text_part, JSON: "json", IMAGE: image[0] if image else ""}
            for where, part in chosen.items():
                if part in parts:
                    span_6[where : where + 2] = [parts[part].offset_data, parts[part].size]
            contents.append([(m.name, m.offset_data, m.size) for m in members])
            if reason is None:
                span = np.array(span_6)
                data = {where: part_of(handle, span, where) for where in (TEXT, JSON)}
                contents.append([data[where].hex() for where in (TEXT, JSON) if span_6[where]])
                values = json_of(data[JSON]) if span_6[JSON] else {}
                values = values if isinstance(values, dict) else {}
                if not all(is_utf8(name) for name in values):
                    values, reasons[row] = {}, "a key of the JSON part is not valid UTF-8"
                for name, value in values.items():
                    kinds.setdefault(name, set()).update(_kind_name(value))
            else:
                reasons[row] = reason
            keys.append(key)
            spans.append(span_6)
    spans_N6 = np.array(spans, dtype=np.int64).reshape(len(keys), 6)
    return TarIndex(
        tuple(keys),
        spans_N6,
        reasons,
        {name: frozenset(there) for name, there in kinds.items()},
        bool((spans_N6[:, TEXT + 1] >= 0).any()),
        frozenset(seen),
        digest(contents),
    )


def _samples(path: Path) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """Neighbouring members of one key; folders and hidden files belong to none."""
    current: str | None = None
    members: list[tarfile.TarInfo] = []
    for member in _members(path):
        base = member.name.rpartition("/")[2]
        if member.isdir() or not base or base.startswith("."):
            continue
        key = member.name[: len(member.name) - len(base)] + base.partition(".")[0]
        if key != current and current is not None:
            yield current, members
            members = []
        current = key
        members.append(member)
    if current is not None:
        yield current, members


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar, to its end mark.

    Raises:
        ValueError: compressed, cut off, or damaged: tarfile itself takes a broken header behind
            the first one for the end, which would lose rows without a word.
    """
    try:
        with (
            path.open("rb") as handle,
            tarfile.open(
                fileobj=handle, mode="r:", encoding="utf-8", errors="surrogateescape"
            ) as tar,
        ):
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or it keeps every header
                yield member
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        with path.open("rb") as handle:
            magic = handle.read(4)
        if magic[:2] == b"\x1f\x8b" or magic[:3] == b"BZh" or magic == b"\xfd7zX":
            raise ValueError(f"{path} is compressed: unpack it to a plain .tar first") from None
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from None
    with path.open("rb") as handle:
        handle.seek(end)
        block = handle.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or block.strip(b"\0"):
        raise ValueError(f"{path} is damaged or cut off at byte {end}: fetch it again")


def _parts(members: list[tarfile.TarInfo]) -> tuple[dict[str, tarfile.TarInfo], str | None]:
    """The parts of a sample by what follows the key, and why they cannot be used, if so."""
    parts: dict[str, tarfile.TarInfo] = {}
    for member in members:
        name = member.name.rpartition("/")[2]
        part = name.partition(".")[2].lower()
        if not is_utf8(member.name):
            return parts, "the name in the tar is not valid UTF-8"
        if not member.isreg() or member.issparse():
            return parts, f"{name} is a link or another special file"
        if part in parts:
            return parts, f"{name} is there twice"
        parts[part] = member
    return parts, None


def _image_part(parts: dict[str, tarfile.TarInfo], image_column: str) -> list[str]:
    if image_column != "image":
        return [image_column] if image_column in parts else []
    return [part for part in parts if f".{part}" in IMAGE_SUFFIXES]


def _image_reason(found: list[str], image_column: str) -> str:
    if found:
        return f"several images ({', '.join(found)}): name one with --image-column"
    return "the image is missing" + (f" ({image_column})" if image_column != "image" else "")


def _kind_name(value: object) -> set[str]:
    if value is None:
        return set()
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        return {"str"}
    return {type(value).__name__}
