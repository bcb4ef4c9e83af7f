"""Precision, recall, density, coverage against the package prdc, ADM's definition, closed forms."""

import json
from pathlib import Path

import numpy as np
import pytest
from formula import fill

from arra.evaluate import prdc as module
from arra.evaluate.prdc import REALISM_CEILING, prdc

GOLDEN = json.loads(
    (Path(__file__).parents[2] / "golden/pairwise_metrics.json").read_text(encoding="utf-8")
)
REAL = fill("metrics.real", (300, 24), 1.0).numpy()
GENERATED = (fill("metrics.generated", (240, 24), 0.9) + 0.15).numpy()
NAMES = ("precision", "recall", "density", "coverage")


def values(found):
    return {name: getattr(found, name).value for name in NAMES}


def distances2(left, right):
    return ((left[:, None].astype(float) - right[None].astype(float)) ** 2).sum(-1)


@pytest.mark.parametrize("k", [3, 5, 10])
def test_equals_the_package_prdc(k):
    expected = {name: GOLDEN["prdc"][str(k)][name] for name in NAMES}
    assert values(prdc(REAL, GENERATED, neighbours=[k])[k]) == pytest.approx(expected, rel=1e-12)


def test_equals_adm_evaluators_precision_and_recall():
    """evaluations/evaluator.py: d^2 <= r^2 of the ball around any row, r the 3rd of others."""
    radius2_real = np.sort(distances2(REAL, REAL), axis=1)[:, 3]
    radius2_generated = np.sort(distances2(GENERATED, GENERATED), axis=1)[:, 3]
    across = distances2(REAL, GENERATED)
    ours = prdc(REAL, GENERATED)[3]
    assert ours.precision.value == (across <= radius2_real[:, None]).any(0).mean()
    assert ours.recall.value == (across <= radius2_generated[None]).any(1).mean()


def test_realism_is_radius_over_distance_of_the_smaller_half():
    radius = np.sqrt(np.sort(distances2(REAL, REAL), axis=1)[:, 5])
    kept = radius <= np.sort(radius)[(len(radius) - 1) // 2]
    expected = (radius[kept, None] / np.sqrt(distances2(REAL, GENERATED))[kept]).max(0)
    found = prdc(REAL, GENERATED)[5]
    np.testing.assert_allclose(found.realism_M, expected, rtol=1e-10)
    # Above 1 is inside one of the kept balls, so precision is at least that share.
    assert (found.realism_M >= 1).mean() <= found.precision.value


def test_neither_order_nor_blocks_matter(monkeypatch):
    whole = prdc(REAL, GENERATED)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(GENERATED))
    monkeypatch.setattr(module, "BLOCK", 37)
    other = prdc(REAL[rng.permutation(len(REAL))], GENERATED[order])
    for k in (3, 5):
        assert values(other[k]) == pytest.approx(values(whole[k]), rel=1e-12)
        np.testing.assert_allclose(whole[k].realism_M[order], other[k].realism_M, rtol=1e-8)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_set_and_itself(offset):
    """Copies lie on rims exactly; float32 rows far from the origin must not blur that."""
    rows = (REAL + np.float32(offset)).astype(np.float32)
    shuffled = rows[np.random.default_rng(1).permutation(len(rows))]
    found = prdc(rows, shuffled)
    for k in (3, 5):
        one = {"precision": 1, "recall": 1, "density": (k + 1) / k, "coverage": 1}
        if offset == 0:
            assert values(found[k]) == pytest.approx(one, rel=1e-12)
        # Rounded to steps of 1e-3, some distances are equal, which puts more on a rim.
        assert found[k].density.value == pytest.approx((k + 1) / k, rel=1e-2)
        assert found[k].precision.value == found[k].coverage.value == 1
        assert (found[k].realism_M == REALISM_CEILING).sum() >= len(rows) / 2


def test_rows_in_one_dimension():
    """0..9 on a line: the third neighbour is 2 steps away inside and 3 at the ends."""
    line = np.arange(10.0)[:, None]
    found = prdc(line, np.array([[4.5], [11.5], [13.0], [50.0]]), neighbours=[3])[3]
    assert found.precision.value == 0.5  # 11.5 is within 3 of 9
    assert found.density.value == pytest.approx((4 + 1) / 3 / 4)
    assert found.coverage.value == pytest.approx(5 / 10)


def test_repeated_rows_are_neighbours_and_have_no_radius():
    repeated = np.repeat(GENERATED[:20], 6, axis=0)
    found = prdc(REAL, repeated)
    assert found[5].recall.value == 0
    assert found[5].precision.value > 0.8
    of_repeated = prdc(np.repeat(REAL[:20], 6, axis=0), REAL[:40])
    assert of_repeated[5].precision.value == 0.5
    assert np.isnan(of_repeated[5].realism_M).all()


def test_intervals_hold_the_value_and_say_what_they_cover():
    found = prdc(REAL, GENERATED)[3]
    for name, resampled, n in (("precision", "generated", 240), ("recall", "real", 300)):
        finding = getattr(found, name)
        assert finding.low < finding.value < finding.high
        assert finding.n == n
        assert finding.method == f"bootstrap over {resampled} images, neighbourhoods fixed"
    p, n = found.precision.value, found.precision.n
    normal = 2 * 1.96 * (p * (1 - p) / n) ** 0.5
    assert found.precision.high - found.precision.low == pytest.approx(normal, rel=0.15)
    assert found.density.details == {"neighbours": 3, "real": 300, "generated": 240}


def test_too_few_rows_are_null_with_the_reason():
    found = prdc(REAL[:5], GENERATED)
    assert found[3].precision.value is not None
    assert all(value is None for value in values(found[5]).values())
    assert "more than 5 images" in found[5].recall.reason
    assert found[5].realism_M is None
    empty = prdc(REAL[:0], GENERATED)
    assert all(value is None for value in values(empty[3]).values())


@pytest.mark.parametrize(
    ("generated", "message"),
    [(GENERATED[:, :5], "widths 24 and 5"), (np.full_like(GENERATED, np.inf), "infinity")],
)
def test_bad_input_is_named(generated, message):
    with pytest.raises(ValueError, match=message):
        prdc(REAL, generated)
