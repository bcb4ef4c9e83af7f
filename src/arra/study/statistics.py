"""Intervals of a statistic of whole sets and of its difference between two arms.

Legend: N prompts, D feature width, R resamples.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from arra.evaluate.intervals import Interval


@dataclass(frozen=True)
class PairedValues:
    """A statistic of whole sets (a distance) in both arms, with resampling intervals."""

    plain: Interval
    aligned: Interval
    difference: Interval

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def paired_resampling(
    statistic: Callable[[np.ndarray], float],
    plain_ND: np.ndarray,
    aligned_ND: np.ndarray,
    *,
    resamples: int = 100,
    seed: int = 0,
) -> PairedValues:
    """Intervals of `statistic(rows)` and of its difference, drawing the same prompts in both arms.

    Repeated rows bias a distance upwards, so the spread of the resampled values is laid around the
    value of the whole set instead of around their own mean.
    """
    n = len(plain_ND)
    if len(aligned_ND) != n:
        raise ValueError(f"paired resampling needs the same prompts: {n} and {len(aligned_ND)}")
    generator = np.random.default_rng(seed)
    whole = np.array([statistic(plain_ND), statistic(aligned_ND)])
    values = []
    for _ in range(resamples):
        rows = generator.integers(0, n, n)
        values.append((statistic(plain_ND[rows]), statistic(aligned_ND[rows])))
    values_R2 = np.array(values)

    def around(value: float, resampled_R: np.ndarray) -> Interval:
        low, high = np.quantile(resampled_R - resampled_R.mean(), [0.025, 0.975])
        return Interval(float(value), float(value + low), float(value + high), n)

    return PairedValues(
        around(whole[0], values_R2[:, 0]),
        around(whole[1], values_R2[:, 1]),
        around(whole[1] - whole[0], values_R2[:, 1] - values_R2[:, 0]),
    )
