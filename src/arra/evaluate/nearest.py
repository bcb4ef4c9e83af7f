"""The nearest row of a set that is streamed past: exact, in memory of the queries alone.

Legend: Q queries, T rows of a block, D feature width.
"""

import numpy as np
import torch

BLOCK = 1024
ROUNDING = 1e-12
"""Of a row's squared norm: far above what a float64 distance rounds to, far below any difference of
pictures."""


class Nearest:
    """Euclidean distances of queries to their nearest row so far.

    Args:
        queries_QD: float32.

    Attributes:
        distance_Q: float64; infinite before the first row, 0 for a copy.
        number_Q: int64, of the nearest row, as it was numbered; -1 before the first row. Of rows
            that are equally near it is the one with the smallest key.
    """

    def __init__(self, queries_QD: np.ndarray) -> None:
        count = len(queries_QD)
        self._rows_QD = torch.from_numpy(np.ascontiguousarray(queries_QD, np.float32))
        # Distances are differences of squares: these are small when rows are centred.
        self._centre_D = self._rows_QD.double().mean(dim=0)
        self._square_Q = torch.full((count,), torch.inf, dtype=torch.float64)
        self._key_Q = np.full(count, np.iinfo(np.uint64).max, np.uint64)
        self.number_Q = np.full(count, -1, np.int64)
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, rows_TD: np.ndarray, number_T: np.ndarray, key_T: np.ndarray) -> None:
        """Compares with some rows, sooner or later."""
        self._waiting.append((rows_TD, number_T, key_T))
        if sum(len(rows) for rows, _, _ in self._waiting) >= BLOCK:
            self._compare()

    @property
    def distance_Q(self) -> np.ndarray:
        """See the class."""
        self._compare()
        return self._square_Q.sqrt().numpy()

    def _compare(self) -> None:
        if not self._waiting:
            return
        rows_TD, number_T, key_T = map(np.concatenate, zip(*self._waiting, strict=True))
        self._waiting.clear()
        order_T = np.argsort(key_T, kind="stable")  # the first of equal ones has the smallest key
        number_T, key_T = number_T[order_T], key_T[order_T]
        others_TD = torch.from_numpy(rows_TD[order_T]).double() - self._centre_D
        norm_T = (others_TD**2).sum(dim=1)
        for start in range(0, len(self._rows_QD), BLOCK):
            part = slice(start, start + BLOCK)
            own_bD = self._rows_QD[part].double() - self._centre_D
            norm_b = (own_bD**2).sum(dim=1)
            square_bT = norm_b[:, None] + norm_T - 2 * own_bD @ others_TD.T
            square_b, at_b = square_bT.min(dim=1)
            square_b[square_b <= ROUNDING * norm_b] = 0.0
            nearest_b = at_b.numpy()
            tied_b = (square_b == self._square_Q[part]).numpy()
            nearer_b = (square_b < self._square_Q[part]).numpy()
            nearer_b |= tied_b & (key_T[nearest_b] < self._key_Q[part])
            where = start + np.flatnonzero(nearer_b)
            self._square_Q[where] = square_b[torch.from_numpy(nearer_b)]
            self.number_Q[where] = number_T[nearest_b[nearer_b]]
            self._key_Q[where] = key_T[nearest_b[nearer_b]]
