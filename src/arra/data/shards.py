"""Shards: the only owner of the format of a prepared dataset (docs/data-format.md).

A shard is a Parquet file; one row is one image with its text, its codes and its features. Rows
travel as one object (`Row`) until they are columns of one file, so that codes and features cannot
belong to different images; `open_dataset` then verifies that no byte has changed since.

Legend: N images, D feature width, h and w code rows and columns, K codebook size.
"""

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arra.data.grid_column import GRID, GridColumn, format_of, group_rows
from arra.data.manifest import (
    AGAIN,
    FeatureInfo,
    GridInfo,
    Manifest,
    ShardInfo,
    SplitInfo,
    TextFeatureInfo,
    TokenizerInfo,
    read_manifest,
    write_manifest,
)
from arra.data.parquet_files import parquet_file
from arra.data.text_column import (
    GROUP_ROWS,
    TEXT_FEATURE,
    TextColumn,
    text_array,
)
from arra.data.vector_column import compression_of, vector_array
from arra.files import atomic_write, is_local, place, sha256_of

__all__ = [
    "Dataset",
    "FeatureInfo",
    "GridColumn",
    "GridInfo",
    "Manifest",
    "Row",
    "ShardInfo",
    "SplitInfo",
    "TextColumn",
    "TextFeatureInfo",
    "TokenizerInfo",
    "arrow_type",
    "bad_feature",
    "open_dataset",
    "read_features",
    "read_manifest",
    "shard_name",
    "stored_name",
    "write_manifest",
    "write_shard",
]

FEATURE = "feature."
"""Prefix of feature columns."""

RESERVED = frozenset(
    "id sample image_index text image_ids grid_height grid_width view_of image".split()  # noqa: SIM905
)
"""Column names of the format; a source's own column of such a name gets the prefix `source.`."""

_ARROW_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}

_verified: set[tuple[str, int, int, str]] = set()
"""Shards whose SHA-256 this process has seen to be right: (path, bytes, mtime, sha256)."""


@dataclass(frozen=True)
class Row:
    """One image on its way into a shard.

    Attributes:
        id: unique within the split.
        sample: rows of one multi-image sample share it; else the id.
        image_index: 0, 1, … within the sample.
        text: the caption.
        codes_hw: (h, w) integer codes.
        features: name -> (D) float16.
        extra: the source's other columns.
        text_features: name -> (n, D) float16 of the caption's n tokens.
        grids: name -> uint8 (p, b), cells as `GridFormat.pack` gives them.
        views: further rows of the same picture, which follow it in the shard.
        view_of: for such a row, the id of the picture's own.
    """

    id: str
    sample: str
    image_index: int
    text: str
    codes_hw: np.ndarray
    features: Mapping[str, np.ndarray]
    extra: Mapping[str, Any] = field(default_factory=dict)
    text_features: Mapping[str, np.ndarray] = field(default_factory=dict)
    grids: Mapping[str, np.ndarray] = field(default_factory=dict)
    views: tuple["Row", ...] = ()
    view_of: str | None = None


def shard_name(split: str, number: int) -> str:
    """File name of a split's shard."""
    return f"{split}-{number:05d}.parquet"


def arrow_type(kind: type) -> pa.DataType:
    """The Arrow type of an extra column of str, int, float or bool values."""
    return _ARROW_TYPES[kind]


def stored_name(name: str) -> str:
    """The name of a source's own column in a shard."""
    taken = name in RESERVED or name.startswith((FEATURE, TEXT_FEATURE, GRID))
    return f"source.{name}" if taken else name


def bad_feature(feature_D: np.ndarray) -> str | None:
    """Why a float16 feature cannot be aligned to, or None if it can."""
    if not np.isfinite(feature_D).all():
        return "NaN or infinite"
    return None if feature_D.any() else "zero everywhere"


