"""The probe: what a linear map reads from codes, on images it has not seen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from arra.image_tokenizers.measure import MeasureConfig, measure_tokenizer
from arra.image_tokenizers.probe import PENALTIES, _ridge, code_readings, explained


def test_a_linear_feature_is_read_whole_and_noise_not_at_all() -> None:
    random = np.random.default_rng(0)
    x_NF = random.normal(size=(400, 8))
    linear_NE = x_NF @ random.normal(size=(8, 5)) + 3.0
    assert explained(x_NF, linear_NE) == pytest.approx(1.0, abs=1e-6)
    noise_NE = random.normal(size=(400, 5))
    assert explained(x_NF, noise_NE) == pytest.approx(0.0, abs=0.05)
    half_NE = linear_NE + linear_NE.std() * random.normal(size=linear_NE.shape)
    assert explained(x_NF, half_NE) == pytest.approx(0.5, abs=0.1)


def test_more_inputs_than_images_and_inputs_that_never_change() -> None:
    random = np.random.default_rng(0)
    x_NF = random.normal(size=(100, 300))
    noise = explained(x_NF, random.normal(size=(100, 3)))
    assert noise is not None
    assert -0.3 < noise < 0.1  # the penalty keeps it from learning noise by heart
    assert explained(np.ones((100, 4)), random.normal(size=(100, 3))) == pytest.approx(0, abs=0.1)
    assert explained(x_NF[:39], random.normal(size=(39, 3))) is None
    assert explained(x_NF, np.ones((100, 3))) is None


def test_the_penalty_is_the_one_with_the_least_error_when_each_is_left_out() -> None:
    random = np.random.default_rng(1)
    x_NF = random.normal(size=(30, 12))
    x_NF -= x_NF.mean(axis=0)
    y_NE = x_NF[:, :2] + 2 * random.normal(size=(30, 2))
    y_NE -= y_NE.mean(axis=0)
    scale = np.linalg.svd(x_NF, compute_uv=False)
    scale = (scale**2).mean()

    def weights(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
        return np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)

    def left_out(penalty: float) -> float:
        error = 0.0
        for i in range(len(x_NF)):
            others = np.arange(len(x_NF)) != i
            x, y = x_NF[others], y_NE[others]
            found = weights(x - x.mean(axis=0), y - y.mean(axis=0), penalty)
            told = (x_NF[i] - x.mean(axis=0)) @ found + y.mean(axis=0)
            error += float(((y_NE[i] - told) ** 2).sum())
        return error

    best = min(PENALTIES * scale, key=left_out)
    assert np.allclose(_ridge(x_NF, y_NE), weights(x_NF, y_NE, best))


def test_readings() -> None:
    codes_NHW = torch.tensor([[[0, 1], [1, 1]], [[2, 2], [2, 2]]])
    codebook_KD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [9.0, 9.0]])
    readings = code_readings(codes_NHW, codebook_KD)
    assert readings["vectors"].tolist() == [[0.25, 0.75], [0.5, 0.5]]
    assert readings["counts"].tolist() == [[0.25, 0.75, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]


def test_in_the_report(tmp_path: Path) -> None:
    settings = MeasureConfig(
        "builtin:scenes",
        "builtin:scenes:1-4",
        str(tmp_path),
        split="test",
        limit=40,
        probe="builtin:scenes-clip@mean",
        device="cpu",
    )
    metrics = measure_tokenizer(settings)["metrics"]
    assert -1 < metrics["probe_vectors"] < 1
    assert -1 < metrics["probe_counts"] < 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["probe"]["pooling"] == "mean"
