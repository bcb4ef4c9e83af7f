"""FID, sFID and the Inception Score by the command: what the report has, and what is refused.

The network's own numbers are held in test_inception.py. Here a small stand-in with the same three
streams takes its place, but for one test.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from formula import fill
from inception_weights import FILE, weights
from PIL import Image

from arra.evaluate import reference
from arra.evaluate.distances import frechet
from arra.evaluate.image_set import digest_of, key_of
from arra.evaluate.inception_score import StreamedInceptionScore
from arra.evaluate.prdc import prdc
from arra.evaluate.protocol import evaluate
from arra.evaluate.settings import EvaluateConfig
from arra.files import sha256_of

SIDE, CELLS = 24, 4


class StandIn:
    """Colours of 4 x 4 cells: their means are `features`, the cells themselves are `spatial`."""

    name, doubts = "inception", ()

    def __init__(self, resize):
        self.streams = {"features": 6, "spatial": CELLS * CELLS * 3, "logits": 5}
        self.described = {"name": "inception", "fingerprint": "f" * 64, "resize": resize}

    def __call__(self, images):
        pixels_NHW3 = np.stack([np.asarray(each, np.float32) / 64 for each in images])
        count, step = len(images), SIDE // CELLS
        cells = pixels_NHW3.reshape(count, CELLS, step, CELLS, step, 3).mean((2, 4))
        spatial = cells.reshape(count, -1)
        features = np.concatenate([cells.mean((1, 2)), cells.std((1, 2))], axis=1)
        logits = (features[:, :3] - 1.9) @ fill("stand-in.classes", (3, 5), 20.0).numpy()
        return {"features": features, "spatial": spatial, "logits": logits}


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(
        reference, "open_extractor", lambda spec, device, *, resize: StandIn(resize)
    )


def mosaic(count, seed):
    """Pictures (count, 24, 24, 3) of 4 x 4 cells, brighter below than above."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 200, (count, CELLS, CELLS, 3)) + 14 * np.arange(CELLS)[:, None, None]
    return cells.astype(np.uint8).repeat(SIDE // CELLS, axis=1).repeat(SIDE // CELLS, axis=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    np.savez(path / "real.npz", arr_0=mosaic(120, 0))
    np.savez(path / "generated.npz", arr_0=mosaic(150, 1))
    return path


def asked(folder, **given):
    return EvaluateConfig(
        **{
            "real": str(folder / "real.npz"),
            "generated": str(folder / "generated.npz"),
            "extractor": ("inception",),
            "metrics": "fd,sfid,is",
            "device": "cpu",
            **given,
        }
    )


def rows(path):
    arrays = np.load(path)["arr_0"]
    images = [Image.fromarray(each) for each in arrays]
    return StandIn("tf1")(images), np.array([key_of(digest_of(each)) for each in images], np.uint64)


def test_values_are_those_of_the_streams(stand_in, folder):
    report = evaluate(asked(folder))
    real, _ = rows(folder / "real.npz")
    generated, keys_M = rows(folder / "generated.npz")
    score = StreamedInceptionScore(5)
    score.add(generated["logits"], keys_M)
    assert report["metrics"] == pytest.approx(
        {
            "fd@inception": frechet(real["features"], generated["features"]),
            "sfid@inception": frechet(real["spatial"], generated["spatial"]),
            "is@inception": score.finding().value,
        },
        rel=1e-6,
    )
    assert set(report["intervals"]) == set(report["metrics"])
    assert report["counts"]["sfid@inception"] == [120, 150]
    assert "biased low" in report["reasons"]["is@inception"]


def test_inception_score_needs_no_reference(stand_in, folder):
    alone = evaluate(asked(folder, real=None, metrics="is"))
    beside = evaluate(asked(folder))
    assert alone["metrics"] == {"is@inception": beside["metrics"]["is@inception"]}


def test_batch_size_order_and_threads_do_not_matter(stand_in, folder, tmp_path):
    np.savez(tmp_path / "generated.npz", arr_0=mosaic(150, 1)[::-1])
    np.savez(tmp_path / "real.npz", arr_0=mosaic(120, 0)[::-1])
    first = evaluate(asked(folder, batch_size=64, workers=1))["metrics"]
    second = evaluate(asked(tmp_path, batch_size=7, workers=3))["metrics"]
    assert first == pytest.approx(second, rel=1e-6)


def test_the_filter_reaches_network_and_report(stand_in, folder):
    report = evaluate(asked(folder, metrics="fd", resize="clean"))
    assert report["extractors"]["inception"]["resize"] == "clean"


def test_as_many_pictures_are_compared_each_with_each_as_asked(stand_in, folder):
    real, keys_N = rows(folder / "real.npz")
    generated, keys_M = rows(folder / "generated.npz")
    for some in (50, 150):
        report = evaluate(asked(folder, metrics="fd,prdc", paired_images=some))
        smallest = [np.argsort(keys)[:some] for keys in (keys_N, keys_M)]
        wanted = prdc(real["features"][smallest[0]], generated["features"][smallest[1]])[3]
        assert report["metrics"]["recall@inception"] == pytest.approx(wanted.recall.value)
        assert report["metrics"]["precision@inception"] == pytest.approx(wanted.precision.value)


def mirrored(arrays):
    """Cells put elsewhere: all is there as before, but upside down."""
    return arrays[:, ::-1]


def test_moved_patches_are_noticed_by_sfid_and_not_by_fid(stand_in, folder, tmp_path):
    np.savez(tmp_path / "generated.npz", arr_0=mirrored(mosaic(150, 1)))
    real = str(folder / "real.npz")
    sound = evaluate(asked(folder))["metrics"]
    moved = evaluate(asked(tmp_path, real=real))["metrics"]
    assert moved["fd@inception"] == pytest.approx(sound["fd@inception"], rel=1e-6)
    assert moved["is@inception"] == pytest.approx(sound["is@inception"], rel=0.05)  # other splits
    assert moved["sfid@inception"] > 2 * sound["sfid@inception"]


def test_lost_classes_are_noticed_by_inception_score(stand_in, folder, tmp_path):
    generated, _ = rows(folder / "generated.npz")
    kept = generated["logits"].argmax(1) == np.bincount(generated["logits"].argmax(1)).argmax()
    np.savez(tmp_path / "generated.npz", arr_0=mosaic(150, 1)[kept])
    sound = evaluate(asked(folder, real=None, metrics="is"))
    lost = evaluate(asked(tmp_path, real=None, metrics="is"))
    assert lost["metrics"]["is@inception"] < sound["intervals"]["is@inception"]["low"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"extractor": ("builtin:scenes-judge",)}, "sfid,is is of streams that only FID's"),
        ({"extractor": ("x",), "metrics": "fd", "resize": "clean"}, "of --extractor inception"),
        ({"extractor": ()}, "--extractor inception"),
        ({"save_moments": "x.npz", "real": None, "metrics": "is"}, "--save-moments is of --real"),
    ],
)
def test_wrong_use_is_told_before_anything_is_loaded(folder, given, message):
    with pytest.raises(ValueError, match=message):
        asked(folder, **given)


