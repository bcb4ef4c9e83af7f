"""One shard: a Parquet file whose rows are images with their text, codes and features.

Rows travel as one object (`Row`) until they are columns of one file, so that codes and features
cannot belong to different images. The format is described in docs/data-format.md; shards.py reads
it.

Legend: N images, D feature width, h and w code rows and columns.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arra.data.grid_column import GRID, group_rows
from arra.data.manifest import ShardInfo
from arra.data.text_column import GROUP_ROWS, TEXT_FEATURE, text_array
from arra.data.vector_column import compression_of, vector_array
from arra.files import atomic_write

FEATURE = "feature."
"""Prefix of feature columns."""

RESERVED = frozenset(
    "id sample image_index text image_ids grid_height grid_width view_of image".split()  # noqa: SIM905
)
"""Column names of the format; a source's own column of such a name gets the prefix `source.`."""

_ARROW_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


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
