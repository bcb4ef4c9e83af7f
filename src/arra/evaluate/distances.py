"""Distances between two sets of features: Fréchet and kernel, in float64.

Legend: N, M rows (one image each) of the two sets, D feature width.

The names FID and KID belong to the features of one Inception network; here the features are those
of an encoder that the caller names, so the values are called `fd@<encoder>` and `kid@<encoder>`
(see protocol.py). Neither is comparable with a published FID.
"""

import warnings
from typing import NamedTuple

import numpy as np


class KernelDistance(NamedTuple):
    """Mean and standard deviation of the squared kernel distance over random subsets."""

    mean: float
    std: float


def rank_deficient(count_a: int, count_b: int, dim: int) -> bool:
    """True where a sample covariance cannot have full rank, which takes dim + 1 rows."""
    return min(count_a, count_b) <= dim


def frechet(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians fitted to (N, D) and (M, D) features.

    |mu_a - mu_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2   (Dowson and Landau 1982; FID:
    Heusel et al. 2017, arXiv 1706.08500, eq. 6), covariances with the N - 1 divisor.

    The last trace is the sum of the singular values of R_a R_b^T for any factors R^T R of A and B.
    Factors from a QR decomposition of the centred rows avoid forming a covariance and taking its
    root, which costs half of the digits exactly where a covariance is singular.

    With no more rows than columns the value is still exact for the samples, but it is biased
    upwards and moves with N: a UserWarning says so (`rank_deficient` is the test).
    Raises ValueError for fewer than two rows, unequal widths or values that are not finite.
    """
    rows_a_ND, rows_b_MD = _checked(features_a, features_b)
    if rank_deficient(len(rows_a_ND), len(rows_b_MD), rows_a_ND.shape[1]):
        warnings.warn(
            f"Fréchet distance of {len(rows_a_ND)} and {len(rows_b_MD)} rows in "
            f"{rows_a_ND.shape[1]} dimensions: the covariance is rank deficient; compare only with "
            "values at the same numbers of rows.",
            UserWarning,
            stacklevel=2,
        )
    mean_a_D, factor_a = _gaussian(rows_a_ND)
    mean_b_D, factor_b = _gaussian(rows_b_MD)
    cross_trace = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    value = ((mean_a_D - mean_b_D) ** 2).sum() + (factor_a**2).sum() + (factor_b**2).sum()
    return max(float(value - 2.0 * cross_trace), 0.0)


def kernel_distance(
    features_a: np.ndarray,
    features_b: np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> KernelDistance:
    """Squared kernel distance of (N, D) and (M, D) features: (mean, std) over random subsets.

    The unbiased estimate of MMD^2 (Gretton et al. 2012, lemma 6) with the cubic kernel
    (x.y / D + 1)^3 of KID (Binkowski et al. 2018, arXiv 1801.01401, section 4). Unbiased means that
    a value may be slightly negative. Subsets are drawn without replacement from each set.
    Raises ValueError where a set has fewer rows than `subset_size`.
    """
    rows_a_ND, rows_b_MD = _checked(features_a, features_b)
    fewest = min(len(rows_a_ND), len(rows_b_MD))
    if not 2 <= subset_size <= fewest:
        raise ValueError(
            f"A kernel distance over subsets of {subset_size} needs that many images in both sets, "
            f"and at least 2; the smaller set has {fewest}. Give more images or a smaller subset."
        )
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        a_SD = rows_a_ND[generator.choice(len(rows_a_ND), subset_size, replace=False)]
        b_SD = rows_b_MD[generator.choice(len(rows_b_MD), subset_size, replace=False)]
        values.append(_mmd2(a_SD, b_SD))
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def _mmd2(a_SD: np.ndarray, b_SD: np.ndarray) -> float:
    size, dim = a_SD.shape

    def kernel(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return (left @ right.T / dim + 1.0) ** 3

    within = 0.0
    for rows in (a_SD, b_SD):
        gram = kernel(rows, rows)
        within += (gram.sum() - np.trace(gram)) / (size * (size - 1))
    return within - 2.0 * float(kernel(a_SD, b_SD).mean())


def _gaussian(rows_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and a factor R (min(N, D), D) with R^T R the sample covariance."""
    mean_D = rows_ND.mean(axis=0)
    centred_ND = (rows_ND - mean_D) / np.sqrt(len(rows_ND) - 1)
    return mean_D, np.asarray(np.linalg.qr(centred_ND, mode="r"))


def _checked(features_a: np.ndarray, features_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a = np.asarray(features_a, dtype=np.float64)
    b = np.asarray(features_b, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"Distances need two (rows, D) arrays of one encoder; got {a.shape} and {b.shape}."
        )
    if min(len(a), len(b)) < 2:
        raise ValueError(
            f"A distance needs at least 2 images in each set; got {len(a)} and {len(b)}."
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("Features hold NaN or infinity; recompute them in float32 and check them.")
    return a, b
