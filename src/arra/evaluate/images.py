"""A set of images to be measured, with captions where there are any, from whatever holds it.

Accepted: a folder written by `arra generate` (images.jsonl: one {file, prompt, seed} a line), a
folder of plain image files, and every source that `arra prepare` takes (Parquet, metadata files,
`builtin:scenes`).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from arra.data.images import BadImage, load_rgb
from arra.data.source_folders import IMAGE_SUFFIXES
from arra.data.sources import Reject, open_source

READ_AT_ONCE = 256
SHOWN = 5  # how many bad images an error spells out


@dataclass(frozen=True)
class ImageSet:
    """Images as PIL RGB at their own sizes; `captions` is None where the set has no texts."""

    source: str
    names: tuple[str, ...]
    images: tuple[Image.Image, ...]
    captions: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The distinct (width, height), sorted."""
        return sorted({image.size for image in self.images})


def load_images(
    spec: str | Path, *, split: str | None = None, limit: int | None = None
) -> ImageSet:
    """Reads a whole set. ValueError names every image that cannot be read.

    An evaluation over fewer images than were given would be a different evaluation, so bad ones
    are never skipped here.
    """
    folder = Path(spec).expanduser()
    entries: Iterator[tuple[str, bytes | Path | Image.Image, str | None]]
    if (folder / "images.jsonl").is_file():
        entries = _painted(folder)
    elif split is None and folder.is_dir() and _is_plain_folder(folder):
        entries = ((path.name, path, None) for path in _image_files(folder))
    else:
        entries = _from_source(str(spec), split, limit)
    names, images, captions, bad = [], [], [], []
    for number, (name, image, caption) in enumerate(entries):
        if limit is not None and number >= limit:
            break
        try:
            images.append(
                image.convert("RGB") if isinstance(image, Image.Image) else load_rgb(image)
            )
        except (BadImage, OSError) as error:
            bad.append(f"{name} ({error})")
            continue
        names.append(name)
        captions.append(caption)
    _refuse_bad(str(spec), bad, len(images))
    texts = tuple(c for c in captions if c is not None)
    return ImageSet(
        str(spec), tuple(names), tuple(images), texts if len(texts) == len(images) else None
    )


def _refuse_bad(spec: str, bad: list[str], good: int) -> None:
    if bad:
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise ValueError(
            f"{len(bad)} of {good + len(bad)} images of {spec} cannot be read: "
            f"{'; '.join(bad[:SHOWN])}{more}. Repair or remove them: a smaller set would be a "
            f"different measurement."
        )
    if good == 0:
        raise ValueError(f"{spec} holds no images: give a folder or Parquet file that does.")


def _painted(folder: Path) -> Iterator[tuple[str, Path, str | None]]:
    listing = folder / "images.jsonl"
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, prompt = str(row["file"]), row.get("prompt")
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
            raise ValueError(
                f"{listing} line {number} is not a JSON object with a 'file': run `arra generate` "
                f"again, it repairs its folder."
            ) from None
        yield name, folder / name, None if prompt is None else str(prompt)


def _is_plain_folder(folder: Path) -> bool:
    """Image files with no captions: nothing that a source would read texts from."""
    described = ("metadata.jsonl", "metadata.csv", "manifest.json", "*.parquet")
    if any(next(folder.rglob(pattern), None) for pattern in described):
        return False
    first = next(_image_files(folder), None)
    return first is not None and not first.with_suffix(".txt").exists()


def _image_files(folder: Path) -> Iterator[Path]:
    return iter(sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES))


def _from_source(
    spec: str, split: str | None, limit: int | None
) -> Iterator[tuple[str, bytes | Path | Image.Image, str | None]]:
    source = open_source(spec, split=split, limit=limit)
    bad = []
    for start in range(0, len(source), READ_AT_ONCE):
        for record in source.read(start, min(start + READ_AT_ONCE, len(source))):
            if isinstance(record, Reject):
                bad.append(f"row {record.row} ({record.reason})")
            else:
                yield record.id, record.image, record.text
    _refuse_bad(spec, bad, len(source) - len(bad))
