"""Where images and captions come from: one interface over folders, files, the hub and the scenes.

A source is a list of rows in a fixed order; `read(start, stop)` yields one `Record` or one `Reject`
per row, in that order. A bad row never stops a run: it becomes a `Reject` with its reason.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from PIL import Image

from arra.data.captions import CaptionColumns
from arra.data.source_options import split_options
from arra.files import place

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Record:
    """One image with its caption.

    Attributes:
        id: unique within the split.
        image: encoded bytes, the path of a file, or a decoded image (`images.load_rgb` takes each).
        text: the caption, not empty.
        extra: the source's other columns; values are JSON scalars of the types in Source.columns.
        row: row number within the source's split.
    """

    id: str
    image: bytes | Path | Image.Image
    text: str
    extra: dict[str, Scalar] = field(default_factory=dict)
    row: int = -1


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used, and why."""

    row: int
    id: str | None
    reason: str


class Source(Protocol):
    """One split of a source.

    Attributes:
        name: the source as the user named it.
        split: the split that is read.
        splits: every split the source has.
        fingerprint: sha256 over what identifies the rows (names, sizes, tables), not all pixels.
        columns: names and types (str, int, float, bool) of what `Record.extra` holds.
        class_names: names of the integer column `label`, if the source says them.
    """

    name: str
    split: str
    splits: tuple[str, ...]
    fingerprint: str
    columns: dict[str, type]
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    @property
    def groups(self) -> Sequence[str] | None:
        """For each row what it belongs to, a patient or a sample; None if rows stand alone.

        Rows of one group stay in one split when `val` is taken from `train`.
        """
        ...

    def read(self, start: int, stop: int) -> Iterator[Record | Reject]:
        """Yields rows start..stop-1 in order."""
        ...


GROUP_COLUMNS = ("patient", "sample")
"""Columns that say what a row belongs to; the first one that a source has."""


def group_column(columns: Iterable[str]) -> str | None:
    """Which of a source's columns says what a row belongs to, if any."""
    there = set(columns)
    return next((name for name in GROUP_COLUMNS if name in there), None)


def group_names(values: Iterable[object]) -> list[str]:
    """Groups of rows by the values of a column; a row without a value stands alone."""
    return [f"row {row}" if v is None else f"group {v}" for row, v in enumerate(values)]


SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
"""Names that folders and files use for splits (those of the hub's image folders), and ours."""


def split_of(name: str) -> str | None:
    """The split that a folder or file name such as `train-00000-of-00004` says, or None."""
    return SPLIT_NAMES.get(name.lower().replace("_", "-").replace(".", "-").split("-")[0])


def open_source(
    spec: str | Path,
    *,
    split: str | None = None,
    text_column: str = "text",
    image_column: str = "image",
    limit: int | None = None,
    seed: int = 0,
    captions: str = "first",
) -> Source:
    """Opens one split of a source.

    Args:
        spec: an image folder (metadata.jsonl or metadata.csv with `file_name`; or NAME.txt beside
            each image; or one folder per class), a Parquet file or a folder of them (image =
            {bytes, path}), a JSONL or CSV file with paths relative to it, a published layout
            (source_layouts.py; docs/sources.md), a hub id, or `builtin:scenes`
            (`builtin:scenes:1-4` for one to four shapes). Options follow as PATH?NAME=VALUE.
        split: which split; None takes `train`, or the only one; FIRST_SPLIT any.
        text_column: name of the caption's column; tables may have several, as `a,b,c`.
        image_column: name of the image's column. Tables of paths also know `file_name` and `path`.
        limit: read at most this many rows of the split.
        seed: of the drawn scenes, and of captions chosen at random.
        captions: which of a row's several captions, `first`, `random` or `join` (captions.py).

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no such split or column, or nothing readable; the message lists what there is.
    """
    from arra.data import source_layouts

    name = str(spec)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, but must be at least 1")
    if name.startswith("builtin:"):
        return ScenesSource(name, split=split, limit=limit, seed=seed)
    located, options = split_options(name)
    path = place(located).expanduser()
    text = CaptionColumns(text_column, captions, seed)
    source = source_layouts.open_source_at(path, located, split, text, image_column, name, options)
    return source if limit is None else Rows(source, range(min(limit, len(source))))


FIRST_SPLIT = "(first)"
"""Asks for whichever split comes first, to learn from it which there are."""


def pick_split(name: str, splits: tuple[str, ...], split: str | None) -> str:
    """The split to read, where None stands for `train` or the only one."""
    if split == FIRST_SPLIT:
        return splits[0]
    if split is None and "train" in splits:
        return "train"
    if split is None and len(splits) == 1:
        return splits[0]
    wanted = split if split is None else SPLIT_NAMES.get(split, split)
    if wanted not in splits:
        asked = "say which split to read" if split is None else f"there is no split {split!r}"
        raise ValueError(f"{name}: {asked}; it has {', '.join(splits)}")
    return wanted


