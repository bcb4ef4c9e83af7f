"""Sources made of tables that hold the images themselves: Parquet files, local or elsewhere."""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from arra.data.captions import CaptionColumns
from arra.data.parquet_files import parquet_file
from arra.data.source_tables import bad_path, text_columns
from arra.data.sources import (
    SPLIT_NAMES,
    Record,
    Reject,
    Scalar,
    bad_text,
    digest,
    group_column,
    group_names,
    missing_column,
    pick_split,
    scalar,
    split_of,
)
from arra.files import is_local

_OPENED_AT_ONCE = 16
"""Footers that are fetched at the same time."""


class TableSource:
    """Rows of Arrow tables. Subclasses say how rows start..stop of the table are had."""

    def __init__(
        self,
        name: str,
        split: str,
        splits: tuple[str, ...],
        schema: pa.Schema,
        text: CaptionColumns,
        image_column: str,
        root: Path | None,
    ) -> None:
        self.name, self.split, self.splits = name, split, splits
        self._text_columns = text_columns(name, text, schema.names)
        if image_column not in schema.names:
            raise missing_column(name, "image", image_column, schema.names)
        self._schema, self._text, self._image, self._root = schema, text, image_column, root
        labels = _class_labels(schema)
        self._names = {column: labels.get(column, ()) for column in self._text_columns}
        self.class_names = tuple(labels.get("label", ()))
        for column in self._text_columns:
            kind = schema.field(column).type
            if not (_holds_text(kind) or (pa.types.is_integer(kind) and self._names[column])):
                raise ValueError(
                    f"{name}: column {column!r} holds {kind}, not captions. Name another with "
                    f"--text-column; its columns are {', '.join(schema.names)}"
                )
        skip = {*self._text_columns, image_column, "id"}
        self.columns = {f.name: _kind(f.type) for f in schema if f.name not in skip}
        self._duplicates: dict[int, int] = {}

    @property
    def groups(self) -> list[str] | None:
        """By the column `patient` or `sample`."""
        name = group_column(self.columns)
        return None if name is None else group_names(self._column(name))

    def _column(self, name: str) -> Iterator[Any]:
        raise NotImplementedError

    def _find_duplicates(self, ids: Iterator[Any]) -> None:
        first_with: dict[str, int] = {}
        for row, value in enumerate(ids):
            if value is None:
                continue
            first = first_with.setdefault(str(value), row)
            if first != row:
                self._duplicates[row] = first

    def _rows(self, table: pa.Table, first_row: int) -> Iterator[Record | Reject]:
        cells = {name: values_of_column(table.column(name)) for name in table.column_names}
        for offset in range(table.num_rows):
            row = first_row + offset
            yield self._row({name: values[offset] for name, values in cells.items()}, row)

    def _row(self, cells: dict[str, Any], row: int) -> Record | Reject:
        given = cells.get("id")
        id_ = f"{self.split}/{row}" if given is None else str(given)
        if isinstance(given, bytes):
            return Reject(row, None, "the id is not valid UTF-8")
        if row in self._duplicates:
            return Reject(row, id_, f"duplicate id, first seen in row {self._duplicates[row]}")
        captions = (_caption(cells[name], self._names[name]) for name in self._text_columns)
        text = self._text.choose(captions, id_)
        if isinstance(text, bytes):
            return Reject(row, id_, "the caption is not valid UTF-8")
        image = self._image_of(cells[self._image])
        reason = image if isinstance(image, str) else bad_text(text)
        if reason is not None:
            return Reject(row, id_, reason)
        assert not isinstance(image, str)
        assert isinstance(text, str)
        extra: dict[str, Scalar] = {k: scalar(cells[k], kind) for k, kind in self.columns.items()}
        return Record(id_, image, text, extra, row)

    def _image_of(self, cell: Any) -> bytes | Path | str:
        """Bytes, a path, or (as str) the reason why there is neither."""
        if isinstance(cell, dict):
            data, path = cell.get("bytes"), cell.get("path")
            cell = data if data is not None else path
        if isinstance(cell, bytes):
            return cell
        if cell is None:
            return "the image is missing"
        if not isinstance(cell, str) or self._root is None:
            return f"the image is neither bytes nor a path but {type(cell).__name__}"
        return bad_path(cell) or self._root / cell


def _caption(value: Any, names: Sequence[str]) -> Any:
    """A cell of a caption column: text, a list of texts, or a class by its name."""
    if isinstance(value, list):
        return [_caption(each, names) for each in value]
    if isinstance(value, bytes):
        return _decoded(value)
    if isinstance(value, int) and names:
        return names[value] if 0 <= value < len(names) else None
    return value


def _holds_text(kind: pa.DataType) -> bool:
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return _is_text(kind.value_type if listed else kind)


def _is_text(kind: pa.DataType) -> bool:
    return any(
        check(kind)
        for check in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_binary,
            pa.types.is_large_binary,
        )
    )


def _kind(kind: pa.DataType) -> type:
    if pa.types.is_boolean(kind):
        return bool
    if pa.types.is_integer(kind) and not pa.types.is_uint64(kind):
        return int
    return float if pa.types.is_floating(kind) else str


