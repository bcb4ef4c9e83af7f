"""DeepEyeNet: DeepEyeNet_{train,valid,test}.json beside the folder of retinal images they name.

Each file is a list of {"eyenet0420/train_set/NAME.jpg": {"keywords", "clinical-description"}}
(the layout that its README shows: Jhhuangkay/DeepOpht-…). Access to the data is by request.
"""

import json
import re
from pathlib import Path
from typing import Any

from arra.data.source_tables import Entry, FileSource, bad_path
from arra.data.sources import Reject, bad_text, digest, missing_column, pick_split, split_of
from arra.files import sha256_of

_FILE = re.compile(r"DeepEyeNet_(train|valid|val|test)\.json")
_DESCRIPTION = "clinical-description"
_COLUMNS = (_DESCRIPTION, "keywords")


def description_files(folder: Path) -> list[Path]:
    """DeepEyeNet's JSON files in a folder."""
    return sorted(path for path in folder.iterdir() if _FILE.fullmatch(path.name))


def open_deepeyenet(
    folder: Path, split: str | None, text_column: str, image_column: str, name: str
) -> FileSource:
    """One of the official splits; image paths are relative to the folder of the JSON files.

    Args:
        text_column: `text` or `clinical-description`, or `keywords`; the other one is an extra
            column.

    Raises:
        ValueError: another column, two files of one split, or a file that is not such a list.
    """
    column = _DESCRIPTION if text_column == "text" else text_column
    if column not in _COLUMNS:
        raise missing_column(name, "text", text_column, list(_COLUMNS))
    if image_column != "image":
        raise missing_column(name, "image", image_column, ["image"])
    by_split: dict[str, Path] = {}
    for path in description_files(folder):
        part = split_of(path.stem.removeprefix("DeepEyeNet_"))
        assert part is not None
        if part in by_split:
            raise ValueError(f"{name}: {by_split[part].name} and {path.name} are both split {part}")
        by_split[part] = path
    splits = tuple(each for each in ("train", "val", "test") if each in by_split)
    chosen = pick_split(name, splits, split)
    path = by_split[chosen]
    entries: list[Entry | Reject] = []
    seen: dict[str, int] = {}
    (other,) = set(_COLUMNS) - {column}
    for file, fields in _images(path):
        entries.append(_entry(file, fields, column, other, len(entries), folder, seen))
    if not entries:
        raise ValueError(f"{path} lists no images")
    fingerprint = digest("deepeyenet", sha256_of(path), chosen, column)
    return FileSource(name, chosen, splits, entries, fingerprint, {other: str})


def _images(path: Path) -> list[tuple[str | None, Any]]:
    """Image path and fields of each image, in the file's order."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch it again") from None
    if not isinstance(content, list):
        raise ValueError(f"{path} is not a list of images")
    images: list[tuple[str | None, Any]] = []
    for item in content:
        images += item.items() if isinstance(item, dict) and item else [(None, None)]
    return images


def _entry(
    file: str | None,
    fields: Any,
    column: str,
    other: str,
    row: int,
    folder: Path,
    seen: dict[str, int],
) -> Entry | Reject:
    if file is None or not isinstance(fields, dict):
        return Reject(row, None, "not an image path with its fields")
    text = fields.get(column)
    reason = bad_path(file)
    id_ = file if reason is None else None
    reason = reason or bad_text(text)
    if reason is None and file in seen:
        reason = f"duplicate id, first seen in row {seen[file]}"
    if reason is not None:
        return Reject(row, id_, reason)
    seen[file] = row
    extra = fields.get(other)
    kept = extra if bad_text(extra) is None else None
    return Entry(file, folder / file, str(text).strip(), {other: kept})
