"""How a caption's features lie in a shard: column `text_feature.NAME`.

Only the vectors of a caption's own tokens are stored, each D float16 (little endian).

Legend: n tokens of one caption, D feature width.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from arra.data.manifest import ShardInfo
from arra.data.vector_column import VectorColumn, vector_array, vector_type

TEXT_FEATURE = "text_feature."
"""Prefix of columns of caption features."""

GROUP_ROWS = 16
"""Rows of a row group in shards that have such a column: fewer cost footers (12 columns a group),
more cost reading what is not asked for."""


def text_type(dim: int) -> pa.DataType:
    """The Arrow type of a column of D-wide features."""
    return vector_type(2 * dim)


def text_array(captions: Sequence[np.ndarray], dim: int) -> pa.Array:
    """A column of captions, each (n, D) float16."""
    for caption_nD in captions:
        assert caption_nD.dtype == np.float16
    rows = [np.ascontiguousarray(caption_nD, "<f2").view(np.uint8) for caption_nD in captions]
    return vector_array(rows, 2 * dim)


class TextColumn(VectorColumn):
    """The captions of one split as features, read when they are asked for.

    Args:
        folder: of the dataset.
        shards: of the split, in order.
        name: of the feature, without the prefix.
        dim: D.
    """

    def __init__(self, folder: Path, shards: Sequence[ShardInfo], name: str, dim: int) -> None:
        self.name, self.dim = name, dim
        super().__init__(folder, shards, TEXT_FEATURE + name, 2 * dim, f"{dim} float16 a token")

    def __getitem__(self, row: int) -> np.ndarray:
        """The features (n, D) float16 of row `row` of the split; not to be written to."""
        return self.vectors(row).view("<f2")
