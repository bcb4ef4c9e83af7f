"""Intervals of whole-set statistics in two arms that painted the same prompts."""

import numpy as np
import pytest

from arra.study.statistics import paired_resampling

RNG = np.random.default_rng(5)


def test_paired_resampling_of_a_distance():
    plain = RNG.normal(size=(300, 2))
    aligned = plain + [0.5, 0]

    def distance(rows):
        return float((rows.mean(0) ** 2).sum())

    found = paired_resampling(distance, plain, aligned, resamples=200)
    assert found.plain.mean == distance(plain)
    assert found.difference.mean == pytest.approx(distance(aligned) - distance(plain))
    assert found.difference.low < found.difference.mean < found.difference.high
    # The difference is 0.25 + m with m the mean of the first column: spread 1 / sqrt(300).
    assert found.difference.high - found.difference.low == pytest.approx(3.92 / 300**0.5, rel=0.3)
    with pytest.raises(ValueError, match="same prompts"):
        paired_resampling(distance, plain, aligned[1:])
