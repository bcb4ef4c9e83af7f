"""How a caption's features lie in a shard, and how single rows of many shards are read.

Only the vectors of a caption's own tokens are stored: column `text_feature.NAME` is a list of
fixed-size binary values, one per token, each D float16 (little endian), and it is not compressed:
16 captions of 34 x 2048 are read in 0.3 ms, in 2.3 ms with zstd (which saves 8 %), in 7 ms as lists
of numbers.

A split is large (120 x 2048 is 480 KB an image), and training wants its rows in random order: so
shards with such a column have row groups of GROUP_ROWS rows, a row is read with its group only, and
the groups read last stay in memory, up to CACHE_BYTES.

Legend: n tokens of one caption, D feature width, G rows of a row group.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arra.data.manifest import AGAIN, ShardInfo

TEXT_FEATURE = "text_feature."
"""Prefix of columns of caption features."""

GROUP_ROWS = 16
"""Rows of a row group in shards that have such a column: fewer cost footers (12 columns a group),
more cost reading what is not asked for."""

CACHE_BYTES = 2**30
"""Row groups that one column keeps in memory: small datasets are read once."""

_OPEN_FILES = 64


def text_type(dim: int) -> pa.DataType:
    """The Arrow type of a column of D-wide features."""
    return pa.list_(pa.binary(2 * dim))


def text_array(captions: Sequence[np.ndarray], dim: int) -> pa.Array:
    """A column of captions, each (n, D) float16."""
    for caption_nD in captions:
        assert caption_nD.dtype == np.float16
        assert caption_nD.shape[1] == dim
    offsets = np.cumsum([0, *(len(caption_nD) for caption_nD in captions)]).astype(np.int32)
    flat = np.ascontiguousarray(np.concatenate(captions), "<f2").view(np.uint8)
    values = pa.Array.from_buffers(pa.binary(2 * dim), offsets[-1], [None, pa.py_buffer(flat)])
    return pa.ListArray.from_arrays(offsets, values)


def compression_of(schema: pa.Schema) -> tuple[dict[str, str], dict[str, int]]:
    """zstd and its level for every column of a shard but those of caption features."""
    compression, level = {}, {}
    for column in schema:
        nested = pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)
        path = f"{column.name}.list.element" if nested else column.name
        if column.name.startswith(TEXT_FEATURE):
            compression[path] = "NONE"
        else:
            compression[path], level[path] = "ZSTD", 3
    return compression, level


class TextColumn:
    """The captions of one split as features, read when they are asked for.

    Args:
        folder: of the dataset.
        shards: of the split, in order.
        name: of the feature, without the prefix.
        dim: D.
    """

    def __init__(self, folder: Path, shards: Sequence[ShardInfo], name: str, dim: int) -> None:
        self.folder, self.shards, self.name, self.dim = folder, shards, name, dim
        self._first = np.cumsum([0, *(shard.rows for shard in shards)])
        self._file = lru_cache(maxsize=_OPEN_FILES)(self._opened)
        self._groups: OrderedDict[tuple[int, int], list[np.ndarray]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, row: int) -> np.ndarray:
        """The features (n, D) float16 of row `row` of the split; not to be written to."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        shard = int(np.searchsorted(self._first, row, side="right")) - 1
        group, position = divmod(row - int(self._first[shard]), GROUP_ROWS)
        return self._group(shard, group)[position]

    def _group(self, shard: int, group: int) -> list[np.ndarray]:
        key = (shard, group)
        found = self._groups.get(key)
        if found is not None:
            self._groups.move_to_end(key)
            return found
        captions = self._read(shard, group)
        self._groups[key] = captions
        self._bytes += _size(captions)
        while self._bytes > CACHE_BYTES and len(self._groups) > 1:
            _, dropped = self._groups.popitem(last=False)
            self._bytes -= _size(dropped)
        return captions

    def _read(self, shard: int, group: int) -> list[np.ndarray]:
        path = self.folder / self.shards[shard].file
        try:
            file = self._file(shard)
            column = file.read_row_group(group, columns=[TEXT_FEATURE + self.name]).column(0)
        except (pa.ArrowException, OSError, IndexError) as error:
            raise ValueError(f"shard {path} is damaged ({error}): {AGAIN}") from None
        if column.type != text_type(self.dim):
            raise ValueError(
                f"shard {path}: {TEXT_FEATURE}{self.name} is {column.type}, the manifest says "
                f"{self.dim} float16 a token: {AGAIN}"
            )
        rows = column.combine_chunks()
        flat_TD = np.frombuffer(rows.values.buffers()[1], "<f2").reshape(-1, self.dim)
        offsets = rows.offsets.to_numpy() + rows.values.offset
        return [flat_TD[a:b] for a, b in itertools.pairwise(offsets)]

    def _opened(self, shard: int) -> pq.ParquetFile:
        return pq.ParquetFile(self.folder / self.shards[shard].file, memory_map=True)


def _size(captions: Sequence[np.ndarray]) -> int:
    return sum(caption_nD.nbytes for caption_nD in captions)
