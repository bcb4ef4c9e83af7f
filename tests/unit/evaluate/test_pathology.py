"""AUROC of a classifier on real and generated pictures, and the labels that it needs."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from arra.evaluate.pathology import (
    Scores,
    auroc,
    labels_by_caption,
    labels_of,
    pathology_auroc,
)

NAN = np.nan


def drawn(count, classes=3, shift=1.0, seed=0, ties=False):
    """Scores whose positives lie `shift` higher."""
    generator = np.random.default_rng(seed)
    labels_NC = generator.integers(0, 2, (count, classes)).astype(float)
    scores_NC = generator.normal(size=(count, classes)) + shift * labels_NC
    return Scores(scores_NC.round(1) if ties else scores_NC, labels_NC)


@pytest.mark.parametrize("ties", [False, True])
def test_equals_torchmetrics(ties):
    given = drawn(301, ties=ties)
    for c in range(3):
        scores_N, labels_N = given.scores_NC[:, c], given.labels_NC[:, c].copy()
        labels_N[::7] = NAN
        known_N = ~np.isnan(labels_N)
        # Torchmetrics squashes what is outside 0..1, so it gets the ranks' shape within it.
        share = torch.tensor(1 / (1 + np.exp(-scores_N[known_N])))
        expected = binary_auroc(share, torch.tensor(labels_N[known_N]).long())
        assert auroc(scores_N, labels_N) == pytest.approx(float(expected), rel=1e-6)


def test_closed_forms():
    assert auroc(np.array([1.0, 2, 3, 4]), np.array([0.0, 0, 1, 1])) == 1
    assert auroc(np.array([5.0, 5, 5, 5]), np.array([0.0, 0, 1, 1])) == 0.5
    assert np.isnan(auroc(np.array([1.0, 2]), np.array([1.0, 1])))


def test_lost_findings_are_caught_and_order_does_not_matter():
    real, generated = drawn(400, shift=2.0), drawn(300, shift=2.0, seed=1)
    same = pathology_auroc(real, generated, ["a", "b", "c"], resamples=200)
    assert same["auroc_difference"].low < 0 < same["auroc_difference"].high
    generated.scores_NC[:, 1] = drawn(300, shift=0.0, seed=2).scores_NC[:, 1]  # b is not painted
    found = pathology_auroc(real, generated, ["a", "b", "c"], resamples=200)
    assert found["auroc_difference"].low > 0.05
    by_class = found["auroc_difference"].details["classes"]
    assert by_class["b"]["low"] > 0.25
    assert by_class["a"] == same["auroc_difference"].details["classes"]["a"]
    order = np.random.default_rng(3).permutation(300)
    turned = Scores(generated.scores_NC[order], generated.labels_NC[order])
    again = pathology_auroc(real, turned, ["a", "b", "c"], resamples=200)
    for name in found:
        assert again[name].value == pytest.approx(found[name].value, rel=1e-12)


def test_too_few_pictures():
    real, generated = drawn(100, 2), drawn(100, 2, seed=1)
    generated.labels_NC[:, 1] = 0
    found = pathology_auroc(real, generated, ["a", "b"], resamples=50)
    assert set(found["auroc_real"].details["classes"]) == {"a"}
    assert "without b" in found["auroc_real"].reason
    generated.labels_NC[:, 0] = 0
    nothing = pathology_auroc(real, generated, ["a", "b"], resamples=50)
    assert nothing["auroc_generated"].value is None
    assert "5 pictures with it" in nothing["auroc_generated"].reason
    with pytest.raises(ValueError, match="NaN or infinity"):
        Scores(np.array([[NAN]]), np.array([[1.0]]))


CLASSES = ["Effusion", "Lung Opacity", ""]


def test_a_column_per_class():
    rows = [
        {"Pleural Effusion": 1.0, "lung_opacity": -1.0, "No Finding": None},
        {"Pleural Effusion": 0, "lung_opacity": NAN, "No Finding": ""},
        {"Pleural Effusion": None, "lung_opacity": "1.0", "No Finding": 1.0},
    ]
    expected = np.array([[1, NAN, NAN], [0, NAN, NAN], [0, 0, NAN]])
    np.testing.assert_array_equal(labels_of(rows, CLASSES), expected)
    expected[1, 1] = 0
    np.testing.assert_array_equal(labels_of(rows, CLASSES, unmentioned="negative"), expected)
    with pytest.raises(ValueError, match="column Pleural Effusion holds 'yes'"):
        labels_of([{"Pleural Effusion": "yes"}], CLASSES)


def test_a_column_of_names_or_numbers():
    rows = [
        {"finding": "Infiltration, Effusion"},
        {"finding": "No Finding"},
        {"finding": None},
        {"finding": "lung opacity|Pleural Effusion"},
    ]
    expected = np.array([[1, 0, NAN], [0, 0, NAN], [NAN] * 3, [1, 1, NAN]])
    np.testing.assert_array_equal(labels_of(rows, CLASSES), expected)
    numbers = labels_of([{"label": 1}, {"label": 0}], CLASSES, class_names=["normal", "effusion"])
    np.testing.assert_array_equal(numbers, [[1, 0, NAN], [0, 0, NAN]])
    with pytest.raises(ValueError, match="number 7, but the set names 2 classes"):
        labels_of([{"label": 7}], CLASSES, class_names=["normal", "effusion"])
    with pytest.raises(ValueError, match=r"no column says .* columns view"):
        labels_of([{"view": "AP"}], CLASSES)


def test_labels_go_by_the_caption():
    labels_NC = np.array([[1.0, 0], [1, 1], [0, 0]])
    found = labels_by_caption(["x", "y", "z"], ["x", "x", "y"], labels_NC)
    np.testing.assert_array_equal(found, [[1, NAN], [0, 0], [NAN, NAN]])