def write_shard(
    path: Path,
    rows: Sequence[Row],
    dims: Mapping[str, int],
    columns: Mapping[str, type],
    text_dims: Mapping[str, int] | None = None,
    with_views: bool = False,
) -> ShardInfo:
    """Writes rows as one Parquet file, aside and renamed.

    The bytes depend on nothing but the rows, the versions of pyarrow and this function.

    Args:
        path: of the file.
        rows: at least one, in order; their views follow them.
        dims: name -> D of every feature.
        columns: names and types of `Row.extra`.
        text_dims: name -> D of every text feature.
        with_views: whether the dataset has views, so that its shards have the column `view_of`.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    sink = pa.BufferOutputStream()
    written = [each for row in rows for each in (row, *row.views)]
    assert with_views or len(written) == len(rows)
    group = _rows_of_a_group(written)
    parts = [written[start : start + group] for start in range(0, len(written), group)]
    tables = (_table(part, dims, columns, text_dims or {}, with_views) for part in parts)
    first = next(tables)
    compression, level = compression_of(first.schema)
    with pq.ParquetWriter(
        sink,
        first.schema,
        version="2.6",
        compression=compression,
        compression_level=level,
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    ) as writer:
        for table in (first, *tables):
            writer.write_table(table)
    content = sink.getvalue()
    with atomic_write(path) as temporary, open(temporary, "wb") as handle:
        handle.write(content)
    digest = hashlib.sha256(content).hexdigest()
    return ShardInfo(path.name, len(written), digest, len(written) - len(rows))


def _rows_of_a_group(rows: Sequence[Row]) -> int:
    """All, but few where a row has vectors that are read one row at a time."""
    if rows[0].grids:
        sizes = [sum(grid.nbytes for grid in row.grids.values()) for row in rows]
        return group_rows(sizes, GROUP_ROWS)
    return GROUP_ROWS if rows[0].text_features else len(rows)


def _table(
    rows: Sequence[Row],
    dims: Mapping[str, int],
    columns: Mapping[str, type],
    text_dims: Mapping[str, int],
    with_views: bool,
) -> pa.Table:
    arrays: dict[str, pa.Array] = {
        "id": pa.array([row.id for row in rows], pa.string()),
        "sample": pa.array([row.sample for row in rows], pa.string()),
        "image_index": pa.array([row.image_index for row in rows], pa.int16()),
        "text": pa.array([row.text for row in rows], pa.string()),
        "image_ids": pa.array(
            [row.codes_hw.astype(np.int32).ravel() for row in rows], pa.list_(pa.int32())
        ),
        "grid_height": pa.array([row.codes_hw.shape[0] for row in rows], pa.int16()),
        "grid_width": pa.array([row.codes_hw.shape[1] for row in rows], pa.int16()),
    }
    for name, dim in dims.items():
        feature_ND = np.stack([row.features[name] for row in rows])
        assert feature_ND.shape == (len(rows), dim)
        assert feature_ND.dtype == np.float16
        flat = pa.array(feature_ND.ravel())
        arrays[FEATURE + name] = pa.FixedSizeListArray.from_arrays(flat, dim)
    for name, dim in text_dims.items():
        arrays[TEXT_FEATURE + name] = text_array([row.text_features[name] for row in rows], dim)
    for name, grid_pb in rows[0].grids.items():
        arrays[GRID + name] = vector_array([row.grids[name] for row in rows], grid_pb.shape[1])
    for name, kind in columns.items():
        arrays[stored_name(name)] = pa.array(
            [row.extra.get(name) for row in rows], arrow_type(kind)
        )
    if with_views:
        arrays["view_of"] = pa.array([row.view_of for row in rows], pa.string())
    return pa.table(arrays)


# Reading


class Dataset:
    """One split of a prepared dataset, in memory but for the features of captions and of patches.

    Attributes:
        folder, split, manifest: what was opened.
        ids, samples, texts: N strings each.
        image_index: (N) int16, position of the image within its sample.
        image_ids: N arrays of int32 codes in raster order.
        grids: (N, 2) int16, code rows and columns.
        features: name -> (N, D) float16.
        text_features: name -> the captions' features, read row by row when asked for.
        patch_features: name -> a vector for each code, read row by row when asked for.
        view_of: of each row that is a view of another, that row's id; else None.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        manifest: Manifest,
        table: pa.Table,
        wanted: Collection[str] = (),
    ) -> None:
        self.folder, self.split, self.manifest = folder, split, manifest
        self.ids: list[str] = table.column("id").to_pylist()
        self.samples: list[str] = table.column("sample").to_pylist()
        self.texts: list[str] = table.column("text").to_pylist()
        self.image_index = table.column("image_index").to_numpy().astype(np.int16)
        self.grids = np.stack(
            [table.column(name).to_numpy() for name in ("grid_height", "grid_width")], axis=1
        ).astype(np.int16)
        chunks = table.column("image_ids").chunks  # together they may be too long for one array
        self._lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in chunks])
        self._codes = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])
        self.image_ids: list[np.ndarray] = np.split(self._codes, np.cumsum(self._lengths)[:-1])
        self.features = {
            name.removeprefix(FEATURE): _fixed(table.column(name))
            for name in table.column_names
            if name.startswith(FEATURE)
        }
        self.view_of: list[str | None] = [None] * len(self.ids)
        if "view_of" in table.column_names:
            self.view_of = table.column("view_of").to_pylist()
        shards = manifest.splits[split].shards
        self.text_features = {
            name: TextColumn(folder, shards, name, info.dim)
            for name, info in manifest.text_features.items()
        }
        self.patch_features = {
            name: GridColumn(folder, shards, name, format_of(info), self.grids)
            for name, info in manifest.grids.items()
            if name in wanted
        }

    def __len__(self) -> int:
        return len(self.ids)

    def column(self, name: str) -> list[Any]:
        """The values of any column, an extra one such as `label` included.

        Raises:
            ValueError: no such column; the message lists those there are.
        """
        shards = self.manifest.splits[self.split].shards
        values: list[Any] = []
        for shard in shards:
            file = parquet_file(self.folder / shard.file)
            if name not in file.schema_arrow.names:
                there = ", ".join(file.schema_arrow.names)
                raise ValueError(f"{self.folder} has no column {name!r}; it has {there}")
            values += file.read(columns=[name]).column(name).to_pylist()
        return values

    def check(self) -> None:
        """Verifies what training counts on; ValueError names what is wrong."""
        where = f"{self.folder} split {self.split}"
        expected = self.manifest.splits[self.split].rows
        if len(self.ids) != expected:
            raise ValueError(f"{where} has {len(self.ids)} rows, its manifest says {expected}")
        if len(set(self.ids)) != len(self.ids):
            raise ValueError(f"{where} holds an id twice: prepare the data again")
        cells = self.grids.astype(np.int64).prod(axis=1)
        wrong = np.flatnonzero(cells != self._lengths)
        if wrong.size:
            row = int(wrong[0])
            height, width = self.grids[row]
            raise ValueError(
                f"{where}, id {self.ids[row]!r}: {self._lengths[row]} codes do not make a grid of "
                f"{height}x{width}: prepare the data again"
            )
        size = self.manifest.tokenizer.codebook_size
        if self._codes.size and (self._codes.min() < 0 or self._codes.max() >= size):
            raise ValueError(f"{where} has codes outside of the tokenizer's 0..{size - 1}")
        for name, value_ND in self.features.items():
            bad = np.flatnonzero(~np.isfinite(value_ND).all(axis=1) | ~value_ND.any(axis=1))
            if value_ND.shape != (len(self.ids), self.manifest.features[name].dim):
                raise ValueError(f"{where}: feature {name!r} has shape {value_ND.shape}")
            if bad.size:
                raise ValueError(
                    f"{where}, id {self.ids[int(bad[0])]!r}: feature {name!r} is "
                    f"{bad_feature(value_ND[int(bad[0])])}: prepare the data again"
                )


