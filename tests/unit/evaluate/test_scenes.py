"""Scene accuracy on pictures whose answer is known."""

import numpy as np
import pytest
from PIL import Image

from arra.data.builtin import caption, draw, scene_at
from arra.evaluate.scenes import FIELDS, scene_accuracy, scene_verdicts

SCENES = [scene_at("test", i) for i in range(40)]
PICTURES = [draw(scene) for scene in SCENES]
CAPTIONS = [caption(scene) for scene in SCENES]


def test_true_pictures_are_right_and_whole():
    found = scene_accuracy(PICTURES, CAPTIONS)
    for field in FIELDS:
        assert found[field]["mean"] == 1
        assert found[field]["low"] < 1  # 40 pictures are no proof
    assert found["fragments"]["mean"] == 0
    assert found["all_right"]["n"] == 40
    assert found["relation"]["n"] < 40


def test_fields_that_nobody_asked_for_do_not_count():
    verdicts = scene_verdicts(PICTURES[:1], ["a circle"])
    assert np.isnan(verdicts["colour"]).all()
    assert np.isnan(verdicts["relation"]).all()
    assert scene_accuracy(PICTURES[:1], ["a circle"])["colour"] is None


def test_swapped_captions_are_wrong():
    found = scene_accuracy(PICTURES, CAPTIONS[1:] + CAPTIONS[:1])
    assert found["all_right"]["mean"] < 0.2


def test_grey_pictures_show_nothing():
    grey = [Image.new("RGB", (64, 64), (160, 160, 160))] * 40
    found = scene_accuracy(grey, CAPTIONS)
    assert found["colour"]["mean"] == 0
    assert found["all_right"]["mean"] == 0


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        (PICTURES[:2], CAPTIONS[:1], "needs the prompt"),
        ([np.zeros((32, 32, 3), np.uint8)], CAPTIONS[:1], "64x64"),
        (PICTURES[:1], ["chest x-ray, no findings"], "does not describe a scene"),
    ],
)
def test_what_cannot_be_judged_is_refused(images, captions, message):
    with pytest.raises(ValueError, match=message):
        scene_verdicts(images, captions)