def missing_column(name: str, kind: str, column: str, there: list[str]) -> ValueError:
    """The error for a column that a table does not have."""
    return ValueError(
        f"{name} has no column {column!r} for the {kind}; its columns are "
        f"{', '.join(there) or '(none)'}. Name one with --{kind}-column"
    )


def bad_text(text: object) -> str | None:
    """Why a caption cannot be used, or None if it can."""
    if text is None:
        return "the caption is missing"
    if not isinstance(text, str):
        return f"the caption is not text but {type(text).__name__}"
    if not text.strip():
        return "the caption is empty"
    return None if is_utf8(text) else "the caption is not valid UTF-8"


def is_utf8(text: str) -> bool:
    """Whether a string can be written as UTF-8: lone surrogates stand for undecodable bytes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def scalar(value: object, kind: type) -> Scalar:
    """A value of an extra column as the JSON scalar of the column's type; nested ones as JSON."""
    if value is None:
        return None
    if isinstance(value, bytes):
        value = value.hex()
    if kind is str:
        if isinstance(value, list | dict):
            return json.dumps(value, ensure_ascii=True, sort_keys=True, default=str)
        text = value if isinstance(value, str) else str(value)
        return text.encode("utf-8", "replace").decode("utf-8")
    return kind(value)


def digest(*parts: object) -> str:
    """Sha256 over the JSON of `parts`."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class Rows:
    """Chosen rows of a source, in rising order, as a source of its own."""

    def __init__(self, source: Source, rows: range | list[int]) -> None:
        self.source, self.rows = source, rows
        self.name, self.split, self.splits = source.name, source.split, source.splits
        self.columns, self.class_names = source.columns, source.class_names
        chosen = [rows.start, rows.stop] if isinstance(rows, range) else rows
        self.fingerprint = digest(source.fingerprint, chosen)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def groups(self) -> Sequence[str] | None:
        """Those of the chosen rows."""
        groups = self.source.groups
        return None if groups is None else [groups[row] for row in self.rows]

    def read(self, start: int, stop: int) -> Iterator[Record | Reject]:
        """Reads runs of neighbouring rows together."""
        wanted = self.rows[start:stop]
        begin = 0
        for position in range(1, len(wanted) + 1):
            if position == len(wanted) or wanted[position] != wanted[position - 1] + 1:
                yield from self.source.read(wanted[begin], wanted[position - 1] + 1)
                begin = position


SCENES_ROWS = {"train": 20_000, "val": 1_000, "test": 2_000, "compositional": 2_000}
"""Rows of each split without a limit. A limit on `train` may be larger: scenes never run out."""


class ScenesSource:
    """Scenes drawn by code; row i of a split is the same scene everywhere."""

    def __init__(self, name: str, *, split: str | None, limit: int | None, seed: int) -> None:
        kind, _, shapes = name.removeprefix("builtin:").partition(":")
        if kind != "scenes":
            raise ValueError(f"no built-in data is called {name!r}; there is builtin:scenes")
        self.shapes = _shapes(name, shapes) if shapes else (1, 2)
        self.name, self.seed = name, seed
        self.splits = tuple(SCENES_ROWS)
        from arra.data.builtin import EVERYTHING

        # Not among `splits`, which a dataset is prepared from: painters must not see held-out ones.
        drawn_without_end = ("train", EVERYTHING)
        self.split = EVERYTHING if split == EVERYTHING else pick_split(name, self.splits, split)
        rows = SCENES_ROWS["train" if self.split in drawn_without_end else self.split]
        if limit is not None:
            rows = limit if self.split in drawn_without_end else min(limit, rows)
        self._rows = rows
        self.columns: dict[str, type] = {}
        self.class_names: tuple[str, ...] = ()
        self.fingerprint = digest("scenes", self.split, self.shapes, seed, rows)

    def __len__(self) -> int:
        return self._rows

    @property
    def groups(self) -> None:
        """Scenes stand alone."""
        return None

    def read(self, start: int, stop: int) -> Iterator[Record | Reject]:
        """Draws scenes start..stop-1."""
        from arra.data.builtin import caption, draw, scene_at

        for row in range(start, min(stop, self._rows)):
            scene = scene_at(self.split, row, seed=self.seed, shapes=self.shapes)
            yield Record(
                id=f"{self.split}/{row}",
                image=Image.fromarray(draw(scene)),
                text=caption(scene),
                row=row,
            )


def _shapes(name: str, text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if not (first.isdigit() and (last or first).isdigit()):
        raise ValueError(f"{name!r}: write the number of shapes as builtin:scenes:1-4")
    fewest, most = int(first), int(last or first)
    if not 1 <= fewest <= most <= 4:
        raise ValueError(f"{name!r}: scenes have one to four shapes")
    return fewest, most
