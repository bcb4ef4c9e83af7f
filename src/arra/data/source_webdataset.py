"""Sources that are tar files in WebDataset's convention, among them img2dataset's output.

Files of one sample follow each other and share a key (their path up to the first dot of the file's
name); what follows that dot is the part: `000012.jpg`, `000012.txt`, `000012.json`. Nothing is
ever extracted: a tar's headers are read once, and rows are read by their offsets.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from arra.data.captions import CaptionColumns
from arra.data.parquet_files import parquet_file
from arra.data.source_tables import cell
from arra.data.source_tar_index import IMAGE, JSON, TEXT, index_of, json_of, part_of
from arra.data.sources import (
    SPLIT_NAMES,
    Record,
    Reject,
    Scalar,
    bad_text,
    digest,
    group_column,
    group_names,
    is_utf8,
    missing_column,
    pick_split,
    split_of,
)

_CAPTIONS = ("text", "caption")
"""Keys of the JSON part that the default text column stands for, where there is no .txt part."""


def tar_files(folder: Path) -> list[Path]:
    """The tars of a folder and of its folders train, val and test, sorted.

    A folder that also holds Parquet files is made of tars only if each of those belongs to a tar
    (img2dataset writes 00000.parquet beside 00000.tar).
    """
    found = sorted(folder.glob("*.tar"))
    parquet = list(folder.glob("*.parquet"))
    for below in sorted(folder.iterdir()):
        if below.is_dir() and below.name.lower() in SPLIT_NAMES:
            found += sorted(below.glob("*.tar"))
            parquet += below.glob("*.parquet")
    found = [path for path in found if not path.name.startswith(".")]
    stems = {path.with_suffix("") for path in found}
    return found if all(path.with_suffix("") in stems for path in parquet) else []


def open_webdataset(
    path: Path, split: str | None, text: CaptionColumns, image_column: str, name: str
) -> "TarSource":
    """One tar, or a folder of them; `train-*`, `val-*` in names or folders say the split.

    The default text column is the part .txt, else the JSON part's `text` or `caption`; another
    names a part (`--text-column alt.txt`) or a JSON key. The default image column is the one part
    with an image's suffix; another names a part (`--image-column right.png`).

    Raises:
        ValueError: no such split or column, or a damaged tar, which is named.
    """
    by_split: dict[str, list[Path]] = {}
    for file in [path] if path.is_file() else tar_files(path):
        named = split_of(file.stem)
        if named is None and file.parent != path:
            named = SPLIT_NAMES.get(file.parent.name.lower())
        by_split.setdefault(named or "train", []).append(file)
    splits = tuple(each for each in ("train", "val", "test") if each in by_split)
    chosen = pick_split(name, splits, split)
    root = path.parent if path.is_file() else path
    return TarSource(name, chosen, splits, root, by_split[chosen], text, image_column)


class TarSource:
    """Samples of tars, in the order of the tars' names and then of the samples in them."""

    def __init__(
        self,
        name: str,
        split: str,
        splits: tuple[str, ...],
        root: Path,
        files: list[Path],
        text: CaptionColumns,
        image_column: str,
    ) -> None:
        self.name, self.split, self.splits = name, split, splits
        self.class_names: tuple[str, ...] = ()
        self._files, self._root = files, root
        self._text, self._image = text, image_column
        self._text_columns = text.among(())
        text_part = "txt" if "text" in self._text_columns else self._text_columns[0]
        self._indices = []
        for file in files:
            state = file.stat()
            index = index_of(file, state.st_size, state.st_mtime_ns, text_part, image_column)
            self._indices.append(index)
        # What img2dataset could not download is a row too, behind the samples of its tar.
        self._lost = [
            _lost(file, index.keys) for file, index in zip(files, self._indices, strict=True)
        ]
        rows = [
            len(index.keys) + len(lost)
            for index, lost in zip(self._indices, self._lost, strict=True)
        ]
        self._first = np.cumsum([0, *rows]).tolist()
        if len(self) == 0:
            raise ValueError(f"{name}: the tars of split {split} hold no samples")
        kinds: dict[str, frozenset[str]] = {}
        for index in self._indices:
            for key, there in index.kinds.items():
                kinds[key] = kinds.get(key, frozenset()) | there
        self._text_part = text_part
        self._text_keys = list(_CAPTIONS if text.named == "text" else self._text_columns)
        parts = sorted({part for index in self._indices for part in index.parts})
        if all((index.spans_N6[:, IMAGE + 1] < 0).all() for index in self._indices):
            raise missing_column(name, "image", image_column, parts)
        has_text = any(index.has_text for index in self._indices)
        if not has_text and not any(key in kinds for key in self._text_keys):
            raise missing_column(name, "text", text.named, [*parts, *sorted(kinds)])
        skip = {*self._text_keys, "id"}
        self.columns = {key: _merged(kinds[key]) for key in sorted(kinds) if key not in skip}
        contents = [
            (file.relative_to(root).as_posix(), file.stat().st_size, index.content, lost)
            for file, index, lost in zip(files, self._indices, self._lost, strict=True)
        ]
        self.fingerprint = digest("tars", contents, split, text.identity, image_column)

    def __len__(self) -> int:
        return self._first[-1]

    @property
    def groups(self) -> list[str] | None:
        """By a key `patient` or `sample` of the JSON parts, which are then read once more."""
        name = group_column(self.columns)
        if name is None:
            return None
        rows = self.read(0, len(self))
        return group_names(row.extra[name] if isinstance(row, Record) else None for row in rows)

    def read(self, start: int, stop: int) -> Iterator[Record | Reject]:
        """Yields rows start..stop-1 with their images' bytes."""
        row, stop = start, min(stop, len(self))
        while row < stop:
            number = bisect_right(self._first, row) - 1
            end = min(stop, self._first[number + 1])
            with self._files[number].open("rb") as handle:
                for each in range(row, end):
                    yield self._row(handle, number, each)
            row = end

    def _row(self, handle: BinaryIO, number: int, row: int) -> Record | Reject:
        index, position = self._indices[number], row - self._first[number]
        lost = position - len(index.keys)
        key, reason = self._lost[number][lost] if lost >= 0 else (index.keys[position], None)
        tar = self._files[number].relative_to(self._root).as_posix().rpartition(".")[0]
        id_ = f"{tar}/{key}"
        reason = reason or index.reasons.get(position)
        if reason is not None:
            return Reject(row, id_ if is_utf8(id_) else None, reason)
        span_6 = index.spans_N6[position]
        values: dict[str, Any] = {}
        if span_6[JSON + 1] >= 0:
            read = json_of(part_of(handle, span_6, JSON))
            if isinstance(read, str):
                return Reject(row, id_, read)
            values = read
        part: str | None = None
        if span_6[TEXT + 1] >= 0:
            try:
                part = part_of(handle, span_6, TEXT).decode("utf-8-sig").strip()
            except UnicodeDecodeError:
                return Reject(row, id_, "the caption is not valid UTF-8")
        text = self._caption(part, values, id_)
        reason = bad_text(text)
        if reason is not None:
            return Reject(row, id_, reason)
        assert isinstance(text, str)
        extra: dict[str, Scalar] = {
            k: cell(values.get(k), kind) for k, kind in self.columns.items()
        }
        return Record(id_, part_of(handle, span_6, IMAGE), text, extra, row)

    def _caption(self, part: str | None, values: Mapping[str, Any], id_: str) -> object:
        """The text part of a sample, or values of its JSON part, as the columns are named."""
        if self._text.named == "text":
            key = next((key for key in _CAPTIONS if values.get(key)), None)
            each = part if part is not None else None if key is None else values[key]
            return self._text.choose([each], id_)
        named = {**values, **({} if part is None else {self._text_part: part, "text": part})}
        return self._text.choose([named.get(column) for column in self._text_columns], id_)


