"""Distances between two sets of features: Fréchet and kernel, in float64.

Legend: N, M rows (one image each) of the two sets, D feature width, S rows of a subset.

The names FID and KID belong to the features of one Inception network; here the features are those
of an extractor that the caller names, so the values are called `fd@NAME` and `kid@NAME` (see
protocol.py), and FID is `fd@inception`.
"""

import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from arra.evaluate.collected import Gaussian
from arra.evaluate.finding import Finding

FEWEST = 50
"""Rows from which a Fréchet distance's interval is estimated at least."""
POINTS = 8
"""Sizes of subsets that fd_infinity goes through, the first a quarter of the images."""


class KernelDistance(NamedTuple):
    """Mean and standard deviation of the squared kernel distance over random subsets."""

    mean: float
    std: float


def rank_deficient(count_a: int, count_b: int, dim: int) -> bool:
    """True where a sample covariance cannot have full rank, which takes dim + 1 rows."""
    return min(count_a, count_b) <= dim


def frechet(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians fitted to (N, D) and (M, D) features.

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
    return between(Gaussian.from_rows(rows_a_ND), Gaussian.from_rows(rows_b_MD))


def between(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance of two Gaussians of one width.

    |mu_a - mu_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2   (Dowson and Landau 1982; FID:
    Heusel et al. 2017, arXiv 1706.08500, eq. 6), covariances with the N - 1 divisor.

    The last trace is the sum of the singular values of R_a R_b^T for any factors R^T R of A and B,
    so that no root of a product is taken, which would cost half of the digits exactly where it is
    singular.
    """
    product = torch.from_numpy(a.factor) @ torch.from_numpy(b.factor).T
    cross_trace = float(torch.linalg.svdvals(product).sum())
    value = ((a.mean_D - b.mean_D) ** 2).sum() + (a.factor**2).sum() + (b.factor**2).sum()
    return max(float(value) - 2.0 * cross_trace, 0.0)


def frechet_distance(real: Gaussian, generated: Gaussian, rows_MD: np.ndarray) -> Finding:
    """The Fréchet distance of a set to a reference, with its interval.

    The interval is of the delta method (the infinitesimal jackknife: Efron 1982, chapter 6): the
    distance's derivative in the direction of each picture, whose spread over pictures is estimated
    from `rows_MD`, a random sample of the generated set's rows. It covers the draw of the generated
    images; the reference is held fixed, and the bias of a small number of images stays.
    Null with fewer than two images; a reason for caution, and no interval, where a covariance is
    singular.
    """
    count = generated.count
    assert count is not None
    found = Finding(between(real, generated), count)
    known = count if real.count is None else real.count
    if rank_deficient(known, count, generated.dim):
        reason = (
            f"rank deficient: {known} and {count} images for {generated.dim} dimensions; compare "
            f"only at equal numbers of images"
        )
        found = replace(found, reason=reason)
    if found.reason is not None or len(rows_MD) < FEWEST:
        return found
    if not _spans(generated, real):
        reason = (
            "no interval: the real images vary in directions in which the generated ones do not"
        )
        return replace(found, reason=reason)
    assert found.value is not None
    reach = 1.96 * float(np.std(_influence(real, generated, rows_MD), ddof=1)) / count**0.5
    method = "delta method over generated images, reference fixed"
    return replace(
        found, low=max(found.value - reach, 0.0), high=found.value + reach, method=method
    )


def _spans(one: Gaussian, other: Gaussian) -> bool:
    """Whether the other varies in no direction in which the first does not."""
    directions = one.factor / np.linalg.norm(one.factor, axis=1, keepdims=True)
    whole = float((other.factor**2).sum())
    return whole - float(((other.factor @ directions.T) ** 2).sum()) <= 1e-9 * whole


def _influence(real: Gaussian, generated: Gaussian, rows_MD: np.ndarray) -> np.ndarray:
    """The derivative (M,) of the distance in the direction of each row, up to a constant.

    For the generated mean m and covariance B = R^T R, the reference's mu and A, and a row x:

        2 (m - mu).(x - m) + |x - m|^2 - (x - m)^T T (x - m),   T = R^-1 (R A R^T)^1/2 R^-T,

    as the derivative of tr (A^1/2 B A^1/2)^1/2 in B is T / 2.
    """
    factor = torch.from_numpy(generated.factor)
    product = torch.from_numpy(real.factor) @ factor.T
    squares_D, vectors_DD = torch.linalg.eigh(product.T @ product)  # of R A R^T
    roots_DD = vectors_DD * squares_D.clamp(min=0.0) ** 0.25
    # The rows of R are orthogonal: R^-1 is its transpose over their squared lengths.
    inverse_DD = factor.T / (factor**2).sum(dim=1)
    half_DD = (inverse_DD @ roots_DD).float()  # T = half half^T
    apart_MD = torch.from_numpy(rows_MD - generated.mean_D.astype(np.float32)).float()
    towards_M = 2.0 * apart_MD @ torch.from_numpy(generated.mean_D - real.mean_D).float()
    grown_M = (apart_MD**2).sum(dim=1) - ((apart_MD @ half_DD) ** 2).sum(dim=1)
    return (towards_M + grown_M).double().numpy()


def fd_infinity(real: Gaussian, generated_MD: np.ndarray, *, seed: int = 0) -> Finding:
    """What the Fréchet distance tends to for ever more generated images.

    Chong and Forsyth 2020 (arXiv 1911.07023, section 4.1): the distance's bias falls as 1/N, so a
    line through the distances of random subsets against 1/N is read at 0. Subsets have a quarter
    of the images up to all; rows come in the order of their pictures' keys. The reference's own
    number of images still counts. `details["curve"]` holds [1/N, distance] of each subset.
    Null where a quarter of the images is no more than the features' width.
    """
    count, dim = generated_MD.shape
    if count // 4 <= dim:
        reason = f"needs more than {4 * dim} images, four times the {dim} dimensions; has {count}"
        return Finding(None, count, reason=reason)
    generator = np.random.default_rng(seed)
    sizes = np.linspace(count // 4, count, POINTS).astype(int)
    curve = []
    for size in sizes:
        rows = generated_MD[np.sort(generator.choice(count, size, replace=False))]
        curve.append([1 / int(size), between(real, Gaussian.from_rows(rows))])
    inverse, distances = np.array(curve).T
    slope, start = np.polyfit(inverse, distances, 1)
    return Finding(float(start), count, details={"curve": curve, "slope": float(slope)})


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


def kernel_finding(
    real_ND: np.ndarray, generated_MD: np.ndarray, *, subsets: int, subset_size: int, seed: int
) -> Finding:
    """`kernel_distance` with the interval of its mean; null where a set is too small.

    Rows come in the order of their pictures' keys. Disjoint subsets would be independent; these
    overlap, so the interval is the spread over subsets on the root of how many disjoint ones there
    could be.
    """
    counts = len(real_ND), len(generated_MD)
    if min(counts) < max(subset_size, 2):
        reason = (
            f"subsets of {subset_size} images need that many in each set, there are "
            f"{counts[0]}, {counts[1]}; a smaller --kid-subset-size can be set"
        )
        return Finding(None, min(counts), reason=reason)
    found = kernel_distance(
        real_ND, generated_MD, subsets=subsets, subset_size=subset_size, seed=seed
    )
    details = {"std": found.std, "subsets": subsets, "subset_size": subset_size}
    apart = min(subsets, min(counts) // subset_size)
    if apart < 2 or subsets < 2:
        return Finding(found.mean, min(counts), details=details)
    reach = 1.96 * found.std / apart**0.5
    method = f"spread over subsets, {apart} of which could be disjoint"
    return Finding(
        found.mean, min(counts), found.mean - reach, found.mean + reach, method, details=details
    )


def _mmd2(rows_a_SD: np.ndarray, rows_b_SD: np.ndarray) -> float:
    size, dim = rows_a_SD.shape
    both_RD = np.concatenate([rows_a_SD, rows_b_SD]).astype(np.float64)
    # A matrix by its own transpose: numpy computes one half and mirrors it.
    kernel_RR = both_RD @ both_RD.T
    kernel_RR /= dim
    kernel_RR += 1.0
    kernel_RR *= kernel_RR * kernel_RR
    itself_R = np.diagonal(kernel_RR)
    of_a, of_b = slice(None, size), slice(size, None)
    within = sum(float(kernel_RR[rows, rows].sum() - itself_R[rows].sum()) for rows in (of_a, of_b))
    return within / (size * (size - 1)) - 2.0 * float(kernel_RR[of_a, of_b].mean())


def _checked(features_a: np.ndarray, features_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as they are: what is computed from them is float64."""
    a, b = np.asarray(features_a), np.asarray(features_b)
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


def distances_at(
    name: str, real_ND: np.ndarray, generated_MD: np.ndarray
) -> tuple[dict[str, Any], dict[str, str]]:
    """(values, reasons) of fd between features of the encoder called `name`.

    A value that the number of images cannot support is None and its reason is given; a value that
    it supports only in part (a singular covariance) is given together with a reason for caution.
    """
    key, counts = f"fd@{name}", (len(real_ND), len(generated_MD))
    if min(counts) < 2:
        reason = f"needs at least 2 images in each set, there are {counts[0]}, {counts[1]}"
        return {key: None}, {key: reason}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said in `reasons` instead
        value = frechet(real_ND, generated_MD)
    if not rank_deficient(*counts, real_ND.shape[1]):
        return {key: value}, {}
    reason = (
        f"rank deficient: {counts[0]} and {counts[1]} images for {real_ND.shape[1]} dimensions; "
        f"compare only at equal numbers of images"
    )
    return {key: value}, {key: reason}
