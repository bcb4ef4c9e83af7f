"""Precision and recall, density and coverage: whose neighbourhood holds whose picture.

Precision is the share of generated pictures within the real pictures' neighbourhoods, recall the
share of real pictures within the generated ones' (Kynkäänniemi et al. 2019, arXiv 1904.06991,
eq. 1 and 2). Density counts how many real neighbourhoods hold a generated picture and coverage is
the share of real neighbourhoods that hold one (Naeem et al. 2020, arXiv 2002.09797, eq. 3 and 4).
A neighbourhood is the ball that reaches to the k-th nearest other row of its own set. Published
precision and recall beside FID take k = 3 (ADM's evaluator), density and coverage k = 5.

The balls are closed, as in the first paper's equation 1 and in ADM's evaluator; the package `prdc`
takes open balls. The two differ only on exact ties, that is on copies: of a set and itself the
density is (k + 1) / k here and 1 there. ADM's evaluator computes its distances in float16, so its
published values carry that rounding; these do not.

All in float64 over blocks of rows: a distance is |x|^2 + |y|^2 - 2 x.y of rows centred on the real
mean, good to some 1e-15 of the norms, so a copy lies at a distance that rounds to zero.

Legend: N real rows, M generated rows, D feature width, B rows of a block, K sizes of neighbourhood.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from arra.evaluate.finding import Finding
from arra.evaluate.intervals import bootstrap_mean
from arra.evaluate.rows import checked_pair

BLOCK = 1024
# Of the norms: far above the rounding of a float64 distance, far below any difference of pictures.
ROUNDING = 1e-12
# A copy's realism is infinite, and JSON has no infinity.
REALISM_CEILING = 1e3


@dataclass(frozen=True)
class Prdc:
    """What one size of neighbourhood says.

    Attributes:
        precision, recall, density, coverage: with 95 % intervals.
        realism_M: of each generated picture, how far within the real pictures' neighbourhoods it
            lies: the largest radius / distance over the smaller half of the balls (Kynkäänniemi et
            al., eq. 3); above 1 is inside one, a copy has 1000 (the ceiling). NaN where every real
            picture has k copies, None where there is no value.
    """

    precision: Finding
    recall: Finding
    density: Finding
    coverage: Finding
    realism_M: np.ndarray | None


def prdc(
    real_ND: np.ndarray,
    generated_MD: np.ndarray,
    *,
    neighbours: Sequence[int] = (3, 5),
    seed: int = 0,
) -> dict[int, Prdc]:
    """Precision, recall, density and coverage for each number of neighbours, in one pass.

    Rows are in the order of their pictures' keys; the values do not depend on it, the bootstrap's
    limits do. The intervals resample pictures (generated ones for precision and density, real ones
    for recall and coverage) and leave the neighbourhoods as they are, so they do not cover what
    another draw of the other set would change.

    Raises ValueError for features of two widths or values that are not finite.
    """
    real_ND, generated_MD = checked_pair(real_ND, generated_MD, "prdc")
    fewest = min(len(real_ND), len(generated_MD))
    fitting = sorted({k for k in neighbours if 1 <= k < fewest})
    found = {k: _unanswerable(k, len(real_ND), len(generated_MD)) for k in neighbours}
    if fitting:
        found.update(_measured(real_ND, generated_MD, fitting, seed))
    return found


class _Cloud:
    """Centred rows with their squared norms and the squared radii of their neighbourhoods."""

    def __init__(self, rows_ND: np.ndarray, centre_D: np.ndarray, neighbours: list[int]) -> None:
        self.rows_ND = torch.from_numpy(rows_ND - centre_D)
        self.norm2_N = (self.rows_ND**2).sum(1)
        nearest_NK = self._nearest(max(neighbours))[:, [k - 1 for k in neighbours]]
        slack_N1 = ROUNDING * self.norm2_N[:, None]
        self.radius2_NK = torch.where(nearest_NK <= slack_N1, 0.0, nearest_NK)
        # Without this much more, rounding would decide whether a copy of the k-th neighbour, which
        # lies on the ball's rim, is inside.
        self.reach2_NK = self.radius2_NK * (1 + ROUNDING) + slack_N1

    def distance2(self, rows: slice, other: "_Cloud", columns: slice) -> Tensor:
        """Squared distances (B, C) of some of these rows to some of another cloud's."""
        squares_BC = self.norm2_N[rows, None] + other.norm2_N[None, columns]
        return squares_BC.addmm_(self.rows_ND[rows], other.rows_ND[columns].T, alpha=-2).clamp_(0)

    def _nearest(self, count: int) -> Tensor:
        """Squared distances (N, count) to the nearest other rows, in rising order."""
        nearest = torch.full((len(self.rows_ND), count), torch.inf, dtype=torch.float64)

        def take(rows: slice, candidates: Tensor) -> None:
            both = torch.cat([nearest[rows], candidates], dim=1)
            nearest[rows] = both.topk(count, dim=1, largest=False, sorted=True).values

        blocks = _blocks(len(self.rows_ND))
        for index, rows in enumerate(blocks):
            for columns in blocks[index:]:
                distances = self.distance2(rows, self, columns)
                if rows == columns:
                    take(rows, distances.fill_diagonal_(torch.inf))
                else:
                    take(rows, distances)
                    take(columns, distances.T)
        return nearest


