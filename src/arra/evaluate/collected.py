"""What is kept of a stream of features: a Gaussian of all of them, and a sample of the rows.

Memory is bounded whatever the number of images: a (D + 1) x (D + 1) factor a group, and at most
`keep` rows. Which rows are kept depends on the pictures' keys alone (a bottom-k sample), so neither
order nor batches change it.

Legend: N rows (one image each), D feature width, G groups.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

BLOCK = 4096
"""Rows that wait until they are folded into a factor: the larger, the fewer decompositions."""


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian fitted to rows: mean, and a factor of the covariance.

    Attributes:
        count: rows behind it; None where a published statistic does not say.
        mean_D: float64.
        factor: (r, D) float64, factor^T factor = covariance with the N - 1 divisor. No covariance
            is formed from rows: its root would lose half of the digits where it is singular.
    """

    count: int | None
    mean_D: np.ndarray
    factor: np.ndarray

    @property
    def dim(self) -> int:
        return len(self.mean_D)

    @classmethod
    def from_rows(cls, rows_ND: np.ndarray) -> "Gaussian":
        """Of at least two rows."""
        moments = Moments(rows_ND.shape[1])
        moments.add(rows_ND)
        return moments.gaussian()

    @classmethod
    def from_moments(
        cls, mean_D: np.ndarray, covariance_DD: np.ndarray, count: int | None = None
    ) -> "Gaussian":
        """Of a published mean and covariance, such as `mu` and `sigma` of an .npz.

        Raises:
            ValueError: shapes that do not fit, or a matrix that is no covariance.
        """
        mean_D = np.asarray(mean_D, np.float64)
        covariance_DD = np.asarray(covariance_DD, np.float64)
        if mean_D.ndim != 1 or covariance_DD.shape != (len(mean_D), len(mean_D)):
            raise ValueError(
                f"a mean {mean_D.shape} and a covariance {covariance_DD.shape} do not belong "
                f"together: they must be (D,) and (D, D)"
            )
        if not (np.isfinite(mean_D).all() and np.isfinite(covariance_DD).all()):
            raise ValueError("a published mean or covariance holds NaN or infinity")
        values_D, vectors_DD = np.linalg.eigh((covariance_DD + covariance_DD.T) / 2)
        if values_D[0] < -1e-5 * max(values_D[-1], 1e-300):
            raise ValueError("a published covariance has negative eigenvalues: it is none")
        factor = np.sqrt(np.clip(values_D, 0, None))[:, None] * vectors_DD.T
        return cls(count, mean_D, factor)

    def covariance(self) -> np.ndarray:
        """(D, D)."""
        return self.factor.T @ self.factor


class Moments:
    """Mean and covariance of rows that come in parts, by a QR decomposition of (1, rows).

    Its factor R is [[sqrt N, sqrt N mean], [0, F]] with F^T F the centred scatter matrix, and the
    factor of two parts is that of their factors, one above the other (Demmel et al. 2012, arXiv
    0808.2664, section 3): all rows' digits are kept, and parts can be joined.
    """

    def __init__(self, dim: int) -> None:
        self.count, self.dim = 0, dim
        self._factor = torch.zeros(0, dim + 1, dtype=torch.float64)
        self._waiting: list[torch.Tensor] = []

    def add(self, rows_ND: np.ndarray) -> None:
        """More rows, of any float type."""
        rows = torch.from_numpy(np.ascontiguousarray(rows_ND))
        self.count += len(rows)
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= BLOCK:
            self._fold()

    def gaussian(self) -> Gaussian:
        """Of all rows so far, at least two."""
        assert self.count >= 2, "one row has no covariance"
        self._fold()
        return _gaussian(self._factor, self.count)

    @staticmethod
    def joined(parts: Iterable["Moments"]) -> "Moments":
        """The moments of all rows of several."""
        parts = list(parts)
        whole = Moments(parts[0].dim)
        for part in parts:
            part._fold()
            whole.count += part.count
        whole._factor = _triangle(torch.cat([part._factor for part in parts]))
        return whole

    def _fold(self) -> None:
        if not self._waiting:
            return
        rows = torch.cat(self._waiting).double()
        ones = torch.ones(len(rows), 1, dtype=torch.float64)
        self._waiting = []
        self._factor = _triangle(torch.cat([self._factor, torch.cat([ones, rows], dim=1)]))


