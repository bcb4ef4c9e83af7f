"""Paired differences: exact tests against enumeration, intervals against scipy and coverage."""

import itertools

import numpy as np
import pytest

from arra.evaluate.intervals import bootstrap_mean
from arra.evaluate.paired import over_seeds, paired_difference, sign_flip_p, student_t

RNG = np.random.default_rng(5)


def test_sign_flip_is_exact_for_few_pairs():
    values = RNG.normal(size=6) + 0.4
    sums = [np.dot(signs, values) for signs in itertools.product((1, -1), repeat=6)]
    expected = np.mean(np.abs(sums) >= abs(values.sum()) - 1e-12)
    assert sign_flip_p(values) == pytest.approx(expected)
    assert sign_flip_p(np.ones(3)) == pytest.approx(2 / 8)
    assert sign_flip_p(np.zeros(40)) == 1


def test_sign_flip_sampled_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = RNG.normal(size=200) + 0.12
    expected = stats.ttest_1samp(values, 0).pvalue
    assert sign_flip_p(values) == pytest.approx(expected, abs=0.02)
    assert sign_flip_p(values + 5) == pytest.approx(1 / 10_001)


def test_paired_difference_leaves_out_unanswered_pairs():
    plain = np.array([0, 0, 1, np.nan, 1, 0] * 20)
    aligned = np.array([1, 0, 1, 1, np.nan, 1] * 20)
    found = paired_difference(plain, aligned)
    assert found is not None
    assert found.n == 80
    assert found.mean == pytest.approx(0.5)
    assert found.low < 0.5 < found.high
    assert found.p < 1e-3
    assert paired_difference(np.array([np.nan]), np.array([1.0])) is None
    with pytest.raises(ValueError, match="same prompts"):
        paired_difference(plain, aligned[1:])


def test_over_seeds():
    stats = pytest.importorskip("scipy.stats")
    found = over_seeds([1.0, 1.2, 0.9], [0.8, 1.1, 0.6])
    difference = np.array([-0.2, -0.1, -0.3])
    expected = stats.t.interval(0.95, 2, difference.mean(), stats.sem(difference))
    assert (found["low"], found["high"]) == pytest.approx(expected, rel=1e-4)
    assert found["p"] == pytest.approx(0.25)
    assert over_seeds([1.0], [0.5])["low"] is None
    for freedom in (1, 2, 10, 29, 30, 100):
        assert student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-3)


def test_bootstrap_interval_of_a_mean():
    values = RNG.normal(2, 1, 400)
    found = bootstrap_mean(values)
    assert found is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert bootstrap_mean(values) == found
    assert bootstrap_mean(np.array([np.nan])) is None


def test_bootstrap_covers():
    hits = 0
    for trial in range(200):
        values = np.random.default_rng(trial).random(60) < 0.3
        found = bootstrap_mean(values.astype(float), resamples=400)
        assert found is not None
        hits += found.low <= 0.3 <= found.high
    assert hits >= 180


def test_proportions_at_the_edge_are_not_certain():
    found = bootstrap_mean(np.zeros(100), proportion=True)
    assert found is not None
    assert found.low == 0
    assert 0.02 < found.high < 0.06
    found = bootstrap_mean(np.ones(100), proportion=True)
    assert found is not None
    assert 0.94 < found.low < 0.98
    assert found.high == 1
