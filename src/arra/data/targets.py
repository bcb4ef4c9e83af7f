"""What the images of a split are aligned to, one interface over all that it may be: stored vectors,
stored grids of patches, and what a frozen encoder sees while training (online.py).

Legend: E images of a batch, D feature width, n codes of the image that has most of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from arra.data.manifest import FeatureInfo
from arra.data.split import Cells, Split, Vectors


class TargetValues(Protocol):
    """One target's values for the rows of one split.

    Attributes:
        info: the encoder, D, and the means.
        kind: one vector an image, or one a code.
    """

    @property
    def info(self) -> FeatureInfo: ...

    @property
    def kind(self) -> Literal["global", "patch"]: ...

    def of(self, rows: Sequence[int]) -> Tensor:
        """Float32 (E, D), or (E, n, D) in raster order of the codes: an image with fewer codes
        than n is filled up with zeros, which no position points to."""
        ...


@dataclass(frozen=True)
class StoredFeature:
    """Global features of the dataset."""

    info: FeatureInfo
    value_ND: Vectors
    kind: Literal["global"] = "global"

    def of(self, rows: Sequence[int]) -> Tensor:
        """Float32 (E, D)."""
        return torch.from_numpy(self.value_ND[list(rows)].astype(np.float32))


@dataclass(frozen=True)
class StoredGrid:
    """Grids of patches of the dataset, read row by row."""

    info: FeatureInfo
    column: Cells
    kind: Literal["patch"] = "patch"

    def of(self, rows: Sequence[int]) -> Tensor:
        """Float32 (E, n, D)."""
        return filled_up([self.column[row] for row in rows])


def stored_targets(dataset: Split) -> dict[str, TargetValues]:
    """By name, those that the dataset was opened with."""
    manifest = dataset.manifest
    features = {
        name: StoredFeature(manifest.features[name], value_ND)
        for name, value_ND in dataset.features.items()
    }
    grids = {
        name: StoredGrid(manifest.grids[name], column)
        for name, column in dataset.patch_features.items()
    }
    return {**features, **grids}


def filled_up(cells: Sequence[Tensor]) -> Tensor:
    """(h*w, D) of each image as one (E, n, D)."""
    return torch.nn.utils.rnn.pad_sequence(list(cells), batch_first=True)