def _fixed(column: pa.ChunkedArray) -> np.ndarray:
    flat = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(flat).reshape(len(column), column.type.list_size)


def open_dataset(
    folder: Path | str,
    split: str = "train",
    features: Sequence[str] | None = None,
    check: bool = True,
) -> Dataset:
    """Opens one split of a prepared dataset.

    Args:
        folder: what `arra prepare --out` wrote.
        split: train, val, test, …
        features: names of the features and grids to read; None reads all, () none.
        check: verify SHA-256 (once per process and file), counts, ids, codes and features.

    Raises:
        FileNotFoundError: no manifest, or a shard is missing.
        ValueError: no such split or feature, or damage; the message names the file and the remedy.
    """
    folder = place(folder)
    manifest = read_manifest(folder)
    if split not in manifest.splits:
        raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(manifest.splits)}")
    known = manifest.aligned()
    wanted = list(known) if features is None else list(features)
    for name in wanted:
        if name not in known:
            there = ", ".join(known) or "none"
            raise ValueError(
                f"{folder} has no feature {name!r}, it has {there}: ask for one of these, or "
                f"prepare the data again with --encoder {name}=..."
            )
    columns = ["id", "sample", "image_index", "text", "image_ids", "grid_height", "grid_width"]
    columns += [FEATURE + name for name in wanted if name in manifest.features]
    columns += ["view_of"] if manifest.splits[split].views else []
    tables = [
        _read_shard(folder / shard.file, shard, columns, check)
        for shard in manifest.splits[split].shards
    ]
    dataset = Dataset(folder, split, manifest, pa.concat_tables(tables), wanted)
    if check:
        dataset.check()
    return dataset


def _read_shard(path: Path, shard: ShardInfo, columns: list[str], check: bool) -> pa.Table:
    if not path.is_file():
        raise FileNotFoundError(f"shard {path} is missing: {AGAIN}")
    try:
        if not check:
            file = parquet_file(path)
        elif is_local(path):
            _verify(path, shard)
            file = pq.ParquetFile(path)
        else:  # fetched once
            whole = path.read_bytes()
            _compare(path, hashlib.sha256(whole).hexdigest(), shard)
            file = pq.ParquetFile(pa.BufferReader(whole))
        table = file.read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"shard {path} is damaged ({error}): {AGAIN}") from None
    if table.num_rows != shard.rows:
        raise ValueError(f"shard {path} has {table.num_rows} rows, not {shard.rows}: {AGAIN}")
    return table


def _verify(path: Path, shard: ShardInfo) -> None:
    status = os.stat(path)
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns, shard.sha256)
    if key in _verified:
        return
    _compare(path, sha256_of(path), shard)
    _verified.add(key)


def _compare(path: Path, sha256: str, shard: ShardInfo) -> None:
    if sha256 != shard.sha256:
        raise ValueError(f"shard {path} is damaged (its SHA-256 is another): {AGAIN}")


def read_features(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Features name -> (N, D) float16 of one shard, for statistics."""
    table = parquet_file(path).read(columns=[FEATURE + name for name in names])
    return {name: _fixed(table.column(FEATURE + name)) for name in names}