def _triangle(rows: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(rows, mode="r").R if len(rows) else rows


def _gaussian(factor: torch.Tensor, count: int) -> Gaussian:
    mean_D = factor[0, 1:] / factor[0, 0]
    centred = factor[1:, 1:] / (count - 1) ** 0.5
    return Gaussian(count, mean_D.numpy(), centred.numpy())


class Collected:
    """What is kept of one stream of features of a set.

    Args:
        dim: D.
        keep: rows that are kept as they are: those with the smallest keys.
        groups: parts, by key, whose Gaussians are kept apart, for a jackknife; 1 = none.
    """

    def __init__(self, dim: int, keep: int, groups: int = 1) -> None:
        self.dim, self.keep = dim, keep
        self._parts = [Moments(dim) for _ in range(groups)]
        self._rows_ND = np.empty((0, dim), np.float32)
        self._keys_N = np.empty(0, np.uint64)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._waiting_rows = 0

    @property
    def count(self) -> int:
        """All rows that came."""
        return sum(part.count for part in self._parts)

    def add(self, rows_ND: np.ndarray, keys_N: np.ndarray) -> None:
        """More rows with their pictures' keys.

        Raises:
            ValueError: features that are not finite.
        """
        if not np.isfinite(rows_ND).all():
            raise ValueError(
                "features hold NaN or infinity: compute them in float32 and check them"
            )
        rows_ND = np.ascontiguousarray(rows_ND, np.float32)
        keys_N = np.asarray(keys_N, np.uint64)
        if len(self._parts) == 1:
            self._parts[0].add(rows_ND)
        else:
            # The low bits choose the rows that are kept, so the group is taken from others.
            group_N = (keys_N >> np.uint64(8)) % np.uint64(len(self._parts))
            for group in np.unique(group_N):
                self._parts[int(group)].add(rows_ND[group_N == group])
        if self.keep:
            self._waiting.append((rows_ND, keys_N))
            self._waiting_rows += len(rows_ND)
            if self._waiting_rows >= max(BLOCK, self.keep // 4):
                self._select()

    def gaussian(self) -> Gaussian:
        """Of all rows."""
        return self._whole().gaussian()

    def without_each_group(self) -> list[Gaussian]:
        """G Gaussians, each of all rows but one group's."""
        return [
            Moments.joined(self._parts[:left] + self._parts[left + 1 :]).gaussian()
            for left in range(len(self._parts))
            if self._parts[left].count
        ]

    @property
    def rows_ND(self) -> np.ndarray:
        """Float32 rows with the smallest keys, by rising key."""
        self._select()
        return self._rows_ND

    @property
    def keys_N(self) -> np.ndarray:
        """Their keys, uint64."""
        self._select()
        return self._keys_N

    def _whole(self) -> Moments:
        return self._parts[0] if len(self._parts) == 1 else Moments.joined(self._parts)

    def _select(self) -> None:
        if not self._waiting:
            return
        rows = np.concatenate([self._rows_ND, *(rows for rows, _ in self._waiting)])
        keys = np.concatenate([self._keys_N, *(keys for _, keys in self._waiting)])
        self._waiting, self._waiting_rows = [], 0
        # Equal keys are equal pictures: their features agree, so their order does not matter.
        first = np.argsort(keys, kind="stable")[: self.keep]
        self._rows_ND, self._keys_N = rows[first], keys[first]


def keys_of_rows(rows_ND: np.ndarray) -> np.ndarray:
    """Keys (N,) uint64 for features whose pictures are not at hand: a hash of each row."""
    import hashlib

    rows = np.ascontiguousarray(rows_ND, np.float32)
    return np.array(
        [int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:8], "little") for row in rows],
        np.uint64,
    )
