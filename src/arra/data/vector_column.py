"""Columns whose rows are lists of vectors: how they lie in a shard, and how single rows are read.

The tokens of a caption (text_column.py) or the cells of a grid (grid_column.py). A vector is one
fixed-size binary value, and the column is not compressed: 16 captions of 34 x 2048 are read in
0.3 ms, in 2.3 ms with zstd (which saves 8 %), in 7 ms as lists of numbers.

A split is large (CLIP-L's 16 x 16 patches are 0.5 MB an image), and training wants its rows in
random order: so shards with such a column have small row groups, a row is read with its group only,
and the groups read last stay in memory, up to CACHE_BYTES.

Legend: n vectors of one row, b bytes of a vector.
"""

import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arra.data.manifest import AGAIN, ShardInfo
from arra.data.parquet_files import parquet_file

CACHE_BYTES = 2**30
"""Row groups that one column keeps in memory: small datasets are read once."""

_OPEN_FILES = 64


def vector_type(width: int) -> pa.DataType:
    """The Arrow type of a column of vectors of `width` bytes."""
    return pa.list_(pa.binary(width))


def vector_array(rows: Sequence[np.ndarray], width: int) -> pa.Array:
    """A column of rows, each uint8 (n, b)."""
    for row_nb in rows:
        assert row_nb.dtype == np.uint8
        assert row_nb.shape[1] == width
    offsets = np.cumsum([0, *(len(row_nb) for row_nb in rows)]).astype(np.int32)
    flat = np.ascontiguousarray(np.concatenate(rows))
    values = pa.Array.from_buffers(pa.binary(width), offsets[-1], [None, pa.py_buffer(flat)])
    return pa.ListArray.from_arrays(offsets, values)


def compression_of(schema: pa.Schema) -> tuple[dict[str, str], dict[str, int]]:
    """zstd and its level for every column of a shard but those of vectors."""
    compression, level = {}, {}
    for column in schema:
        nested = pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)
        path = f"{column.name}.list.element" if nested else column.name
        if nested and pa.types.is_fixed_size_binary(column.type.value_type):
            compression[path] = "NONE"
        else:
            compression[path], level[path] = "ZSTD", 3
    return compression, level


class VectorColumn:
    """One such column of one split, read when a row is asked for.

    Args:
        folder: of the dataset.
        shards: of the split, in order.
        column: its name in the shards.
        width: b.
        what: what the manifest says that a vector is, for errors.
    """

    def __init__(
        self, folder: Path, shards: Sequence[ShardInfo], column: str, width: int, what: str
    ) -> None:
        self._folder, self._shards = folder, shards
        self._column, self._width, self._what = column, width, what
        self._first = np.cumsum([0, *(shard.rows for shard in shards)])
        self._file = lru_cache(maxsize=_OPEN_FILES)(self._opened)
        self._groups: OrderedDict[tuple[int, int], list[np.ndarray]] = OrderedDict()
        self._bytes = 0
        self.cache_bytes = CACHE_BYTES
        self._one_at_a_time = threading.Lock()

    def __len__(self) -> int:
        return int(self._first[-1])

    def vectors(self, row: int) -> np.ndarray:
        """Uint8 (n, b) of row `row` of the split; not to be written to.

        Raises:
            ValueError: the shard is damaged, or the column is not what the manifest says.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        shard = int(np.searchsorted(self._first, row, side="right")) - 1
        with self._one_at_a_time:
            group, position = divmod(row - int(self._first[shard]), self._file(shard)[1])
            return self._group(shard, group)[position]

    def _group(self, shard: int, group: int) -> list[np.ndarray]:
        key = (shard, group)
        found = self._groups.get(key)
        if found is not None:
            self._groups.move_to_end(key)
            return found
        rows = self._read(shard, group)
        self._groups[key] = rows
        self._bytes += _size(rows)
        while self._bytes > self.cache_bytes and len(self._groups) > 1:
            _, dropped = self._groups.popitem(last=False)
            self._bytes -= _size(dropped)
        return rows

    def _read(self, shard: int, group: int) -> list[np.ndarray]:
        try:
            column = self._file(shard)[0].read_row_group(group, columns=[self._column]).column(0)
        except (pa.ArrowException, OSError, IndexError) as error:
            raise self._damaged(shard, error) from None
        if column.type != vector_type(self._width):
            raise ValueError(
                f"shard {self._path(shard)}: {self._column} is {column.type}, the manifest says "
                f"{self._what}: {AGAIN}"
            )
        rows = column.combine_chunks()
        flat = np.frombuffer(rows.values.buffers()[1], np.uint8).reshape(-1, self._width)
        offsets = rows.offsets.to_numpy() + rows.values.offset
        return [flat[a:b] for a, b in itertools.pairwise(offsets)]

    def _opened(self, shard: int) -> tuple[pq.ParquetFile, int]:
        """The file, and the rows of each of its groups but the last."""
        try:
            file = parquet_file(self._path(shard), memory_map=True)
            return file, int(file.metadata.row_group(0).num_rows)
        except (pa.ArrowException, OSError, IndexError) as error:
            raise self._damaged(shard, error) from None

    def _damaged(self, shard: int, error: Exception) -> ValueError:
        return ValueError(f"shard {self._path(shard)} is damaged ({error}): {AGAIN}")

    def _path(self, shard: int) -> Path:
        return self._folder / self._shards[shard].file


def _size(rows: Sequence[np.ndarray]) -> int:
    return sum(row_nb.nbytes for row_nb in rows)
