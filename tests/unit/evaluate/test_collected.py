"""What is kept of a stream of features: exact moments, and a sample that no order changes."""

import numpy as np
import pytest

from arra.evaluate.collected import Collected, Gaussian, keys_of_rows
from arra.evaluate.distances import between, fd_infinity, frechet, frechet_distance
from arra.evaluate.finding import Finding


def rows(count: int, dim: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    made = np.random.default_rng(seed).normal(size=(count, dim)) + shift
    return made.astype(np.float32)


@pytest.mark.parametrize("count", [5, 8, 9, 5000])
def test_moments_are_numpys(count: int) -> None:
    """Also where the covariance is singular (5 and 8 rows in 8 dimensions)."""
    data = rows(count, 8, shift=50.0)
    found = Gaussian.from_rows(data)
    assert found.mean_D == pytest.approx(data.mean(0, dtype=np.float64), rel=1e-12)
    assert found.covariance() == pytest.approx(np.cov(data.astype(np.float64).T), abs=1e-11)


def test_parts_in_any_order_give_the_same() -> None:
    data = rows(9000, 16, shift=3.0)
    keys = keys_of_rows(data)
    reference = Collected(16, keep=500)
    reference.add(data, keys)
    order = np.random.default_rng(1).permutation(len(data))
    for batch in (7, 1000, 9000):
        found = Collected(16, keep=500)
        for start in range(0, len(data), batch):
            part = order[start : start + batch]
            found.add(data[part], keys[part])
        assert found.count == 9000
        assert np.array_equal(found.rows_ND, reference.rows_ND)
        assert np.array_equal(found.keys_N, np.sort(keys)[:500])
        other = Gaussian.from_rows(rows(900, 16, 5))
        expected = between(other, reference.gaussian())
        assert between(other, found.gaussian()) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("count", [30, 9000])
def test_directions_without_variance_stay_exact(count: int) -> None:
    """A covariance of rank 5, seen in any order: a distance's root must not see the rounding."""
    plane = rows(5, 16, 2)
    data, other = rows(count, 5) @ plane + 40, rows(500, 16, 5)
    found = [
        between(Gaussian.from_rows(other), Gaussian.from_rows(each)) for each in (data, data[::-1])
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-10)
    assert between(Gaussian.from_rows(data), Gaussian.from_rows(data[::-1])) < 1e-8


def test_published_moments_are_a_gaussian_too() -> None:
    data = rows(300, 6)
    made = Gaussian.from_rows(data)
    published = Gaussian.from_moments(made.mean_D, made.covariance())
    assert published.count is None
    other = Gaussian.from_rows(rows(200, 6, 3))
    assert between(published, other) == pytest.approx(between(made, other), rel=1e-9)
    with pytest.raises(ValueError, match="do not belong together"):
        Gaussian.from_moments(made.mean_D, made.covariance()[:4, :4])
    with pytest.raises(ValueError, match="negative eigenvalues"):
        Gaussian.from_moments(made.mean_D, -made.covariance())
    with pytest.raises(ValueError, match="NaN"):
        Gaussian.from_moments(made.mean_D * np.nan, made.covariance())


def test_features_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        Collected(2, 1).add(np.array([[0.0, np.nan]]), np.array([1], np.uint64))


def judged(real: np.ndarray, data: np.ndarray) -> Finding:
    return frechet_distance(Gaussian.from_rows(real), Gaussian.from_rows(data), data)


def test_interval_of_a_distance_covers_what_another_draw_gives() -> None:
    """Of 60 sets, each interval against the mean of all: 95 % +- 7 points at three sigma."""
    real = rows(4000, 4)
    found = [judged(real, rows(400, 4, 100 + n, 0.3)) for n in range(60)]
    middle = np.mean([each.value for each in found])
    inside = [each.low <= middle <= each.high for each in found]
    assert np.mean(inside) > 0.86
    assert not all(each.low <= 1.5 * middle <= each.high for each in found)
    assert found[0].method is not None


def test_the_interval_is_the_jackknifes_to_first_order() -> None:
    """Against the distances without each row, which it stands for."""
    mix = np.eye(6) + 0.2 * np.random.default_rng(3).normal(size=(6, 6))
    real, data = rows(900, 6), (rows(300, 6, 1) @ mix + 0.4).astype(np.float32)
    found = judged(real, data)
    reference, count = Gaussian.from_rows(real), len(data)
    without = [
        between(reference, Gaussian.from_rows(np.delete(data, n, axis=0))) for n in range(count)
    ]
    spread = (count - 1) ** 0.5 * np.std(without)
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.03)


def test_a_dead_feature_does_not_cost_the_interval() -> None:
    """One that is 0 in both sets; where it is alive in the real ones there is no derivative."""
    real, data = rows(900, 6), rows(300, 6, 1, 0.4)
    expected = judged(real, data)
    dead = np.zeros((300, 1), np.float32)
    found = judged(np.hstack([real, np.zeros((900, 1), np.float32)]), np.hstack([data, dead]))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-6)
    without = judged(np.hstack([real, rows(900, 1, 5)]), np.hstack([data, dead]))
    assert without.low is None
    assert "no interval" in str(without.reason)


def test_few_images_have_a_reason_and_no_interval() -> None:
    found = judged(rows(30, 8), rows(8, 8, 1))
    assert found.low is None
    assert "rank deficient: 30 and 8 images for 8 dimensions" in str(found.reason)
    assert found.value == pytest.approx(frechet_of(rows(30, 8), rows(8, 8, 1)))


def frechet_of(first: np.ndarray, second: np.ndarray) -> float:
    with pytest.warns(UserWarning, match="rank deficient"):
        return frechet(first, second)


def test_fd_infinity_takes_the_bias_of_few_images_away() -> None:
    """Equal distributions: the distance of 2000 rows is its bias, the limit is near 0."""
    real = Gaussian.from_rows(rows(200_000, 16))
    found = fd_infinity(real, rows(2000, 16, 7))
    biased = between(real, Gaussian.from_rows(rows(2000, 16, 7)))
    assert found.value is not None
    assert abs(found.value) < biased / 4
    assert len(found.details["curve"]) == 8
    assert fd_infinity(real, rows(60, 16)).value is None
