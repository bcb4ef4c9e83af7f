"""How sure a mean is: percentile bootstrap over images.

Legend: N values, R bootstrap resamples.
"""

from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval and the number of values behind it."""

    mean: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def bootstrap_mean(
    values_N: np.ndarray,
    *,
    proportion: bool = False,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """The mean of the values that are not NaN, with its percentile bootstrap interval.

    None where every value is NaN (a field that no prompt asks for). With one value the interval
    has no width, which says nothing about certainty: n tells. Resampling n equal answers cannot
    spread either, so for a `proportion` of exactly 0 or 1 Wilson's score limits are given instead.
    """
    values = np.asarray(values_N, dtype=np.float64)
    values = values[~np.isnan(values)]
    n = len(values)
    if n == 0:
        return None
    mean = float(values.mean())
    if proportion and mean in (0.0, 1.0):
        z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
        reach = z2 / (n + z2)
        return Interval(mean, max(mean - reach, 0.0), min(mean + reach, 1.0), n)
    generator = np.random.default_rng(seed)
    means_R = np.array([values[generator.integers(0, n, n)].mean() for _ in range(resamples)])
    low, high = np.quantile(means_R, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), n)
