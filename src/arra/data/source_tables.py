"""Sources made of image files that a JSONL, CSV or TSV table lists."""

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from arra.data.captions import CaptionColumns
from arra.data.sources import (
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
    scalar,
    split_of,
)
from arra.files import sha256_of

TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv")
PATH_COLUMNS = ("file_name", "path", "image_path")
"""Looked for when the image column has its default name and the table does not have it."""

_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Entry:
    """A row whose image is a file; `text` None means that the caption is in NAME.txt beside it."""

    id: str
    path: Path
    text: str | None
    extra: dict[str, Scalar]


class FileSource:
    """Rows whose images are files."""

    def __init__(
        self,
        name: str,
        split: str,
        splits: tuple[str, ...],
        entries: list[Entry | Reject],
        fingerprint: str,
        columns: dict[str, type] | None = None,
        class_names: tuple[str, ...] = (),
        grouped_by: str | None = None,
    ) -> None:
        self.name, self.split, self.splits = name, split, splits
        self.fingerprint = fingerprint
        self.columns = columns or {}
        self.class_names = class_names
        self._entries = entries
        self._grouped_by = grouped_by or group_column(self.columns)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def groups(self) -> list[str] | None:
        """By the column named at the start, or `patient`, or `sample`."""
        if self._grouped_by is None:
            return None
        name = self._grouped_by
        return group_names(
            e.extra.get(name) if isinstance(e, Entry) else None for e in self._entries
        )

    def read(self, start: int, stop: int) -> Iterator[Record | Reject]:
        """Yields rows start..stop-1; caption files are read here, images by who needs them."""
        for row, entry in enumerate(self._entries[start:stop], start):
            if isinstance(entry, Reject):
                yield entry
                continue
            text: object = entry.text
            if text is None:
                text = _sidecar(entry.path)
                if isinstance(text, Reject):
                    yield Reject(row, entry.id, text.reason)
                    continue
            reason = bad_text(text)
            if reason:
                yield Reject(row, entry.id, reason)
                continue
            assert isinstance(text, str)
            yield Record(entry.id, entry.path, text, entry.extra, row)


def _sidecar(image: Path) -> str | Reject:
    path = image.with_suffix(".txt")
    try:
        return path.read_bytes().decode("utf-8-sig").strip()
    except FileNotFoundError:
        return Reject(-1, None, f"missing caption file {path}")
    except UnicodeDecodeError:
        return Reject(-1, None, f"the caption file {path} is not valid UTF-8")


def open_table(
    path: Path, split: str | None, text: CaptionColumns, image_column: str, name: str
) -> FileSource:
    """A JSONL, CSV or TSV file: an image path, relative to it, and a caption per row."""
    only = split_of(path.stem) or "train"
    chosen = pick_split(name, (only,), split)
    rows = read_table(path)
    return from_rows(path, rows, chosen, (only,), text, image_column, name)


def from_rows(
    path: Path,
    rows: list[dict[str, Any] | Reject],
    split: str,
    splits: tuple[str, ...],
    text: CaptionColumns,
    image_column: str,
    name: str,
) -> FileSource:
    there = columns_of(rows)
    if not rows:
        raise ValueError(f"{path} has no rows")
    columns_of_text = text_columns(str(path), text, there)
    image_column = image_column_of(path, image_column, there)
    skip = {*columns_of_text, image_column, "id"}
    columns = {key: kind_of(rows, key, path.suffix) for key in there if key not in skip}
    entries = _entries(rows, path.parent, text, columns_of_text, image_column, columns)
    fingerprint = digest("table", sha256_of(path), split, text.identity, image_column)
    return FileSource(name, split, splits, entries, fingerprint, columns)


def text_columns(name: str, text: CaptionColumns, there: Sequence[str]) -> tuple[str, ...]:
    """The columns that hold captions.

    Raises:
        ValueError: one of them is not there; the message lists what is.
    """
    columns = text.among(there)
    for column in columns:
        if column not in there:
            raise missing_column(name, "text", column, list(there))
    return columns


def image_column_of(path: Path, image_column: str, there: list[str]) -> str:
    if image_column in there:
        return image_column
    if image_column == "image":
        for known in PATH_COLUMNS:
            if known in there:
                return known
    raise missing_column(str(path), "image", image_column, there)


def columns_of(rows: list[dict[str, Any] | Reject]) -> list[str]:
    seen: dict[str, None] = {}
    for row in rows:
        if isinstance(row, dict):
            seen.update(dict.fromkeys(row))
    return list(seen)


