"""COCO captions: annotations/captions_{train,val}YYYY.json and the folders of images they name.

Several people captioned each image. `?captions=all` (default) makes one row of each caption;
`first`, `random` and `join` make one row of each image (captions.py).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from arra.data.captions import WHICH, CaptionColumns
from arra.data.source_options import check_options
from arra.data.source_tables import Entry, FileSource, bad_path
from arra.data.sources import Reject, bad_text, digest, pick_split
from arra.files import sha256_of

_FILE = re.compile(r"captions_(train|val)(\d{4})\.json")
_COLUMNS: dict[str, type] = {"image_id": int, "caption_index": int}


def caption_files(folder: Path) -> list[Path]:
    """The caption files of a COCO folder."""
    return sorted(path for path in folder.glob("annotations/*.json") if _FILE.fullmatch(path.name))


def open_coco(
    folder: Path,
    split: str | None,
    text: CaptionColumns,
    image_column: str,
    name: str,
    options: Mapping[str, str],
) -> FileSource:
    """A COCO folder; images are looked for in trainYYYY/, images/trainYYYY/ and images/.

    Rows are in the order of the file's images, captions of one image in the order of its
    annotations. `id` is the annotation's; `image_id` and `caption_index` are extra columns.

    Raises:
        ValueError: another column than `text` or `caption`, several years and none chosen, or a
            file that is not what it is called.
    """
    check_options(name, options, {"captions": ("all", *WHICH), "year": ()})
    if text.named not in ("text", "caption") or image_column != "image":
        raise ValueError(f"{name}: COCO captions have no other columns than the caption")
    by_split: dict[str, list[tuple[str, Path]]] = {}
    for path in caption_files(folder):
        found = _FILE.fullmatch(path.name)
        assert found is not None
        if options.get("year", found[2]) == found[2]:
            by_split.setdefault(found[1], []).append((found[2], path))
    if not by_split:
        raise ValueError(f"{name}: no captions of year {options.get('year')}")
    chosen = pick_split(name, tuple(by_split), split)
    files = by_split[chosen]
    if len(files) > 1:
        years = ", ".join(year for year, _ in files)
        raise ValueError(
            f"{name}: {chosen} has captions of {years}; choose with ?year={files[-1][0]}"
        )
    year, path = files[0]
    images, captions, stray = _read(path)
    places = (f"{chosen}{year}", f"images/{chosen}{year}", "images")
    root = next((folder / place for place in places if (folder / place).is_dir()), None)
    if root is None:
        raise ValueError(f"{name}: none of the folders {', '.join(places)} is there")
    which = options.get("captions", "all" if text.which == "first" else text.which)
    chooser = None if which == "all" else replace(text, which=which)
    entries: list[Entry | Reject] = []
    seen: set[str] = set()
    for image in images:
        entries += _entries_of(image, captions, root, chooser, len(entries), seen)
    entries += [
        Reject(len(entries) + k, id_, "the caption's image is not listed")
        for k, id_ in enumerate(stray)
    ]
    fingerprint = digest(
        "coco", sha256_of(path), chosen, which, text.seed if which == "random" else 0
    )
    splits, columns = tuple(by_split), dict(_COLUMNS)
    return FileSource(name, chosen, splits, entries, fingerprint, columns, grouped_by="image_id")


def _read(path: Path) -> tuple[list[Any], dict[int, list[dict[str, Any]]], list[str | None]]:
    """The images, the captions by image, and the ids of captions that belong to no image."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch it again") from None
    parts = [content.get(key) for key in ("images", "annotations")] if _is_object(content) else []
    if not parts or not all(isinstance(part, list) and part for part in parts):
        raise ValueError(
            f"{path} has no lists `images` and `annotations`: are these COCO captions?"
        )
    images, annotations = parts
    assert isinstance(images, list)
    assert isinstance(annotations, list)
    captions: dict[int, list[dict[str, Any]]] = {
        image["id"]: []
        for image in images
        if _is_object(image) and isinstance(image.get("id"), int)
    }
    stray: list[str | None] = []
    for annotation in annotations:
        owner = annotation.get("image_id") if _is_object(annotation) else None
        if isinstance(owner, int) and owner in captions:
            captions[owner].append(annotation)
        else:
            stray.append(_id_of(annotation) if _is_object(annotation) else None)
    return images, captions, stray


def _id_of(annotation: dict[str, Any]) -> str | None:
    number = annotation.get("id")
    return str(number) if isinstance(number, int) else None


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _entries_of(
    image: Any,
    captions: dict[int, list[dict[str, Any]]],
    root: Path,
    chooser: CaptionColumns | None,
    row: int,
    seen: set[str],
) -> list[Entry | Reject]:
    """The rows of one image, at least one."""
    number = image.get("id") if _is_object(image) else None
    if not isinstance(number, int):
        return [Reject(row, None, "the image has no number")]
    file, mine = image.get("file_name"), captions[number]
    reason = bad_path(file) or (None if mine else "the image has no caption")
    if f"image {number}" in seen:
        reason = "duplicate id: the image is listed twice"
    seen.add(f"image {number}")
    if reason is not None:
        return [Reject(row, str(number), reason)]
    entries: list[Entry | Reject] = []
    numbered = list(enumerate(mine))
    for index, annotation in numbered if chooser is None else [_one_of(numbered, chooser)]:
        id_, text = _id_of(annotation), annotation.get("caption")
        reason = bad_text(text) if id_ is not None else "the caption has no number"
        if id_ in seen:
            reason = "duplicate id"
        if id_ is not None:
            seen.add(id_)
        if id_ is None or reason is not None:
            assert reason is not None
            entries.append(Reject(row + len(entries), id_, reason))
            continue
        extra = {"image_id": number, "caption_index": index}
        entries.append(Entry(id_, root / str(file), str(text).strip(), dict(extra)))
    return entries


def _one_of(
    annotations: list[tuple[int, dict[str, Any]]], chooser: CaptionColumns
) -> tuple[int, dict[str, Any]]:
    """One annotation for all of an image; joined ones keep the first one's number."""
    index, first = annotations[0]
    name = str(first.get("image_id"))
    if chooser.which == "random":
        return annotations[chooser.drawn(name, len(annotations))]
    if chooser.which == "first":
        return index, first
    captions = [annotation.get("caption") for _, annotation in annotations]
    return index, {**first, "caption": chooser.choose([captions], name)}
