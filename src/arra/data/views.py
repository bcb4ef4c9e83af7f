"""Which rows of a prepared split belong together: images of one sample, views of one picture.

`prepare --views` writes further rows of a picture (mirrored, cropped elsewhere), each with the
picture's caption, codes and features of its own. An epoch is one pass over the samples as they
were; which view of a sample is shown is drawn each time (loader.py).
"""

from collections.abc import Sequence
from typing import overload

import numpy as np


def rows_by_sample(samples: Sequence[str], view_of: Sequence[str | None]) -> list[list[int]]:
    """The rows of each sample, views left out, in the order of its first row."""
    rows: dict[str, list[int]] = {}
    for row, (sample, whole) in enumerate(zip(samples, view_of, strict=True)):
        if whole is None:
            rows.setdefault(sample, []).append(row)
    return list(rows.values())


class EachAlone(Sequence[list[list[int]]]):
    """The choices of a split in which every row is a sample of its own, without views: [[row]]."""

    def __init__(self, rows: range) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> list[list[int]]: ...

    @overload
    def __getitem__(self, index: slice) -> "EachAlone": ...

    def __getitem__(self, index: int | slice) -> "list[list[int]] | EachAlone":
        if isinstance(index, slice):
            return EachAlone(self._rows[index])
        return [[self._rows[index]]]


def choices_by_sample(
    ids: Sequence[str], samples: Sequence[str], view_of: Sequence[str | None]
) -> Sequence[list[list[int]]]:
    """For each sample what may be shown: its own rows, then each view that all of them have.

    A view's name is what its id has behind the picture's, `ID#flip`.
    """
    if len(set(samples)) == len(samples) and not any(view_of):
        return EachAlone(range(len(samples)))
    views: dict[tuple[str, str], int] = {}
    names: dict[str, list[str]] = {}
    for row, (id_, whole) in enumerate(zip(ids, view_of, strict=True)):
        if whole is not None:
            name = id_.removeprefix(whole)
            views[whole, name] = row
            names.setdefault(whole, []).append(name)
    choices = []
    for own in rows_by_sample(samples, view_of):
        shared = [
            name
            for name in names.get(ids[own[0]], ())
            if all((ids[row], name) in views for row in own)
        ]
        choices.append([own, *([views[ids[row], name] for row in own] for name in shared)])
    return choices


def grids_among(grids_N2: np.ndarray) -> set[tuple[int, int]]:
    """The different (code rows, code columns) of N images."""
    sides_N2 = grids_N2.astype(np.int64)
    return {divmod(int(both), 2**16) for both in np.unique(sides_N2[:, 0] * 2**16 + sides_N2[:, 1])}


def common_grid(grids_N2: np.ndarray) -> tuple[int, int]:
    """Code rows and columns that most of N images have; of equals the smallest."""
    grids_G2, counts_G = np.unique(grids_N2, axis=0, return_counts=True)
    height, width = grids_G2[counts_G.argmax()]
    return int(height), int(width)
