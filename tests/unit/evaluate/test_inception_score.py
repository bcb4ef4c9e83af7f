"""Inception score against torchmetrics, the evaluators' formula and closed forms."""

import numpy as np
import pytest
import torch
from formula import fill

from arra.evaluate.inception_score import StreamedInceptionScore, inception_score

LOGITS = fill("metrics.logits", (400, 11), 2.0).numpy()


def formula(probabilities, parts):
    """exp of the mean KL divergence from each part's mean, as ADM's evaluator has it."""
    scores = []
    for part in np.array_split(probabilities, parts):
        kl = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(kl.sum(1).mean()))
    return np.mean(scores), np.std(scores, ddof=1)


def softmax(logits):
    return torch.from_numpy(logits).double().softmax(1).numpy()


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore`", "ignore:The ``compute`` method")
def test_equals_torchmetrics_on_its_own_splits(monkeypatch):
    inception = pytest.importorskip("torchmetrics.image.inception")
    monkeypatch.setattr(torch, "randperm", torch.arange)  # it shuffles: leave the order as it is
    theirs = inception.InceptionScore(feature=torch.nn.Identity(), splits=10)
    theirs.features = [torch.from_numpy(LOGITS).double()]
    mean, std = theirs.compute()
    ours = inception_score(LOGITS)
    assert ours.value == pytest.approx(float(mean), rel=1e-9)
    assert ours.details["std"] == pytest.approx(float(std), rel=1e-9)


def test_equals_the_formula_with_splits_of_a_size():
    probabilities = softmax(LOGITS)
    assert inception_score(LOGITS).value == pytest.approx(formula(probabilities, 10)[0], rel=1e-9)
    assert inception_score(LOGITS, split_size=100).value == pytest.approx(
        formula(probabilities, 4)[0], rel=1e-9
    )
    assert inception_score(LOGITS, split_size=399).details["smallest_split"] == 1
    from_probabilities = inception_score(np.log(probabilities))
    assert from_probabilities.value == pytest.approx(inception_score(LOGITS).value, rel=1e-9)


def test_closed_forms():
    """Sure of evenly many classes: their number; the same guess for all: 1."""
    with np.errstate(divide="ignore"):
        sure = np.log(np.eye(5)[np.arange(100) % 5])
    assert inception_score(sure).value == pytest.approx(5)
    assert inception_score(sure, splits=1).low is None
    assert inception_score(np.tile(LOGITS[:1], (100, 1))).value == pytest.approx(1)
    # A half-sure pair of classes of two kinds: KL from the mean is log 2.
    halves = np.where(np.arange(4) // 2 == np.arange(40)[:, None] % 2, 0.0, -np.inf)
    assert inception_score(halves, splits=2).value == pytest.approx(2)


def test_order_within_a_split_and_offsets_do_not_matter():
    rng = np.random.default_rng(0)
    shuffled = np.concatenate([rng.permutation(part) for part in np.split(LOGITS, 10)])
    offset = shuffled + rng.normal(size=(len(shuffled), 1)) * 50
    assert abs(inception_score(offset).value - inception_score(LOGITS).value) < 1e-8


def test_streamed_in_any_order_and_batches():
    keys = np.random.default_rng(1).integers(0, 2**64, 400, dtype=np.uint64)
    found = []
    for batch, order in ((400, np.arange(400)), (7, np.random.default_rng(2).permutation(400))):
        streamed = StreamedInceptionScore(classes=11)
        for start in range(0, 400, batch):
            rows = order[start : start + batch]
            streamed.add(LOGITS[rows], keys[rows])
        found.append(streamed.finding())
    assert abs(found[0].value - found[1].value) < 1e-8
    assert found[0].n == 400
    by_hand = [inception_score(LOGITS[keys % 10 == split], splits=1).value for split in range(10)]
    assert found[0].value == pytest.approx(np.mean(by_hand), rel=1e-9)
    empty = StreamedInceptionScore(classes=11)
    empty.add(LOGITS[:3], keys[:3])
    assert "splits empty" in empty.finding().reason


def test_interval_and_reason():
    found = inception_score(LOGITS)
    reach = 1.96 * found.details["std"] / 10**0.5
    assert (found.low, found.high) == pytest.approx((found.value - reach, found.value + reach))
    assert "splits of 40 images" in found.reason
    assert "need as many images, got 9" in inception_score(LOGITS[:9]).reason
    assert inception_score(LOGITS[:9]).value is None


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (LOGITS[0], "logits"),
        (np.full((20, 3), np.nan), "NaN"),
        (np.full((20, 3), -np.inf), "infinity"),
        (np.full((20, 3), np.inf), "infinity"),
    ],
)
def test_bad_input_is_named(logits, message):
    with pytest.raises(ValueError, match=message):
        inception_score(logits)
    with pytest.raises(ValueError, match="at least 1 split"):
        inception_score(LOGITS, splits=0)
