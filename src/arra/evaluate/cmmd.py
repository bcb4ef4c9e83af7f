"""CMMD: the maximum mean discrepancy of normalised features under a Gaussian kernel.

Jayasumana et al. 2024, arXiv 2401.09603: kernel exp(-|x - y|^2 / (2 sigma^2)) with sigma = 10 on
features of length 1, times 1000. CMMD is the name for the image embeddings of CLIP ViT-L/14 at 336
pixels; any other extractor's value stands on a scale of its own and is called `cmmd@NAME`.

Legend: N real rows, M generated rows, D feature width, G, H groups of real and generated rows.
"""

from dataclasses import dataclass

import numpy as np
import torch

from arra.evaluate.finding import Finding
from arra.evaluate.rows import checked_pair, unit_rows

SIGMA = 10.0
SCALE = 1000.0
GROUPS = 20


def cmmd(real_ND: np.ndarray, generated_MD: np.ndarray) -> Finding:
    """1000 MMD^2 of (N, D) and (M, D) features.

    The estimator is the V-statistic (Gretton et al. 2012, eq. 5), as in google-research/cmmd: means
    over all pairs, each row with itself included. It is never negative, and biased upwards by about
    1000 (1 - mean kernel) (1/N + 1/M): some 0.002 at 10,000 rows. `details["unbiased"]` leaves the
    pairs of a row with itself out (eq. 3).

    The interval is that of a jackknife which leaves out one of 20 groups of rows at a time, from
    either set, with normal limits. Rows come in the order of their pictures' keys, so the groups
    depend on the pictures alone. Near zero the estimate is not normal and the interval is rough.
    Null where a set is empty; no interval below 40 rows in either set.

    Raises ValueError for features of two widths, values that are not finite or a row of zeros.
    """
    real_ND, generated_MD = checked_pair(real_ND, generated_MD, "cmmd")
    count_n, count_m = len(real_ND), len(generated_MD)
    details: dict[str, float] = {"sigma": SIGMA, "real": count_n, "generated": count_m}
    if min(count_n, count_m) == 0:
        reason = f"no images to compare: {count_n} real, {count_m} generated"
        return Finding(None, 0, reason=reason, details=details)
    sums = _pair_sums(unit_rows(real_ND, "cmmd"), unit_rows(generated_MD, "cmmd"))
    all_G, all_H = np.ones(len(sums.sizes_G)), np.ones(len(sums.sizes_H))
    value = SCALE * max(sums.mmd2(all_G, all_H), 0.0)
    if min(count_n, count_m) > 1:
        details["unbiased"] = SCALE * sums.mmd2(all_G, all_H, itself=False)
    if min(count_n, count_m) < 2 * GROUPS:
        return Finding(value, min(count_n, count_m), details=details)
    without_real = [sums.mmd2(kept_G, all_H) for kept_G in 1.0 - np.eye(GROUPS)]
    without_generated = [sums.mmd2(all_G, kept_H) for kept_H in 1.0 - np.eye(GROUPS)]
    variance = (GROUPS - 1) * (np.var(without_real) + np.var(without_generated))
    reach = float(1.96 * SCALE * np.sqrt(variance))
    return Finding(
        value,
        min(count_n, count_m),
        value - reach,
        value + reach,
        f"jackknife over {GROUPS} groups of images of either set, normal limits",
        details=details,
    )


@dataclass(frozen=True)
class _PairSums:
    """Sums of kernel - 1 over the pairs of two groups, and the groups' sizes.

    The kernel of unit rows lies between 0.98 and 1. MMD does not change when 1 is taken off it, and
    then the sums keep the digits in which kernels differ.
    """

    real_GG: np.ndarray
    generated_HH: np.ndarray
    cross_GH: np.ndarray
    sizes_G: np.ndarray
    sizes_H: np.ndarray

    def mmd2(self, kept_G: np.ndarray, kept_H: np.ndarray, *, itself: bool = True) -> float:
        """MMD^2 of the groups that have a 1; `itself` counts a row with itself as a pair."""
        count_n, count_m = kept_G @ self.sizes_G, kept_H @ self.sizes_H
        left_out = 0.0 if itself else 1.0
        return float(
            kept_G @ self.real_GG @ kept_G / (count_n * (count_n - left_out))
            + kept_H @ self.generated_HH @ kept_H / (count_m * (count_m - left_out))
            - 2.0 * (kept_G @ self.cross_GH @ kept_H) / (count_n * count_m)
        )


def _pair_sums(real_ND: np.ndarray, generated_MD: np.ndarray) -> _PairSums:
    real_G = np.array_split(real_ND, min(GROUPS, len(real_ND)))
    generated_H = np.array_split(generated_MD, min(GROUPS, len(generated_MD)))
    return _PairSums(
        _within(real_G),
        _within(generated_H),
        np.array([[_kernel_sum(left, right) for right in generated_H] for left in real_G]),
        np.array([len(group) for group in real_G], dtype=np.float64),
        np.array([len(group) for group in generated_H], dtype=np.float64),
    )


def _within(groups: list[np.ndarray]) -> np.ndarray:
    """The sums of a set with itself, symmetric: each pair of groups once."""
    sums_GG = np.zeros((len(groups), len(groups)))
    for first, left in enumerate(groups):
        for second, right in enumerate(groups[first:], first):
            sums_GG[first, second] = sums_GG[second, first] = _kernel_sum(left, right)
    return sums_GG


def _kernel_sum(left_BD: np.ndarray, right_CD: np.ndarray) -> float:
    """Sum of exp(-|x - y|^2 / (2 sigma^2)) - 1; for unit rows |x - y|^2 = 2 - 2 x.y."""
    cosines_BC = torch.from_numpy(left_BD) @ torch.from_numpy(right_CD).T
    return float(cosines_BC.sub_(1.0).clamp_(max=0.0).div_(SIGMA**2).expm1_().sum())