def _measured(
    real_ND: np.ndarray, generated_MD: np.ndarray, neighbours: list[int], seed: int
) -> dict[int, Prdc]:
    centre_D = real_ND.mean(axis=0)
    real = _Cloud(real_ND, centre_D, neighbours)
    generated = _Cloud(generated_MD, centre_D, neighbours)
    count_n, count_m, sizes = len(real_ND), len(generated_MD), len(neighbours)
    balls_KM = torch.zeros(sizes, count_m, dtype=torch.int64)
    covered_KN = torch.zeros(sizes, count_n, dtype=torch.bool)
    recalled_KN = torch.zeros(sizes, count_n, dtype=torch.bool)
    realism_KM = torch.full((sizes, count_m), torch.nan, dtype=torch.float64)
    kept = [_smaller_half(real.radius2_NK[:, index]) for index in range(sizes)]
    for rows in _blocks(count_m):
        distance2_BN = generated.distance2(rows, real, slice(None))
        for index in range(sizes):
            inside_BN = distance2_BN <= real.reach2_NK[:, index]
            balls_KM[index, rows] = inside_BN.sum(1)
            covered_KN[index] |= inside_BN.any(0)
            recalled_KN[index] |= (distance2_BN <= generated.reach2_NK[rows, index, None]).any(0)
            if len(kept[index]):
                ratio_BH = distance2_BN[:, kept[index]] / real.radius2_NK[kept[index], index]
                realism_KM[index, rows] = ratio_BH.amin(1).clamp(REALISM_CEILING**-2).rsqrt()
    found = {}
    for index, k in enumerate(neighbours):
        balls_M = balls_KM[index].numpy()
        details = {"neighbours": k, "real": count_n, "generated": count_m}
        found[k] = Prdc(
            precision=_mean(balls_M > 0, True, "generated", details, seed),
            recall=_mean(recalled_KN[index].numpy(), True, "real", details, seed),
            density=_mean(balls_M / k, False, "generated", details, seed),
            coverage=_mean(covered_KN[index].numpy(), True, "real", details, seed),
            realism_M=realism_KM[index].numpy(),
        )
    return found


def _smaller_half(radius2_N: Tensor) -> Tensor:
    """Indices of the balls whose radius is no larger than the median of those that have one."""
    positive_N = radius2_N > 0
    if not positive_N.any():
        return torch.empty(0, dtype=torch.int64)
    return torch.nonzero(positive_N & (radius2_N <= radius2_N[positive_N].median())).squeeze(1)


def _mean(
    values: np.ndarray, proportion: bool, resampled: str, details: dict[str, int], seed: int
) -> Finding:
    interval = bootstrap_mean(values, proportion=proportion, seed=seed)
    assert interval is not None
    return Finding(
        interval.mean,
        interval.n,
        interval.low,
        interval.high,
        f"bootstrap over {resampled} images, neighbourhoods fixed",
        details=details,
    )


def _unanswerable(k: int, count_n: int, count_m: int) -> Prdc:
    reason = (
        f"{k} neighbours need more than {k} images in both sets; "
        f"there are {count_n} real and {count_m} generated"
    )
    details = {"neighbours": k, "real": count_n, "generated": count_m}
    of_real = Finding(None, count_n, reason=reason, details=details)
    of_generated = Finding(None, count_m, reason=reason, details=details)
    return Prdc(of_generated, of_real, of_generated, of_real, None)


def _blocks(count: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
