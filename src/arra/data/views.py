"""Which rows of a prepared split belong together: images of one sample, views of one picture.

`prepare --views` writes further rows of a picture (mirrored, cropped elsewhere), each with the
picture's caption, codes and features of its own. An epoch is one pass over the samples as they
were; which view of a sample is shown is drawn each time (loader.py).
"""

from collections.abc import Sequence

import numpy as np


def rows_by_sample(samples: Sequence[str], view_of: Sequence[str | None]) -> list[list[int]]:
    """The rows of each sample, views left out, in the order of its first row."""
    rows: dict[str, list[int]] = {}
    for row, (sample, whole) in enumerate(zip(samples, view_of, strict=True)):
        if whole is None:
            rows.setdefault(sample, []).append(row)
    return list(rows.values())


def choices_by_sample(
    ids: Sequence[str], samples: Sequence[str], view_of: Sequence[str | None]
) -> list[list[list[int]]]:
    """For each sample what may be shown: its own rows, then each view that all of them have.

    A view's name is what its id has behind the picture's, `ID#flip`.
    """
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


def common_grid(grids_N2: np.ndarray) -> tuple[int, int]:
    """Code rows and columns that most of N images have; of equals the smallest."""
    grids_G2, counts_G = np.unique(grids_N2, axis=0, return_counts=True)
    height, width = grids_G2[counts_G.argmax()]
    return int(height), int(width)
