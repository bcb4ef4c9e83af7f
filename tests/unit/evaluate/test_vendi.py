"""Vendi score against the original's values, closed forms, and its two Gram matrices."""

import json
from pathlib import Path

import numpy as np
import pytest
from formula import fill

from arra.evaluate.vendi import vendi_score

GOLDEN = json.loads(
    (Path(__file__).parents[2] / "golden/pairwise_metrics.json").read_text(encoding="utf-8")
)["vendi"]
ROWS = fill("metrics.real", (300, 24), 1.0).numpy()
FEW = (fill("metrics.generated", (240, 24), 0.9) + 0.15).numpy()[:15]


def test_equals_the_original():
    assert vendi_score(ROWS).value == pytest.approx(GOLDEN["score_X"], rel=1e-9)
    assert vendi_score(ROWS).value == pytest.approx(GOLDEN["score_dual"], rel=1e-9)
    assert vendi_score(FEW).value == pytest.approx(GOLDEN["few"], rel=1e-9)


def test_counts_different_pictures():
    assert vendi_score(np.eye(7)).value == pytest.approx(7)
    assert vendi_score(np.repeat(np.eye(7), 5, axis=0)).value == pytest.approx(7)
    assert vendi_score(np.outer(np.arange(1, 6), np.ones(3))).value == pytest.approx(1)
    # Shares 3/4 and 1/4 of two orthogonal pictures: exp of that entropy.
    uneven = np.eye(2)[[0, 0, 0, 1]]
    assert vendi_score(uneven).value == pytest.approx(4 / 3**0.75)


def test_order_length_and_width_do_not_matter():
    rng = np.random.default_rng(0)
    scaled = (ROWS * rng.uniform(0.1, 10, (len(ROWS), 1)))[rng.permutation(len(ROWS))]
    assert abs(vendi_score(scaled).value - vendi_score(ROWS).value) < 1e-8
    wide = np.pad(ROWS, ((0, 0), (0, 400)))  # now the other Gram matrix is the smaller
    assert abs(vendi_score(wide).value - vendi_score(ROWS).value) < 1e-8


def test_few_and_bad_rows():
    assert vendi_score(ROWS[:1]).value == pytest.approx(1)
    assert vendi_score(ROWS[:0]).reason == "no images"
    assert vendi_score(FEW).details == {"most_possible": 15}
    with pytest.raises(ValueError, match="row 0"):
        vendi_score(np.zeros((3, 4)))
    with pytest.raises(ValueError, match="NaN"):
        vendi_score(np.full((3, 4), np.nan))
