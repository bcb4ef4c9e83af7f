"""What is kept of a stream of features: a Gaussian of all of them, and a sample of the rows.

Memory is bounded whatever the number of images: a (D, D) matrix, and at most `keep` rows. Which
rows are kept depends on the pictures' keys alone (a bottom-k sample), so neither order nor batches
change it.

Legend: N rows (one image each), D feature width, r rank.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

BLOCK = 4096
"""Rows that are added to the moments at once: small products are slow."""


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian fitted to rows: mean, and a factor of the covariance.

    Attributes:
        count: rows behind it; None where a published statistic does not say.
        mean_D: float64.
        factor: (r, D) float64 with r <= D, factor^T factor = covariance with the N - 1 divisor; the
            rows are eigenvectors of the covariance on the roots of their eigenvalues, rising.
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
        values_D, vectors_DD = _eigen(torch.from_numpy((covariance_DD + covariance_DD.T) / 2))
        if values_D[0] < -1e-5 * max(float(values_D[-1]), 1e-300):
            raise ValueError("a published covariance has negative eigenvalues: it is none")
        return cls(count, mean_D, _factor(values_D, vectors_DD))

    def covariance(self) -> np.ndarray:
        """(D, D)."""
        return self.factor.T @ self.factor


def _eigen(matrix_DD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.linalg.eigh(matrix_DD)


def _factor(values_D: torch.Tensor, vectors_DD: torch.Tensor) -> np.ndarray:
    """Eigenvalues that rounding cannot tell from zero become zero and are left out.

    Their roots would be 1e-8 of the largest, no rounding error at all: a distance between singular
    covariances would then depend on the order of the rows.
    """
    floor = len(values_D) * np.finfo(np.float64).eps * max(float(values_D[-1]), 0.0)
    known = values_D > floor
    return (values_D[known].sqrt()[:, None] * vectors_DD[:, known].T).numpy()


class Moments:
    """Mean and covariance of rows that come in parts.

    Products are of rows less the mean of the first part, so that a mean far from zero does not take
    the covariance's digits (Chan, Golub and LeVeque 1983, section 3).
    """

    def __init__(self, dim: int) -> None:
        self.count, self.dim = 0, dim
        self._shift_D = np.zeros(dim)
        self._sum_D = np.zeros(dim)
        self._products_DD = np.zeros((dim, dim))
        self._waiting: list[np.ndarray] = []
        self._folded = 0

    def add(self, rows_ND: np.ndarray) -> None:
        """More rows, of any float type."""
        self.count += len(rows_ND)
        self._waiting.append(rows_ND)
        if self.count - self._folded >= BLOCK:
            self._fold()

    def gaussian(self) -> Gaussian:
        """Of all rows so far, at least two."""
        assert self.count >= 2, "one row has no covariance"
        self._fold()
        mean_D = self._sum_D / self.count
        scatter_DD = self._products_DD - np.outer(mean_D, self._sum_D)
        factor = _factor(*_eigen(torch.from_numpy(scatter_DD / (self.count - 1))))
        # Fewer rows than columns: rounding must not raise the rank.
        return Gaussian(self.count, mean_D + self._shift_D, factor[-(self.count - 1) :])

    def _fold(self) -> None:
        if not self._waiting:
            return
        rows_ND = np.concatenate(self._waiting)
        self._waiting = []
        for start in range(0, len(rows_ND), BLOCK):
            part_BD = rows_ND[start : start + BLOCK].astype(np.float64)
            if self._folded == 0:
                self._shift_D = part_BD.mean(axis=0)
            part_BD -= self._shift_D
            self._folded += len(part_BD)
            self._sum_D += part_BD.sum(axis=0)
            # A matrix by its own transpose: numpy computes one half and mirrors it.
            self._products_DD += part_BD.T @ part_BD


class Collected:
    """What is kept of one stream of features of a set.

    Args:
        dim: D.
        keep: rows that are kept as they are: those with the smallest keys.
    """

    def __init__(self, dim: int, keep: int) -> None:
        self.dim, self.keep = dim, keep
        self._moments = Moments(dim)
        self._rows_ND = np.empty((0, dim), np.float32)
        self._keys_N = np.empty(0, np.uint64)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._waiting_rows = 0

    @property
    def count(self) -> int:
        """All rows that came."""
        return self._moments.count

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
        self._moments.add(rows_ND)
        if self.keep:
            self._waiting.append((rows_ND, keys_N))
            self._waiting_rows += len(rows_ND)
            if self._waiting_rows >= max(BLOCK, self.keep // 4):
                self._select()

    def gaussian(self) -> Gaussian:
        """Of all rows."""
        return self._moments.gaussian()

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
    rows = np.ascontiguousarray(rows_ND, np.float32)
    return np.array(
        [int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:8], "little") for row in rows],
        np.uint64,
    )