def _entries(
    rows: list[dict[str, Any] | Reject],
    root: Path,
    text: CaptionColumns,
    columns_of_text: Sequence[str],
    image_column: str,
    columns: dict[str, type],
) -> list[Entry | Reject]:
    entries: list[Entry | Reject] = []
    first_with: dict[str, int] = {}
    for number, row in enumerate(rows):
        if isinstance(row, Reject):
            entries.append(Reject(number, row.id, row.reason))
            continue
        file = row.get(image_column)
        given = row.get("id")
        id_ = str(file if given is None else given)
        shown = id_ if is_utf8(id_) else None
        caption = text.choose((row.get(column) for column in columns_of_text), id_)
        reason = bad_path(file) or bad_text(caption)
        if reason is None and shown is None:
            reason = "the id is not valid UTF-8"
        if reason is None and id_ in first_with:
            reason = f"duplicate id, first seen in row {first_with[id_]}"
        if reason is not None:
            entries.append(Reject(number, shown, reason))
            continue
        first_with[id_] = number
        extra = {key: cell(row.get(key), kind) for key, kind in columns.items()}
        assert isinstance(caption, str)
        entries.append(Entry(id_, root / str(file), caption, extra))
    return entries


def bad_path(file: object) -> str | None:
    """Why a path in a table cannot be used: tables may not reach outside their own folder."""
    if not isinstance(file, str) or not file.strip():
        return "the image path is missing"
    if not is_utf8(file):
        return "the image path is not valid UTF-8"
    if "\0" in file:
        return "the image path holds a NUL character"
    if PurePosixPath(file).is_absolute() or PureWindowsPath(file).drive:
        return f"the image path {file!r} is absolute: write it relative to the table"
    depth = 0
    for part in PurePosixPath(file).parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return f"the image path {file!r} leaves the folder of the table"
    return None


def read_table(path: Path) -> list[dict[str, Any] | Reject]:
    """The rows of a JSONL, CSV or TSV file; lines that cannot be read become rejects."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    return _read_jsonl(data) if path.suffix.lower() == ".jsonl" else _read_csv(data, path)


def _read_jsonl(data: bytes) -> list[dict[str, Any] | Reject]:
    rows: list[dict[str, Any] | Reject] = []
    for line_number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            rows.append(Reject(-1, None, f"line {line_number} is not valid UTF-8"))
            continue
        except (json.JSONDecodeError, RecursionError) as error:
            rows.append(Reject(-1, None, f"line {line_number} is not valid JSON ({error})"))
            continue
        if isinstance(value, dict):
            rows.append(value)
        else:
            rows.append(Reject(-1, None, f"line {line_number} is not a JSON object"))
    return rows


def _read_csv(data: bytes, path: Path) -> list[dict[str, Any] | Reject]:
    # Undecodable bytes become lone surrogates, so that one bad caption costs one row, not the file.
    text = io.StringIO(data.decode("utf-8", "surrogateescape"), newline="")
    tabs = path.suffix.lower() == ".tsv"
    reader = csv.DictReader(text, delimiter="\t" if tabs else ",")
    rows: list[dict[str, Any] | Reject] = []
    try:
        for row in reader:
            if None in row:
                mark = "tabs" if tabs else "commas"
                reason = f"line {reader.line_num} has more fields than the header: quote {mark}"
                rows.append(Reject(-1, None, reason))
            else:
                rows.append({key: value if value != "" else None for key, value in row.items()})
    except csv.Error as error:
        raise ValueError(f"{path} is not a readable table ({error})") from None
    return rows


def kind_of(rows: list[dict[str, Any] | Reject], key: str, suffix: str) -> type:
    """The type that holds every value of a column: bool, int, float or (for the rest) str."""
    values = [row[key] for row in rows if isinstance(row, dict) and row.get(key) is not None]
    if not values:
        return str
    if suffix.lower() in (".csv", ".tsv"):
        if all(_INTEGER.fullmatch(value) for value in values):
            return int
        return float if all(_NUMBER.fullmatch(value) for value in values) else str
    kinds = {type(value) for value in values}
    if kinds == {bool}:
        return bool
    if kinds == {int}:
        return int if all(-(2**63) <= value < 2**63 for value in values) else str
    return float if kinds <= {int, float} else str


def cell(value: object, kind: type) -> Scalar:
    cell = scalar(value, kind)
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell
