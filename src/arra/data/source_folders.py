"""Sources that are folders of images: with metadata, caption files, or one folder per class."""

import contextlib
import os
from pathlib import Path, PurePosixPath
from typing import Any

from arra.data.captions import CaptionColumns
from arra.data.class_folders import class_texts, classes_of_images
from arra.data.source_tables import (
    Entry,
    FileSource,
    bad_path,
    columns_of,
    from_rows,
    image_column_of,
    read_table,
    text_columns,
)
from arra.data.sources import SPLIT_NAMES, Reject, digest, is_utf8, pick_split
from arra.files import is_local, sizes_below

IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pnm",
    ".jp2",
    ".avif",
    ".dcm",
)
METADATA = ("metadata.jsonl", "metadata.csv")


def open_folder(
    folder: Path, split: str | None, text: CaptionColumns, image_column: str, name: str
) -> FileSource:
    """An image folder: with metadata, with NAME.txt beside each image, or one folder per class.

    Folders called train, val(idation) and test right below it are its splits, unless there are
    other image folders beside them (a class may be called "train").
    """
    table = _metadata(folder)
    if table is not None:
        return _with_root_metadata(folder, table, split, text, image_column, name)
    parts = _split_folders(folder, name)
    splits = tuple(parts)
    chosen = pick_split(name, splits, split)
    root = parts[chosen]
    table = _metadata(root)
    if table is not None:
        rows = read_table(table)
        return from_rows(table, rows, chosen, splits, text, image_column, name)
    images = list_images(root)
    if not images:
        raise ValueError(
            f"{root} holds no images ({', '.join(IMAGE_SUFFIXES)}) and no metadata file"
        )
    sizes = _sizes(root, images)
    captions = _sizes(root, [str(PurePosixPath(each).with_suffix(".txt")) for each in images])
    if captions:
        sizes += [(PurePosixPath(each).name, size) for each, size in captions]
        entries = [_captioned(row, relative, root) for row, relative in enumerate(images)]
        return FileSource(name, chosen, splits, entries, digest("captions", sizes))
    names = sorted({r.split("/")[0] for part in parts.values() for r in _in_folders(part)})
    if not names:
        raise ValueError(
            f"{folder} has images but no captions: add metadata.jsonl with file_name and text, or "
            f"NAME.txt beside each image, or one folder per class"
        )
    texts = class_texts(folder, names)
    owners = classes_of_images(folder, names)
    numbers = {each: number for number, each in enumerate(names)}
    return FileSource(
        name,
        chosen,
        splits,
        [_by_class(row, each, root, numbers, texts, owners) for row, each in enumerate(images)],
        digest("classes", sizes, names, texts, owners),
        {"label": int},
        tuple(each if texts[each] == each.replace("_", " ") else texts[each] for each in names),
    )


def _with_root_metadata(
    folder: Path, table: Path, split: str | None, text: CaptionColumns, image_column: str, name: str
) -> FileSource:
    rows = read_table(table)
    there = columns_of(rows)
    text_columns(str(table), text, there)
    column = image_column_of(table, image_column, there)
    tops = [_top(row, column) for row in rows]
    named = {top for top in tops if top is not None}
    if not named or any(top.lower() not in SPLIT_NAMES for top in named):
        chosen = pick_split(name, ("train",), split)
        return from_rows(table, rows, chosen, ("train",), text, image_column, name)
    # Rows that name no split folder (unreadable lines, images at the root) stay with `train`.
    of_row = [SPLIT_NAMES[top.lower()] if top is not None else "train" for top in tops]
    splits = tuple(sorted(set(of_row), key=("train", "val", "test").index))
    chosen = pick_split(name, splits, split)
    mine = [row for row, owner in zip(rows, of_row, strict=True) if owner == chosen]
    return from_rows(table, mine, chosen, splits, text, image_column, name)


def _top(row: dict[str, Any] | Reject, column: str) -> str | None:
    file = row.get(column) if isinstance(row, dict) else None
    if bad_path(file) is not None:
        return None
    parts = PurePosixPath(str(file)).parts
    return parts[0] if len(parts) > 1 else None


def _metadata(folder: Path) -> Path | None:
    found = [folder / file for file in METADATA if (folder / file).is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} has both {' and '.join(METADATA)}: keep one")
    return found[0] if found else None


def _split_folders(folder: Path, name: str) -> dict[str, Path]:
    below = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."]
    filled = [path for path in below if _metadata(path) is not None or list_images(path)]
    if not filled or any(path.name.lower() not in SPLIT_NAMES for path in filled):
        return {"train": folder}
    parts: dict[str, Path] = {}
    for path in filled:
        split = SPLIT_NAMES[path.name.lower()]
        if split in parts:
            raise ValueError(f"{name}: {parts[split].name} and {path.name} are both split {split}")
        parts[split] = path
    return {split: parts[split] for split in ("train", "val", "test") if split in parts}


def list_images(folder: Path) -> list[str]:
    """Paths of the images below a folder, relative, sorted; hidden ones are left out."""
    if not is_local(folder):
        names = sizes_below(folder)
        return [name for name in names if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith(".")]
        for file in files:
            if not file.startswith(".") and Path(file).suffix.lower() in IMAGE_SUFFIXES:
                found.append((Path(root) / file).relative_to(folder).as_posix())
    return sorted(found)


def _sizes(folder: Path, names: list[str]) -> list[tuple[str, int]]:
    """Names and bytes of those files that are there."""
    there = None if is_local(folder) else sizes_below(folder)
    found = []
    for name in names:
        if there is None:
            with contextlib.suppress(FileNotFoundError):
                found.append((name, (folder / name).stat().st_size))
        elif name in there:
            found.append((name, there[name]))
    return found


def _in_folders(folder: Path) -> list[str]:
    return [relative for relative in list_images(folder) if "/" in relative]


def _captioned(row: int, relative: str, root: Path) -> Entry | Reject:
    if not is_utf8(relative):
        return Reject(row, None, "the file name is not valid UTF-8")
    return Entry(relative, root / relative, None, {})


def _by_class(
    row: int,
    relative: str,
    root: Path,
    numbers: dict[str, int],
    texts: dict[str, str],
    owners: dict[str, str],
) -> Entry | Reject:
    if not is_utf8(relative):
        return Reject(row, None, "the file name is not valid UTF-8")
    folder = relative.split("/")[0] if "/" in relative else owners.get(Path(relative).stem)
    if folder is None:
        return Reject(row, relative, "the image lies in no class folder")
    return Entry(relative, root / relative, texts[folder], {"label": numbers[folder]})