def test_other_extractors_beside_it_have_fd_alone(stand_in, folder, monkeypatch):
    def opened(spec, device, *, resize):
        found = StandIn(resize)
        if spec != "inception":
            found.name, found.streams = "other", {"features": 6}
        return found

    monkeypatch.setattr(reference, "open_extractor", opened)
    report = evaluate(asked(folder, extractor=("other", "inception")))
    assert set(report["metrics"]) == {
        *("fd@other", "fd@inception", "sfid@inception", "is@inception"),
    }


# ---- moments in the place of images --------------------------------------------------------------


@pytest.fixture
def saved(stand_in, folder, tmp_path):
    """A report, and the moments that it kept of its reference."""
    path = tmp_path / "moments.npz"
    return evaluate(asked(folder, metrics="fd,sfid,fd_infinity", save_moments=path)), path


def test_moments_that_were_kept_give_the_same_distances(saved, folder):
    first, path = saved
    second = evaluate(asked(folder, real=str(path), metrics="fd,sfid,fd_infinity"))
    assert second["metrics"] == pytest.approx(first["metrics"], rel=1e-8)
    assert first["metrics"]["fd_infinity@inception"] is not None
    ends = [report["intervals"]["fd@inception"]["high"] for report in (first, second)]
    assert ends[1] == pytest.approx(ends[0], rel=1e-6)
    assert second["counts"] == first["counts"]
    assert second["warnings"] == []
    real = second["real"]
    assert real["n"] == 120
    assert real["sha256"] == real["moments"]["sha256"] == sha256_of(path)
    assert real["moments"]["about"]["set"]["sha256"] == first["real"]["sha256"]


def test_what_compares_pictures_is_null_with_moments_alone(saved, folder):
    metrics = "fd,kid,cmmd,prdc,vendi,ms_ssim_paired"
    report = evaluate(asked(folder, real=str(saved[1]), metrics=metrics))
    null = {key for key, value in report["metrics"].items() if value is None}
    assert null == {
        *("kid@inception", "cmmd@inception", "ms_ssim_paired", "precision@inception"),
        *("recall@inception", "density@inception", "coverage@inception"),
    }
    for key in null:
        assert "not the images" in report["reasons"][key]


