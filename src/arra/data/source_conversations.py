"""Conversations with images, in the format of Lumina-mGPT that ARRA's released code reads.

A JSON list (or JSONL) of {"conversations": [{"from", "value"}, …], "image": [path, …]}, in which
`<|image|>` says where each image stands (xiexing0916/ARRA, README, "Format of Input File"). Each
image becomes a row; the rows of one conversation share `sample`. A conversation is taken whole or
not at all: without one of its images, the others' captions would say something else.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arra.data.source_options import check_options
from arra.data.source_tables import Entry, FileSource, bad_path
from arra.data.sources import Reject, bad_text, digest, is_utf8, pick_split, split_of
from arra.files import place, sha256_of

_SYMBOLS = ("<|image|>", "<image>")
"""Where an image stands: as Lumina-mGPT and ARRA write it, and as LLaVA does."""

_PLACEHOLDER = "<image>"
"""Where a caption of ours says that its image stands."""

_COLUMNS: dict[str, type] = {"sample": str, "image_index": int}
_BEGINNING = 65_536


def holds_conversations(path: Path) -> bool:
    """Whether a .json or .jsonl file holds conversations, told by its beginning."""
    if path.suffix.lower() not in (".json", ".jsonl"):
        return False
    with path.open("rb") as handle:
        start = handle.read(_BEGINNING).removeprefix(b"\xef\xbb\xbf").lstrip()
    first = start[1:] if start[:1] == b"[" else start
    text = first.decode("utf-8", "replace").lstrip()
    if not text.startswith("{"):
        return False
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except (json.JSONDecodeError, RecursionError):
        return '"conversations"' in text  # a first conversation that is longer than the beginning
    return isinstance(value, dict) and "conversations" in value


def open_conversations(
    path: Path,
    split: str | None,
    text_column: str,
    image_column: str,
    name: str,
    options: Mapping[str, str],
) -> FileSource:
    """A file of conversations; `?images=FOLDER` says what image paths are relative to.

    Args:
        path: .json or .jsonl; its name says the split (`train…`, `val…`, `test…`), else train.
        options: `images`, a folder; default: the file's own.

    Raises:
        ValueError: other columns are asked for, or the file is no list of objects.
    """
    check_options(name, options, {"images": ()})
    if (text_column, image_column) != ("text", "image"):
        raise ValueError(f"{name}: conversations have no columns to choose")
    root = place(options.get("images", path.parent)).expanduser()
    if not root.is_dir():
        raise ValueError(f"{name}: there is no folder {root}")
    only = split_of(path.stem) or "train"
    chosen = pick_split(name, (only,), split)
    entries: list[Entry | Reject] = []
    seen: set[str] = set()
    for number, item in enumerate(_items(path)):
        entries += _rows(item, number, len(entries), root, seen)
    if not entries:
        raise ValueError(f"{path} holds no conversations")
    fingerprint = digest("conversations", sha256_of(path))
    return FileSource(name, chosen, (only,), entries, fingerprint, dict(_COLUMNS))


def _items(path: Path) -> list[Any]:
    """The conversations; a line of a JSONL file that cannot be read stays a Reject."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if path.suffix.lower() == ".jsonl":
        return [_line(line) for line in data.split(b"\n") if line.strip()]
    try:
        content = json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, list):
        raise ValueError(f"{path} is not a list of conversations")
    return content


def _line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        return Reject(-1, None, f"the line is not valid JSON ({error})")


def _rows(item: Any, number: int, row: int, root: Path, seen: set[str]) -> list[Entry | Reject]:
    """The rows of one conversation: one per image, all of them usable or all rejected."""
    if isinstance(item, Reject):
        return [Reject(row, None, item.reason)]
    if not isinstance(item, dict):
        return [Reject(row, None, "the conversation is not a JSON object")]
    given = item.get("id")
    sample = str(number if given is None else given)
    images = item.get("image", item.get(_SYMBOLS[0], []))
    images = images if isinstance(images, list) else [images]
    texts = _texts(item.get("conversations"), len(images))
    reason = texts if isinstance(texts, str) else None
    if not is_utf8(sample):
        sample, reason = str(number), "the id is not valid UTF-8"
    if reason is None and sample in seen:
        reason = f"duplicate id: another conversation is called {sample!r}"
    for image in images if reason is None else ():
        reason = reason or bad_path(image)
        # A missing file of one image is its own row's reject; of several, it spoils the others.
        if reason is None and len(images) > 1 and not (root / image).is_file():
            reason = f"image {image!r} of the conversation is missing"
    ids = [sample] if len(images) < 2 else [f"{sample}/{k}" for k in range(len(images))]
    if reason is not None:
        return [Reject(row + k, id_, reason) for k, id_ in enumerate(ids)]
    assert not isinstance(texts, str)
    seen.add(sample)
    return [
        Entry(id_, root / image, text, {"sample": sample, "image_index": k})
        for k, (id_, image, text) in enumerate(zip(ids, images, texts, strict=True))
    ]


def _texts(turns: Any, images: int) -> list[str] | str:
    """The caption of each image, or why there are none.

    Turns are joined by line breaks and cut at the images. What stands before an image is its
    caption; what follows the last one stands behind `<image>` in that one's.
    """
    if not isinstance(turns, list) or not turns:
        return "there is no conversation"
    values = [turn.get("value") if isinstance(turn, dict) else None for turn in turns]
    spoken = [value for value in values if isinstance(value, str)]
    if len(spoken) != len(values):
        return "a turn of the conversation has no text"
    if images == 0:
        return "the conversation has no image"
    whole = "\n".join(spoken)
    symbol = next((each for each in _SYMBOLS if each in whole), _SYMBOLS[0])
    pieces = [piece.strip() for piece in whole.split(symbol)]
    if len(pieces) != images + 1:
        return f"{len(pieces) - 1} times {symbol}, but {images} images"
    if any(_PLACEHOLDER in piece for piece in pieces):
        return f"the text holds {_PLACEHOLDER}, which would stand for an image"
    if not any(pieces):
        return "the conversation has no words"
    texts = [piece or _PLACEHOLDER for piece in pieces[:-1]]
    if pieces[-1]:
        texts[-1] = f"{pieces[-2]} {_PLACEHOLDER} {pieces[-1]}".strip()
    return next((reason for text in texts if (reason := bad_text(text))), texts)
