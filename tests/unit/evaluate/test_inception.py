"""FID's network and the ways to its 299 pixels, against torch-fidelity, clean-fid and TensorFlow.

The weights are made by formula (tests/golden/inception_weights.py): the same in every library.
"""

import json

import numpy as np
import pytest
import torch
from inception_weights import EVERY, EVERY_PIXEL, FILE, SIDES, kept, pixels, weights
from PIL import Image

from arra.evaluate.extractors import open_extractor
from arra.evaluate.inception import FILES, SHA256_HEAD, InceptionFeatures
from arra.evaluate.inception_network import STREAMS, Inception
from arra.evaluate.resizing import RESIZES

GOLDEN = json.loads(FILE.read_text("utf-8"))


def pictures(side, count=2):
    return [Image.fromarray(each) for each in pixels(side, count)]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights(GOLDEN["torch-fidelity"]["shapes"]), path)
    return path


@pytest.fixture(scope="module")
def extractor(file):
    return InceptionFeatures(file, "cpu", "tf1")


def test_tensors_have_the_published_names_and_shapes():
    with torch.device("meta"):
        found = {name: list(each.shape) for name, each in Inception().state_dict().items()}
    assert found == GOLDEN["torch-fidelity"]["shapes"]


@pytest.mark.parametrize("side", SIDES)
def test_streams_equal_torch_fidelity(extractor, side):
    streams = extractor(pictures(side))
    assert {name: rows.shape for name, rows in streams.items()} == {
        name: (2, width) for name, width in STREAMS.items()
    }
    golden = GOLDEN["torch-fidelity"][str(side)]
    for name, rows in streams.items():
        assert rows.dtype == np.float32
        np.testing.assert_allclose(kept(rows, EVERY), golden[name], rtol=1e-5, atol=1e-5)


def test_streams_equal_the_library_where_it_is_installed(extractor):
    pytest.importorskip("torchvision")
    pytest.importorskip("torch_fidelity")
    import inception_weights

    recorded = inception_weights.of_torch_fidelity()
    for side in SIDES:
        for name, rows in extractor(pictures(side)).items():
            np.testing.assert_allclose(kept(rows), recorded[str(side)][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_resize_filters_equal_their_originals(side):
    images, at = pictures(side), str(side)
    tf1 = RESIZES["tf1"](images)
    assert tf1.dtype == torch.float32
    assert tf1.shape == (2, 3, 299, 299)
    golden = {
        "torch-fidelity": (tf1, GOLDEN["torch-fidelity"][at]["resized"]),
        "tensorflow": (tf1 * 128 + 128, GOLDEN["tensorflow"][at]),
        "clean-fid": (RESIZES["clean"](images) * 128 + 128, GOLDEN["clean-fid"]["clean"][at]),
        "pytorch": (
            (RESIZES["pytorch"](images) + 1) / 2 * 255,
            GOLDEN["clean-fid"]["legacy_pytorch"][at],
        ),
    }
    for source, (found, wanted) in golden.items():
        np.testing.assert_allclose(
            kept(found, EVERY_PIXEL), wanted, rtol=1e-6, atol=2e-5, err_msg=source
        )


def test_filters_differ_by_much_more_than_that():
    one, other, third = (each(pictures(347)) for each in RESIZES.values())
    assert (one - other).abs().mean() > 0.01
    assert (one - third).abs().mean() > 0.01
    assert (other - third).abs().mean() > 0.01


def test_a_picture_of_the_right_size_is_left_alone():
    wanted = (torch.from_numpy(pixels(299)).permute(0, 3, 1, 2).float() - 128) / 128
    for name in ("tf1", "clean"):
        torch.testing.assert_close(RESIZES[name](pictures(299)), wanted, rtol=0, atol=0)


def test_neither_batch_nor_order_changes_a_picture(extractor):
    images = pictures(64, 6)
    together = extractor(images)
    for name, rows in extractor(images[::-1]).items():
        np.testing.assert_allclose(rows[::-1], together[name], rtol=1e-4, atol=1e-5)
    parts = [extractor(images[:4]), extractor(images[4:])]
    for name, rows in together.items():
        found = np.concatenate([part[name] for part in parts])
        np.testing.assert_allclose(found, rows, rtol=1e-4, atol=1e-5)


def test_a_spec_names_the_file_and_the_report_says_what_it_is(file):
    found = open_extractor(f"inception:{file}", "cpu", resize="clean")
    assert found.name == "inception"
    assert found.described["resize"] == "clean"
    assert found.described["spec"] == f"inception:{file}"
    assert len(found.described["fingerprint"]) == 64
    assert "fd@inception is not FID" in found.doubts[0]  # as for any file but the published one


def test_the_published_file_is_found_in_pytorchs_cache(monkeypatch, tmp_path, file):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    for name in FILES:
        assert SHA256_HEAD in name
        (cache / name).symlink_to(file)
        assert open_extractor("inception", "cpu", resize="tf1").described["spec"] == "inception"
        (cache / name).unlink()


def test_without_file_or_network_it_says_where_to_place_which(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(ValueError, match=r"no network.*place it in .*checkpoints.*inception:FILE"):
        open_extractor("inception", "cpu", resize="tf1")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.pth: expected a checkpoint file, found nothing"):
        open_extractor(f"inception:{tmp_path}/none.pth", "cpu", resize="tf1")
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not hold FID's Inception network"):
        open_extractor(f"inception:{tmp_path}/other.pth", "cpu", resize="tf1")
