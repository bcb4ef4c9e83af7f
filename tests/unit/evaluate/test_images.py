"""Sets of images: what they are read from, and that a bad image is never passed over."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from arra.evaluate.features import image_features
from arra.evaluate.images import load_images


def paint(folder, count=3, size=64):
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for n in range(count):
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        rows.append({"file": f"{n}.png", "prompt": f"a red circle {n}", "seed": n})
    return rows


def write_listing(folder, rows):
    (folder / "images.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")


def test_painted_folder_brings_its_prompts(tmp_path):
    rows = paint(tmp_path / "out")
    write_listing(tmp_path / "out", rows[::-1])
    found = load_images(tmp_path / "out")
    assert found.names == ("2.png", "1.png", "0.png")
    assert found.captions == ("a red circle 2", "a red circle 1", "a red circle 0")
    assert found.sizes == [(64, 64)]
    assert len(load_images(tmp_path / "out", limit=2)) == 2


def test_plain_folder_has_no_captions(tmp_path):
    paint(tmp_path / "out")
    found = load_images(str(tmp_path / "out"))
    assert found.names == ("0.png", "1.png", "2.png")
    assert found.captions is None


def test_scenes_are_a_set():
    found = load_images("builtin:scenes", split="test", limit=4)
    assert len(found) == 4
    assert found.captions is not None


def test_bad_images_are_named_and_refused(tmp_path):
    paint(tmp_path / "out", count=4)
    (tmp_path / "out" / "1.png").write_bytes(b"")
    whole = (tmp_path / "out" / "2.png").read_bytes()
    (tmp_path / "out" / "2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"2 of 4 images") as error:
        load_images(tmp_path / "out")
    assert "1.png" in str(error.value)
    assert "2.png" in str(error.value)


def test_missing_painted_file_and_broken_listing(tmp_path):
    rows = paint(tmp_path / "out")
    write_listing(tmp_path / "out", [*rows, {"file": "gone.png", "prompt": "x", "seed": 1}])
    with pytest.raises(ValueError, match=r"gone\.png"):
        load_images(tmp_path / "out")
    (tmp_path / "out" / "images.jsonl").write_text('{"file": "0.png"}\n{"fi', "utf-8")
    with pytest.raises(ValueError, match="line 2"):
        load_images(tmp_path / "out")


def test_empty_folder_is_refused(tmp_path):
    (tmp_path / "images.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no images"):
        load_images(tmp_path)


def test_features_keep_the_order_whatever_the_batch():
    images = [Image.new("RGB", (4, 4), (n, 0, 0)) for n in range(7)]

    def encoder(batch):
        return torch.tensor([[i.getpixel((0, 0))[0], 1.0] for i in batch])

    for batch_size in (1, 3, 7, 64):
        features = image_features(iter(images), encoder, batch_size=batch_size)
        assert features.dtype == np.float64
        assert features[:, 0].tolist() == list(range(7))
    with pytest.raises(ValueError, match="no images"):
        image_features([], encoder)
