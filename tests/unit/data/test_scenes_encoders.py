"""The two bundled encoders: whole, small, and they see what scenes are made of."""

import numpy as np
import pytest
import torch
from PIL import Image

from arra.data.builtin import draw, scene_at
from arra.data.scenes.world import COLOURS, KINDS
from arra.encoders import load_encoder
from arra.files import read_json, sha256_of
from arra.resolve import BUNDLED

FOLDERS = ("scenes-clip", "scenes-judge")
# Of 500 training images; the judge knows kinds less well (experiments/bundled/LOG.md).
LEAST = {
    "scenes-clip": {"colour": 0.95, "kind": 0.9, "side": 0.9},
    "scenes-judge": {"colour": 0.95, "kind": 0.55, "side": 0.6},
}


def test_checksums_cover_every_bundled_file():
    files = [path for folder in FOLDERS for path in (BUNDLED / folder).iterdir()]
    sums = read_json(BUNDLED / "SHA256SUMS.json")
    assert {path.relative_to(BUNDLED).as_posix(): sha256_of(path) for path in files} == {
        name: value for name, value in sums.items() if name.startswith(FOLDERS)
    }
    assert sum(path.stat().st_size for path in files) <= 1.9e6


def features_and_shapes(encoder, split, count):
    scenes = [scene_at(split, index, seed=6, shapes=(1, 1)) for index in range(count)]
    images = [Image.fromarray(draw(scene)) for scene in scenes]
    with torch.no_grad():
        return encoder(images), [scene.shapes[0] for scene in scenes]


def fit_and_score(train_ND, train_N, test_ND, test_N):
    """Accuracy of least squares onto one-hot classes."""
    rows = np.concatenate([train_ND, np.ones((len(train_ND), 1))], 1)
    one_hot = np.eye(max(train_N) + 1)[train_N]
    weight = np.linalg.solve(rows.T @ rows + np.eye(rows.shape[1]), rows.T @ one_hot)
    guess_N = (np.concatenate([test_ND, np.ones((len(test_ND), 1))], 1) @ weight).argmax(1)
    return float((guess_N == np.array(test_N)).mean())


@pytest.mark.parametrize("name", ["scenes-clip@class", "scenes-judge@class"])
def test_colour_kind_and_side_can_be_read_from_the_features(name):
    encoder = load_encoder(f"builtin:{name}")
    train_ND, train = features_and_shapes(encoder, "train", 500)
    test_ND, test = features_and_shapes(encoder, "test", 200)
    assert train_ND.shape == (500, encoder.dim)
    assert train_ND.dtype == torch.float32
    questions = {
        "colour": lambda shape: list(COLOURS).index(shape.colour),
        "kind": lambda shape: KINDS.index(shape.kind),
        "side": lambda shape: int(shape.x > 31),
    }
    for question, of in questions.items():
        score = fit_and_score(train_ND, [of(s) for s in train], test_ND, [of(s) for s in test])
        assert score >= LEAST[name.split("@")[0]][question], (question, score)