def adm_reference(path, folder, **more):
    """As published ones: pictures, and moments of a larger set than these."""
    whole, _ = rows(folder / "real.npz")
    arrays = {}
    for end, stream in (("", "features"), ("_s", "spatial")):
        arrays |= {
            f"mu{end}": whole[stream].mean(0),
            f"sigma{end}": np.cov(whole[stream], rowvar=False),
        }
    np.savez(path, **arrays, **more)
    return str(path)


def test_a_published_reference_has_moments_of_all_and_pictures_of_some(stand_in, folder, tmp_path):
    some = np.load(folder / "real.npz")["arr_0"][:40]
    real = adm_reference(tmp_path / "reference.npz", folder, arr_0=some)
    found = evaluate(asked(folder, real=real, metrics="fd,sfid,prdc"))
    whole = evaluate(asked(folder, metrics="fd,sfid"))["metrics"]
    alone = asked(folder, real=str(tmp_path / "some.npz"), metrics="prdc")
    np.savez(tmp_path / "some.npz", arr_0=some)
    wanted = whole | evaluate(alone)["metrics"]
    assert found["metrics"] == pytest.approx(wanted, rel=1e-5)
    assert found["counts"]["fd@inception"] == [None, 150]  # such a file does not say
    assert found["counts"]["precision@inception"] == [40, 150]
    assert found["real"]["n"] == 40
    assert found["real"]["moments"]["streams"] == ["features", "spatial"]
    assert found["warnings"] == []


def test_doubts_about_others_moments_are_told(stand_in, folder, tmp_path):
    real = adm_reference(tmp_path / "reference.npz", folder)
    report = evaluate(asked(folder, real=real, metrics="fd", resize="clean"))
    assert "does not say with which resize filter" in report["warnings"][0]


def test_moments_without_the_spatial_ones_have_no_sfid(stand_in, folder, tmp_path):
    whole, _ = rows(folder / "real.npz")
    mean, covariance = whole["features"].mean(0), np.cov(whole["features"], rowvar=False)
    np.savez(tmp_path / "clean-fid.npz", mu=mean, sigma=covariance)
    report = evaluate(asked(folder, real=str(tmp_path / "clean-fid.npz"), metrics="fd,sfid"))
    assert report["metrics"]["fd@inception"] > 0
    assert report["metrics"]["sfid@inception"] is None
    assert "no moments of this extractor's spatial" in report["reasons"]["sfid@inception"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"resize": "clean"}, "made with another resize"),
        ({"size": 12}, "made with another size"),
        ({"save_moments": Path("x.npz")}, "holds moments already"),
    ],
)
def test_moments_made_otherwise_are_refused(saved, folder, given, message):
    with pytest.raises(ValueError, match=message):
        evaluate(asked(folder, real=str(saved[1]), metrics="fd", **given))


def test_one_picture_has_no_moments(stand_in, folder, tmp_path):
    with pytest.raises(ValueError, match="one image has no covariance"):
        evaluate(asked(folder, metrics="fd", limit=1, save_moments=tmp_path / "x.npz"))


def test_moments_of_another_network_are_refused(stand_in, folder, tmp_path):
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match=r"features of 3 dimensions, inception has 6"):
        evaluate(asked(folder, real=str(tmp_path / "other.npz"), metrics="fd"))


# ---- the network ---------------------------------------------------------------------------------


def by_the_network(folder, metrics, step=1, batch=64):
    """A report of 3 and 4 pictures, in order or in reverse, under the network itself."""
    shapes = json.loads(FILE.read_text("utf-8"))["torch-fidelity"]["shapes"]
    torch.save(weights(shapes), folder / "weights.pth")
    np.savez(folder / "real.npz", arr_0=mosaic(3, 0)[::step])
    np.savez(folder / "generated.npz", arr_0=mosaic(4, 1)[::step])
    extractor = (f"inception:{folder / 'weights.pth'}",)
    given = {"metrics": metrics, "batch_size": batch, "workers": batch}
    return evaluate(asked(folder, extractor=extractor, **given))


def test_the_network_itself_by_the_command(tmp_path):
    report = by_the_network(tmp_path, "fd")
    assert report["metrics"]["fd@inception"] > 0
    assert "rank deficient" in report["reasons"]["fd@inception"]
    assert report["extractors"]["inception"]["resize"] == "tf1"
    assert "fd@inception is not FID" in report["warnings"][0]


@pytest.mark.long
def test_batch_size_order_and_threads_do_not_matter_to_the_network(tmp_path):
    first = by_the_network(tmp_path, "fd,sfid")["metrics"]
    second = by_the_network(tmp_path, "fd,sfid", step=-1, batch=2)["metrics"]
    assert first == pytest.approx(second, rel=1e-4)