def _merged(kinds: frozenset[str]) -> type:
    if kinds == {"bool"}:
        return bool
    if kinds == {"int"}:
        return int
    return float if kinds and kinds <= {"int", "float"} else str


def _lost(tar: Path, keys: Sequence[str]) -> list[tuple[str, str]]:
    """What img2dataset's table beside a tar has and the tar has not: keys and reasons.

    Raises:
        ValueError: the table is damaged, or img2dataset counted another number of samples.
    """
    path = tar.with_suffix(".parquet")
    if not path.is_file():
        _compare_with_stats(tar, len(keys))
        return []
    try:
        with parquet_file(path) as file:
            if not {"key", "status", "error_message"} <= set(file.schema_arrow.names):
                return []  # a table of somebody else's
            rows = file.read(columns=["key", "status", "error_message"]).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from None
    there = set(keys)
    lost = [row for row in rows if row["key"] not in there]
    _compare_with_stats(tar, len(keys) + sum(row["status"] == "success" for row in lost))
    return [(str(row["key"]), _failure(row["status"], row["error_message"])) for row in lost]


def _failure(status: str | None, message: str | None) -> str:
    if status == "success":
        return "img2dataset wrote the image, but it is not in the tar"
    first = (message or "").strip().splitlines()[:1]
    return f"{status or 'no status'} ({first[0][:200] if first else 'no reason given'})"


def _compare_with_stats(tar: Path, samples: int) -> None:
    """img2dataset writes 00000_stats.json when 00000.tar is complete: the numbers must agree."""
    path = tar.with_name(f"{tar.stem}_stats.json")
    if not path.is_file():
        return
    stats = json_of(path.read_bytes())
    counted = stats.get("successes") if isinstance(stats, dict) else None
    if isinstance(counted, int) and counted != samples:
        raise ValueError(f"{tar} holds {samples} samples, but {path.name} counts {counted}")
