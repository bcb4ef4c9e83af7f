"""CMMD against the original's formula, closed forms and a recorded value."""

import json
from pathlib import Path

import numpy as np
import pytest
from formula import fill

from arra.evaluate.cmmd import cmmd

GOLDEN = json.loads(
    (Path(__file__).parents[2] / "golden/pairwise_metrics.json").read_text(encoding="utf-8")
)
REAL = fill("metrics.real", (300, 24), 1.0).numpy()
GENERATED = (fill("metrics.generated", (240, 24), 0.9) + 0.15).numpy()


def test_equals_the_original():
    assert cmmd(REAL, GENERATED).value == pytest.approx(GOLDEN["cmmd"]["value"], rel=1e-9)


def unit(rows):
    return rows.astype(float) / np.linalg.norm(rows.astype(float), axis=1, keepdims=True)


def kernels(left, right):
    distance2 = ((unit(left)[:, None] - unit(right)[None]) ** 2).sum(-1)
    return np.exp(-distance2 / 200)


def test_equals_the_definition_with_and_without_the_diagonal():
    within = [kernels(rows, rows) for rows in (REAL, GENERATED)]
    across = kernels(REAL, GENERATED).mean()
    found = cmmd(REAL, GENERATED)
    biased = sum(kernel.mean() for kernel in within) - 2 * across
    assert found.value == pytest.approx(1000 * biased, rel=1e-9)
    left_out = sum(
        (kernel.sum() - len(kernel)) / (len(kernel) * (len(kernel) - 1)) for kernel in within
    )
    assert found.details["unbiased"] == pytest.approx(1000 * (left_out - 2 * across), rel=1e-9)


def test_two_points():
    """All real on one axis, all generated on another: 2 (1 - exp(-2 / 200)), times 1000."""
    real, generated = np.tile([3.0, 0.0], (5, 1)), np.tile([0.0, 0.2], (4, 1))
    assert cmmd(real, generated).value == pytest.approx(2000 * -np.expm1(-0.01), rel=1e-12)
    assert cmmd(real, 7 * real).value == 0


def test_order_and_length_do_not_matter():
    rng = np.random.default_rng(0)
    lengths = rng.uniform(0.1, 10, (len(REAL), 1))
    shuffled = cmmd((REAL * lengths)[rng.permutation(300)], GENERATED[rng.permutation(240)])
    assert abs(shuffled.value - cmmd(REAL, GENERATED).value) < 1e-8
    assert cmmd(REAL, REAL[::-1]).value < 1e-10


def test_interval_covers_the_draw():
    """Over 30 draws of both sets the jackknife's width is that of the values' own spread."""
    rng = np.random.default_rng(3)
    found = [cmmd(rng.normal(size=(160, 8)), rng.normal(size=(120, 8)) + 0.5) for _ in range(30)]
    spread = 1.96 * np.std([finding.value for finding in found], ddof=1)
    reach = np.median([(finding.high - finding.low) / 2 for finding in found])
    assert 0.6 * spread < reach < 1.6 * spread
    assert "jackknife over 20 groups" in found[0].method


def test_few_rows():
    assert cmmd(REAL[:1], GENERATED[:1]).value > 0
    assert cmmd(REAL[:39], GENERATED).low is None
    assert cmmd(REAL[:0], GENERATED).reason == "no images to compare: 0 real, 240 generated"


@pytest.mark.parametrize(
    ("generated", "message"),
    [
        (GENERATED[:, :5], "widths 24 and 5"),
        (np.full_like(GENERATED, np.nan), "NaN"),
        (np.where(np.arange(240)[:, None] == 7, 0, GENERATED), "row 7"),
        (GENERATED[0], "shape"),
    ],
)
def test_bad_input_is_named(generated, message):
    with pytest.raises(ValueError, match=message):
        cmmd(REAL, generated)
