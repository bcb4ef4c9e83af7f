"""Paired differences: over pictures of the same prompts, over runs of the same seeds.

Legend: N pairs (one prompt painted by both), S seeds.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from arra.evaluate.intervals import bootstrap_mean

RESAMPLES = 10_000
EXACT_UP_TO = 14  # pairs whose 2^N sign flips are enumerated


@dataclass(frozen=True)
class PairedDifference:
    """Mean of `second - first` over pairs, its interval, and its chance without an effect."""

    mean: float
    low: float
    high: float
    p: float
    n: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def paired_difference(
    first_N: np.ndarray, second_N: np.ndarray, *, seed: int = 0
) -> PairedDifference | None:
    """The mean difference over prompts that both answered (NaN in either leaves a pair out).

    The interval is a percentile bootstrap over pairs at 95 %. `p` is of the two-sided sign-flip
    permutation test: exact up to 14 pairs, else from 10,000 draws with the observed one counted
    (Phipson and Smyth 2010), so never 0. None where no pair is left.

    Over prompts of ONE training run each, it says whether the two trained models differ, not
    whether the method would make another run better: for that see `over_seeds`.
    """
    first, second = np.asarray(first_N, float), np.asarray(second_N, float)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"paired values need equal lengths, got {first.shape} and {second.shape}: both must "
            f"paint the same prompts"
        )
    difference_N = (second - first)[~np.isnan(second - first)]
    interval = bootstrap_mean(difference_N, seed=seed)
    if interval is None:
        return None
    p = sign_flip_p(difference_N, seed=seed)
    return PairedDifference(interval.mean, interval.low, interval.high, p, interval.n)


def sign_flip_p(difference_N: np.ndarray, *, seed: int = 0) -> float:
    """Two-sided p of mean 0 under random signs of the pairs (Fisher 1935)."""
    difference = np.asarray(difference_N, float)
    n = len(difference)
    observed = abs(difference.sum())
    tolerance = 1e-12 * max(np.abs(difference).sum(), 1.0)
    if n <= EXACT_UP_TO:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        sums = (1 - 2 * bits) @ difference
        return float(np.mean(np.abs(sums) >= observed - tolerance))
    generator = np.random.default_rng(seed)
    extreme = 0
    for _ in range(RESAMPLES // 1000):
        signs = generator.integers(0, 2, (1000, n), dtype=np.int8) * 2.0 - 1.0
        extreme += int((np.abs(signs @ difference) >= observed - tolerance).sum())
    return (extreme + 1) / (RESAMPLES + 1)


def over_seeds(first_S: Sequence[float], second_S: Sequence[float]) -> dict[str, Any]:
    """Difference of whole runs, paired by training seed: mean, Student's interval, sign-flip p.

    Bootstrap over two or three runs would be far too narrow; Student's t at least knows how few
    they are. With one seed the interval is None. p cannot fall below 2 / 2^S.
    """
    difference_S = np.asarray(second_S, float) - np.asarray(first_S, float)
    n = len(difference_S)
    if n == 0:
        raise ValueError("no seeds to compare: run at least one pair")
    mean = float(difference_S.mean())
    half = None
    if n > 1:
        half = float(student_t(n - 1) * difference_S.std(ddof=1) / np.sqrt(n))
    return {
        "mean": mean,
        "low": None if half is None else mean - half,
        "high": None if half is None else mean + half,
        "p": sign_flip_p(difference_S),
        "seeds": n,
        "differences": [float(d) for d in difference_S],
    }


# 97.5 % quantiles of Student's t for 1 to 10 degrees of freedom: scipy is no core dependency.
_T975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def student_t(freedom: int) -> float:
    """97.5 % quantile of Student's t with `freedom` degrees of freedom, to four digits."""
    if freedom <= len(_T975):
        return _T975[freedom - 1]
    z = 1.959964  # Cornish and Fisher's expansion: four digits from 11 degrees on
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
