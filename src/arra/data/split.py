"""What the loader asks of a split of a prepared dataset: in memory (shards.py) or streamed
(stream.py).

Legend: N rows, D feature width, n codes, cells or tokens of one image.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from arra.data.manifest import Manifest
from arra.data.order import Order

if TYPE_CHECKING:
    from arra.data.shards import Dataset


class Vectors(Protocol):
    """One vector an image, by row numbers."""

    def __getitem__(self, rows: Sequence[int], /) -> np.ndarray:
        """(E, D) float16 of E rows."""
        ...


class Cells(Protocol):
    """A vector for each code of an image, by row number."""

    def __getitem__(self, row: int, /) -> Tensor:
        """(n, D) float32."""
        ...


class Captions(Protocol):
    """A caption as a text encoder's vectors, by row number."""

    name: str
    dim: int

    def __getitem__(self, row: int, /) -> np.ndarray:
        """(n, D) float16."""
        ...


class Texts(Protocol):
    """A column of strings, by row number."""

    def __getitem__(self, row: int, /) -> str: ...


class Split(Protocol):
    """Rows by their number within the split, 0 .. N-1, wherever they lie.

    Attributes:
        folder, split, manifest: what was opened.
        ids, texts: strings of each row.
        features: name -> global features.
        patch_features: name -> a vector for each code.
        text_features: name -> features of captions.
    """

    folder: Path
    split: str
    manifest: Manifest

    @property
    def ids(self) -> Texts: ...

    @property
    def texts(self) -> Texts: ...

    @property
    def features(self) -> Mapping[str, Vectors]: ...

    @property
    def patch_features(self) -> Mapping[str, Cells]: ...

    @property
    def text_features(self) -> Mapping[str, Captions]: ...

    @property
    def first(self) -> "Dataset":
        """Rows in memory that stand for all: the split itself, or a stream's first shard. A text
        tokenizer is fitted on their captions, and their grid is the usual one."""
        ...

    def __len__(self) -> int: ...

    def texts_of(self, rows: Sequence[int]) -> list[str]:
        """The captions of some rows."""
        ...

    def codes(self, rows: Sequence[int]) -> np.ndarray:
        """The codes of some rows in raster order, one image after the other."""
        ...

    def grids_of(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Code rows and columns of some rows."""
        ...

    def close(self) -> None:
        """Ends what is read in the background."""
        ...

    def order(self, seed: int, batch_size: int) -> Order:
        """In which order training sees its samples."""
        ...