def values_of_column(column: pa.ChunkedArray) -> list[Any]:
    """Python values; text that is not valid UTF-8 stays bytes, for its row alone to be rejected."""
    if pa.types.is_struct(column.type):
        names = [column.type.field(i).name for i in range(column.type.num_fields)]
        parts = [values_of_column(part) for part in column.flatten()]
        return [dict(zip(names, row, strict=True)) for row in zip(*parts, strict=True)]
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return [_decoded(value) for value in column.cast(pa.large_binary()).to_pylist()]
    if pa.types.is_list(column.type) and _is_text(column.type.value_type):
        rows = column.cast(pa.list_(pa.large_binary())).to_pylist()
        return [row if row is None else [_decoded(value) for value in row] for row in rows]
    return column.to_pylist()


def _decoded(value: bytes | None) -> str | bytes | None:
    if value is None:
        return None
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def _class_labels(schema: pa.Schema) -> dict[str, list[str]]:
    """Class names of integer columns, as the hub writes them into a table's metadata."""
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return {}
    try:
        features = json.loads(raw)["info"]["features"]
        return {k: f["names"] for k, f in features.items() if f.get("_type") == "ClassLabel"}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        return {}  # a hint for names only: labels are then plain numbers


# Parquet files


def holds_parquet(folder: Path) -> bool:
    """Whether a folder is a Parquet source: .parquet files in it, or in its `data` folder."""
    return bool(_parquet_files(folder))


def _parquet_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = [*path.glob("*.parquet"), *path.glob("data/*.parquet")]
    for folder in path.iterdir():
        if folder.is_dir() and folder.name.lower() in SPLIT_NAMES:
            found += folder.glob("*.parquet")
    return sorted(file for file in found if not file.name.startswith("."))


def _split_of_file(file: Path, base: Path) -> str:
    named = split_of(file.stem)
    if named is None and base in file.parents and file.parent != base:
        named = SPLIT_NAMES.get(file.parent.name.lower())
    return named or "train"


def open_parquet(
    path: Path, split: str | None, text: CaptionColumns, image_column: str, name: str
) -> "ParquetSource":
    """A Parquet file or a folder of them; `train-*`, `test-*`, … in file names say the split."""
    by_split: dict[str, list[Path]] = {}
    for file in _parquet_files(path):
        by_split.setdefault(_split_of_file(file, path), []).append(file)
    splits = tuple(each for each in ("train", "val", "test") if each in by_split)
    chosen = pick_split(name, splits, split)
    return ParquetSource(name, chosen, splits, by_split[chosen], text, image_column)


class ParquetSource(TableSource):
    """Parquet files in the order of their names, read one row group at a time.

    Files may be paths of an object store or the hub (universal_pathlib): of those the footers are
    read first, and then nothing but the row groups that are asked for.
    """

    def __init__(
        self,
        name: str,
        split: str,
        splits: tuple[str, ...],
        files: list[Path],
        text: CaptionColumns,
        image_column: str,
    ) -> None:
        with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
            self._files = list(pool.map(_open, files))
        self._paths = files
        schema = self._files[0].schema_arrow
        for file, path in zip(self._files, files, strict=True):
            if not file.schema_arrow.equals(schema):
                raise ValueError(f"{path} has other columns or types than {files[0]}")
        super().__init__(name, split, splits, schema, text, image_column, files[0].parent)
        self._groups: list[tuple[int, int, int, int]] = []  # first row, rows, file, group
        row = 0
        for number, file in enumerate(self._files):
            for group in range(file.metadata.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                self._groups.append((row, rows, number, group))
                row += rows
        self._length = row
        if row == 0:
            raise ValueError(f"{name}: split {split} has no rows")
        if "id" in schema.names:
            self._find_duplicates(self._column("id"))
        self._cached: tuple[tuple[int, int], pa.Table] | None = None
        footers = [(path.name, path.stat().st_size, _footer(path)) for path in files]
        self.fingerprint = digest("parquet", footers, split, text.identity, image_column)

    def __len__(self) -> int:
        return self._length

    def _column(self, name: str) -> Iterator[Any]:
        for _, _, number, group in self._groups:
            yield from values_of_column(self._read_group(number, group, [name]).column(name))

    def read(self, start: int, stop: int) -> Iterator[Record | Reject]:
        """Yields rows start..stop-1; the row group read last is kept for the next call."""
        position = max(0, bisect_right(self._groups, start, key=itemgetter(0)) - 1)
        for first, rows, number, group in self._groups[position:]:
            begin, end = max(start, first), min(stop, first + rows)
            if first >= stop:
                break
            if begin < end:
                table = self._group(number, group).slice(begin - first, end - begin)
                yield from self._rows(table, begin)

    def _group(self, number: int, group: int) -> pa.Table:
        if self._cached is None or self._cached[0] != (number, group):
            self._cached = ((number, group), self._read_group(number, group, None))
        return self._cached[1]

    def _read_group(self, number: int, group: int, columns: list[str] | None) -> pa.Table:
        try:
            return self._files[number].read_row_group(group, columns=columns)
        except (pa.ArrowException, OSError) as error:
            path = self._paths[number]
            if not is_local(path):
                raise ValueError(
                    f"row group {group} of {path} cannot be read ({error}): the same command again "
                    f"goes on"
                ) from None
            raise ValueError(
                f"{path} is damaged in row group {group} ({error}): fetch it again"
            ) from None


def _open(path: Path) -> pq.ParquetFile:
    try:
        return parquet_file(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file ({error})") from None


def _footer(path: Path, size: int = 65_536) -> str:
    """The end of a Parquet file, which describes every column chunk, as a fingerprint."""
    with path.open("rb") as handle:
        handle.seek(max(0, path.stat().st_size - size))
        return digest(handle.read().hex())
