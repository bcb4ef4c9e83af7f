"""Connected components of a picture of classes, by joining the runs of neighbouring rows."""

from __future__ import annotations

import numpy as np


def label(class_HW: np.ndarray) -> tuple[np.ndarray, int]:
    """Components of equal class >= 0 that touch by side or corner: (labels, count).

    Labels run from 0; pixels of a negative class get -1. `class_HW` is an integer array.
    """
    height, width = class_HW.shape
    framed = np.full((height, width + 1), -1, np.int64)
    framed[:, :width] = class_HW
    flat = framed.ravel()
    starts = np.flatnonzero(np.diff(flat, prepend=-1) != 0)
    ends = np.append(starts[1:], flat.size)
    keep = flat[starts] >= 0
    starts, ends = starts[keep], ends[keep]
    classes, rows = flat[starts].tolist(), (starts // (width + 1)).tolist()
    first, last = (
        (starts % (width + 1)).tolist(),
        (ends - 1 - (starts // (width + 1)) * (width + 1)).tolist(),
    )
    parent = list(range(len(classes)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    above = 0  # the first run that can still touch the current one from the row above
    for run in range(len(classes)):
        while above < run and (
            rows[above] < rows[run] - 1
            or (rows[above] == rows[run] - 1 and last[above] < first[run] - 1)
        ):
            above += 1
        other = above
        while other < run and rows[other] == rows[run] - 1 and first[other] <= last[run] + 1:
            if classes[other] == classes[run]:
                parent[root(run)] = root(other)
            other += 1
    names: dict[int, int] = {}
    label_HW = np.full(class_HW.shape, -1, np.int64)
    for run in range(len(classes)):
        name = names.setdefault(root(run), len(names))
        label_HW[rows[run], first[run] : last[run] + 1] = name
    return label_HW, len(names)
