"""How an encoder's grid of patch features lies in a shard, and how it meets the grid of codes.

Column `grid.NAME`, one vector a cell, in raster order. What is stored is never finer than the codes
of the same image: an encoder's grid with more rows (or columns) than there are codes is averaged
over the area of each code before it is stored; one with fewer is stored as it is, and interpolated
when it is read. So training gets one vector a code, and no byte is spent on what it cannot use.

A vector is D float16, or a float32 scale and D int8: value = scale * integer, scale = largest
magnitude of the vector / 127, so no value is off by more than half a scale.

Legend: N images, g x k the encoder's own grid, h x w the codes', p stored cells, D feature width,
b bytes of a stored cell.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from arra.data.manifest import AGAIN, GridInfo, ShardInfo
from arra.data.vector_column import VectorColumn, vector_type

GRID = "grid."
"""Prefix of columns of patch features."""

GRID_DTYPES = ("float16", "int8")

_SCALE_BYTES = 4
_GROUP_BYTES = 2**20


@dataclass(frozen=True)
class GridFormat:
    """What a cell of one encoder's grid is.

    Attributes:
        dim: D.
        grid: (g, k), the encoder's own rows and columns.
        dtype: one of GRID_DTYPES.
    """

    dim: int
    grid: tuple[int, int]
    dtype: str

    @property
    def width(self) -> int:
        """b."""
        return 2 * self.dim if self.dtype == "float16" else _SCALE_BYTES + self.dim

    @property
    def type(self) -> pa.DataType:
        """The column's Arrow type."""
        return vector_type(self.width)

    def stored_shape(self, codes: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns that are stored of an image of `codes` = (h, w) codes."""
        return min(self.grid[0], codes[0]), min(self.grid[1], codes[1])

    def pack(self, cells_pD: np.ndarray) -> np.ndarray:
        """Float32 vectors, not `bad_cells`, as they are stored: uint8 (p, b)."""
        if self.dtype == "float16":
            return np.ascontiguousarray(cells_pD, "<f2").view(np.uint8)
        scale_p1 = (np.abs(cells_pD).max(axis=1, keepdims=True) / 127).astype("<f4")
        whole_pD = np.clip(np.rint(cells_pD / scale_p1), -127, 127).astype(np.int8)
        return np.concatenate([scale_p1.view(np.uint8), whole_pD.view(np.uint8)], axis=1)

    def unpack(self, stored_pb: np.ndarray) -> np.ndarray:
        """The inverse: float32 (p, D)."""
        if self.dtype == "float16":
            return stored_pb.view("<f2").astype(np.float32)
        scale_p1 = np.ascontiguousarray(stored_pb[:, :_SCALE_BYTES]).view("<f4")
        return scale_p1 * stored_pb[:, _SCALE_BYTES:].view(np.int8)


def format_of(info: GridInfo) -> GridFormat:
    """The format that a manifest says."""
    return GridFormat(info.dim, (info.grid[0], info.grid[1]), info.stored)


def coarsened(patches_NPD: Tensor, own: tuple[int, int], codes: tuple[int, int]) -> Tensor:
    """(N, g*k, D) of an encoder to (N, p, D), no finer than `codes` = (h, w)."""
    return resampled(patches_NPD, own, (min(own[0], codes[0]), min(own[1], codes[1])))


def resampled(cells_NPD: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Grids of one shape at another: averaged over areas where `to` is coarser, else bilinear."""
    if grid == to:
        return cells_NPD
    rows, columns = (_weights(a, b).to(cells_NPD) for a, b in zip(grid, to, strict=True))
    cells_NhkD = torch.einsum("hg,ngkd->nhkd", rows, cells_NPD.unflatten(1, grid))
    return torch.einsum("wk,nhkd->nhwd", columns, cells_NhkD).flatten(1, 2)


@lru_cache(maxsize=256)
def _weights(cells: int, to: int) -> Tensor:
    """(to, cells): how much of each old cell is in each new one of an axis; rows sum to 1."""
    if to < cells:
        edge = torch.arange(to + 1, dtype=torch.float64) * cells / to
        old = torch.arange(cells)
        upper = torch.minimum(edge[1:, None], old + 1.0)
        overlap = (upper - torch.maximum(edge[:-1, None], old.double())).clamp(min=0)
        return (overlap * to / cells).float()
    place = ((torch.arange(to, dtype=torch.float64) + 0.5) * cells / to - 0.5).clamp(0, cells - 1)
    return (1 - (place[:, None] - torch.arange(cells)).abs()).clamp(min=0).float()


def bad_cells(cells_pD: np.ndarray) -> str | None:
    """Why a grid cannot be aligned to, or None if it can."""
    with np.errstate(over="ignore"):
        half_pD = cells_pD.astype(np.float16)
    if not np.isfinite(half_pD).all():
        return "NaN or infinite"
    zero = np.flatnonzero(~half_pD.any(axis=1))
    return f"zero everywhere in cell {zero[0]}" if zero.size else None


def group_rows(grids: Sequence[int], most: int) -> int:
    """Rows of a row group: about a megabyte of grids, so that reading one row reads little else.

    Args:
        grids: bytes of the grids of each row.
        most: the limit.
    """
    return max(1, min(most, _GROUP_BYTES // max(*grids, 1)))


class GridColumn(VectorColumn):
    """The grids of one split, read when they are asked for.

    Args:
        folder: of the dataset.
        shards: of the split, in order.
        name: of the feature, without the prefix.
        form: what a cell is.
        codes: (N, 2), code rows and columns of each image.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[ShardInfo],
        name: str,
        form: GridFormat,
        codes: np.ndarray,
    ) -> None:
        self.name, self.form, self._codes = name, form, codes
        what = f"{form.dim} {form.dtype} a cell"
        super().__init__(folder, shards, GRID + name, form.width, what)

    @property
    def dim(self) -> int:
        """D."""
        return self.form.dim

    def __getitem__(self, row: int) -> Tensor:
        """(h*w, D) float32: a vector for each code of row `row` of the split.

        Raises:
            ValueError: the shard is damaged.
        """
        height, width = (int(side) for side in self._codes[row])
        shape = self.form.stored_shape((height, width))
        stored_pb = self.vectors(row)
        if len(stored_pb) != shape[0] * shape[1]:
            raise ValueError(
                f"{self._folder}, row {row}: {GRID}{self.name} has {len(stored_pb)} cells, not "
                f"{shape[0]} x {shape[1]}: {AGAIN}"
            )
        cells_pD = torch.from_numpy(self.form.unpack(stored_pb))
        return resampled(cells_pD[None], shape, (height, width))[0]
