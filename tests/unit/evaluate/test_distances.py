"""Distances against scipy, torchmetrics and closed forms."""

import numpy as np
import pytest
import torch

from arra.evaluate.distances import frechet, kernel_distance, rank_deficient

RNG = np.random.default_rng(7)
MIX = RNG.normal(size=(12, 12))
A = RNG.normal(size=(300, 12)) @ MIX + 1.0
B = RNG.normal(size=(240, 12)) @ MIX.T


def naive_frechet(a, b):
    linalg = pytest.importorskip("scipy.linalg")
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(cov_a @ cov_b)
    gap = a.mean(0) - b.mean(0)
    return gap @ gap + np.trace(cov_a + cov_b - 2 * np.real(root))


def test_equals_scipy_sqrtm():
    assert frechet(A, B) == pytest.approx(naive_frechet(A, B), rel=1e-9)


def test_equals_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    tensors = [torch.from_numpy(x) for x in (A, B)]
    means = [x.mean(0) for x in tensors]
    covariances = [torch.cov(x.T) for x in tensors]
    theirs = fid._compute_fid(means[0], covariances[0], means[1], covariances[1])
    assert frechet(A, B) == pytest.approx(float(theirs), rel=1e-9)


def standardised(rows):
    """Rows whose sample mean is exactly 0 and sample covariance exactly the identity."""
    rows = rows - rows.mean(0)
    return rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows.T))).T


def test_closed_form_of_two_gaussians():
    unit_a, unit_b = standardised(A), standardised(B)
    sigma_a, sigma_b = np.linspace(0.5, 3, 12), np.linspace(2, 0.1, 12)
    shift = np.linspace(-1, 1, 12)
    expected = (shift**2).sum() + ((sigma_a - sigma_b) ** 2).sum()
    assert frechet(unit_a * sigma_a + shift, unit_b * sigma_b) == pytest.approx(expected, rel=1e-10)


def test_order_does_not_matter():
    shuffled = frechet(A[RNG.permutation(len(A))], B[RNG.permutation(len(B))])
    assert abs(shuffled - frechet(A, B)) < 1e-8
    assert abs(frechet(B, A) - frechet(A, B)) < 1e-8


def test_few_rows_are_exact_and_warned():
    a, b = RNG.normal(size=(9, 40)), RNG.normal(size=(7, 40)) + 0.5
    with pytest.warns(UserWarning, match="rank deficient"):
        value = frechet(a, b)
    # scipy's root of a singular product is only good to some 1e-6; the eigenvalues are better.
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    eigenvalues, vectors = np.linalg.eigh(cov_a)
    root_a = vectors * np.sqrt(np.clip(eigenvalues, 0, None)) @ vectors.T
    inner = np.linalg.eigvalsh(root_a @ cov_b @ root_a)
    gap = a.mean(0) - b.mean(0)
    expected = gap @ gap + np.trace(cov_a + cov_b) - 2 * np.sqrt(np.clip(inner, 0, None)).sum()
    assert value == pytest.approx(expected, abs=1e-5)
    with pytest.warns(UserWarning, match="rank deficient"):
        assert frechet(a, a) == pytest.approx(0, abs=1e-12)
    assert rank_deficient(9, 7, 40)
    assert rank_deficient(41, 40, 40)
    assert not rank_deficient(41, 41, 40)


def test_kernel_distance_equals_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid")
    ours = kernel_distance(A[:200], B[:200], subsets=1, subset_size=200)
    theirs = kid.poly_mmd(torch.from_numpy(A[:200]), torch.from_numpy(B[:200]))
    assert ours.mean == pytest.approx(float(theirs), rel=1e-9)
    assert ours.std == 0


def test_kernel_distance_is_seeded_and_unbiased():
    same = kernel_distance(A, A[::-1], subsets=20, subset_size=100, seed=3)
    assert same == kernel_distance(A, A[::-1], subsets=20, subset_size=100, seed=3)
    assert same != kernel_distance(A, A[::-1], subsets=20, subset_size=100, seed=4)
    noise = RNG.normal(size=(2, 400, 4))
    assert abs(kernel_distance(*noise, subsets=50, subset_size=200).mean) < 0.02


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (A, B[:, :3], "one encoder"),
        (A[:1], B, "at least 2"),
        (np.full_like(A, np.nan), B, "NaN"),
    ],
)
def test_bad_input_is_named(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet(a, b)


def test_too_few_rows_for_a_subset():
    with pytest.raises(ValueError, match="smaller set has 240"):
        kernel_distance(A, B)
