"""torchxrayvision's DenseNet as an extractor, and the AUROC of its pathologies on two sets."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from arra.evaluate import xrv
from arra.evaluate.conditions import differences
from arra.evaluate.extractors import open_extractor
from arra.evaluate.protocol import evaluate
from arra.evaluate.settings import EvaluateConfig
from arra.evaluate.xrv import LOGITS, PATHOLOGIES, DenseNet, open_xrv, pixels
from arra.files import read_json

sys.path.insert(0, str(Path(__file__).parents[2] / "golden"))
import xrv_weights as tiny

GOLDEN = read_json(Path(__file__).parents[2] / "golden" / "xrv.json")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """What torchxrayvision's state_dict holds: the tensors and the operating points."""
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in DenseNet().state_dict().items()}
    assert len(shapes) == GOLDEN["keys"]
    path = tmp_path_factory.mktemp("xrv") / "xrv.pt"
    torch.save(tiny.weights(shapes) | {"op_threshs": tiny.thresholds()}, path)
    return path


@pytest.fixture(scope="module")
def network(file):
    return open_extractor(f"xrv:{file}", "cpu", resize="tf1")


def test_pictures_come_as_torchxrayvision_brings_them():
    for picture, corner, total in zip(
        tiny.pictures(), GOLDEN["pixels"], GOLDEN["pixel_sums"], strict=True
    ):
        seen = pixels(picture)
        assert seen.shape == (224, 224)
        np.testing.assert_allclose(seen[::56, ::56].ravel(), corner, rtol=1e-5, atol=1e-3)
        assert seen.sum(dtype=np.float64) == pytest.approx(total, rel=1e-6)


def test_equals_torchxrayvision(network):
    found = network(tiny.pictures())
    assert GOLDEN["pathologies"] == list(PATHOLOGIES)
    features, logits = np.array(GOLDEN["features"]), np.array(GOLDEN["logits"])
    np.testing.assert_allclose(found["features"][:, ::32], features, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found["features"].sum(1), GOLDEN["feature_sums"], rtol=1e-5)
    np.testing.assert_allclose(found[LOGITS], logits, rtol=1e-4, atol=1e-2)
    assert features.std(0).max() > 1


def test_a_picture_does_not_depend_on_those_beside_it(network):
    together = network(tiny.pictures())
    alone = network(tiny.pictures()[1:2])
    np.testing.assert_allclose(alone["features"][0], together["features"][1], rtol=1e-4, atol=1e-3)
    again = network(tiny.pictures())
    np.testing.assert_array_equal(again[LOGITS], together[LOGITS])


def test_outputs_that_were_never_trained_are_no_classes(network):
    untrained = {PATHOLOGIES[p] for p in tiny.UNTRAINED}
    assert set(network.classes) == set(PATHOLOGIES) - untrained
    assert network.classes["Fracture"] == 15
    assert network.described["classes"] == list(network.classes)


class _Program(nn.Module):
    """A whole module, as torchxrayvision's files hold one."""


def test_files_that_hold_something_else(file, tmp_path):
    torch.save(_Program(), tmp_path / "whole.pt")
    with pytest.raises(ValueError, match=r"nothing of it was run.*state_dict\(\), 'xrv.pt'"):
        open_xrv(f"xrv:{tmp_path / 'whole.pt'}", "cpu")
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="does not hold torchxrayvision's DenseNet-121"):
        open_xrv(f"xrv:{tmp_path / 'other.pt'}", "cpu")
    with pytest.raises(ValueError, match="needs its file of weights"):
        open_xrv("xrv", "cpu")


# ---- through arra evaluate -----------------------------------------------------------------------

COUNT = 24


class _Quick(nn.Module):
    """In the place of the DenseNet: random projections of a picture at 7 x 7 pixels."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(49, 1024, generator=generator)
        self.logits = torch.randn(49, 18, generator=generator)

    def forward(self, pixels_N1HW):
        seen = torch.nn.functional.avg_pool2d(pixels_N1HW, 32).flatten(1) / 1024
        return {"features": seen @ self.features, LOGITS: seen @ self.logits}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(xrv, "_loaded", lambda file: (_Quick(), tiny.thresholds()))


def ray(index):
    """A smooth grey picture; those of odd number have a bright patch."""
    rng = np.random.default_rng(index)
    coarse = rng.integers(60, 120, (4, 4)).astype(np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC)).copy()
    if index % 2:
        pixels[8:24, 8:24] = 250
    return Image.fromarray(pixels).convert("RGB")


def labelled(folder, first, captions=False, labels=True):
    """COUNT pictures whose metadata say who has a patch, in three pathologies' columns."""
    folder.mkdir()
    rows = []
    for index in range(first, first + COUNT):
        ray(index).save(folder / f"{index}.png")
        row = {"file_name": f"{index}.png", "text": f"ray {index - first}" if captions else "ray"}
        if labels:
            row |= {"Edema": index % 2, "Pleural Effusion": 1 - index % 2, "Fracture": ""}
        rows.append(row)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def config(file, **given):
    return EvaluateConfig(extractor=(f"xrv:{file}",), device="cpu", **{"metrics": "auroc"} | given)


def test_distance_and_auroc_through_evaluate(file, quick, tmp_path):
    real, painted = labelled(tmp_path / "real", 0), labelled(tmp_path / "painted", 100)
    report = evaluate(config(file, real=real, generated=painted, metrics="fd,auroc"))
    values = report["metrics"]
    assert values["fd@xrv"] > 0
    classes = report["details"]["auroc_real@xrv"]["classes"]
    assert set(classes) == {"Edema", "Effusion"}
    assert classes["Edema"]["auroc"] in (0.0, 1.0)  # a patch is told apart, one way or the other
    assert classes["Edema"]["positives"] == COUNT // 2
    assert "Fracture" in report["details"]["auroc_real@xrv"]["left_out"]
    assert (
        values["auroc_difference@xrv"] == values["auroc_real@xrv"] - values["auroc_generated@xrv"]
    )
    assert (
        report["judges"]["auroc@xrv"]["fingerprint"] == report["extractors"]["xrv"]["fingerprint"]
    )
    other = evaluate(config(file, real=real, generated=painted, batch_size=5, workers=1))
    of_auroc = {key: value for key, value in values.items() if key.startswith("auroc")}
    assert other["metrics"] == pytest.approx(of_auroc, rel=1e-4)


def test_swapped_findings_are_noticed_by_auroc_alone(file, quick, tmp_path):
    """The planted defect: pictures of the right distribution under the wrong findings."""
    real = labelled(tmp_path / "real", 0)
    sound, swapped = (labelled(tmp_path / name, 100) for name in ("sound", "swapped"))
    listing = Path(swapped) / "metadata.jsonl"
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    for row in rows:
        row["Edema"], row["Pleural Effusion"] = row["Pleural Effusion"], row["Edema"]
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = (
        evaluate(config(file, real=real, generated=each, metrics="fd,vendi,auroc"))
        for each in (sound, swapped)
    )
    for key in ("fd@xrv", "vendi@xrv"):
        assert two["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-8)
    first, second = (
        report["details"]["auroc_generated@xrv"]["classes"]["Edema"]["auroc"]
        for report in (one, two)
    )
    assert abs(first - second) == 1.0
    assert one["details"]["auroc_real@xrv"] == two["details"]["auroc_real@xrv"]


def test_other_labels_are_another_reference(file, quick, tmp_path):
    real = labelled(tmp_path / "real", 0)
    relabelled = labelled(tmp_path / "relabelled", 0)
    listing = Path(relabelled) / "metadata.jsonl"
    listing.write_text(listing.read_text().replace('"Edema": 1', '"Edema": -1', 1))
    one, same, two = (
        evaluate(config(file, real=each, generated=real)) for each in (real, real, relabelled)
    )
    assert differences(one, same) == []
    assert "labels_sha256 of auroc_real@xrv" in " ".join(differences(one, two))


def test_painted_pictures_have_the_labels_of_their_captions(file, quick, tmp_path):
    real = labelled(tmp_path / "real", 0, captions=True)
    painted = tmp_path / "painted"
    painted.mkdir()
    rows = []
    for index in range(COUNT):
        ray(200 + index).save(painted / f"{index}.png")
        rows.append({"file": f"{index}.png", "prompt": f"ray {index}", "seed": 0})
    (painted / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = evaluate(config(file, real=real, generated=str(painted)))
    own = evaluate(config(file, real=real, generated=labelled(tmp_path / "own", 200)))
    key = "auroc_generated@xrv"
    assert report["metrics"][key] == own["metrics"][key]
    for path in painted.glob("*.jsonl"):
        path.unlink()
    with pytest.raises(ValueError, match="neither columns that say what its pictures show, nor"):
        evaluate(config(file, real=real, generated=str(painted)))


def test_labels_of_one_column(file, quick, tmp_path):
    by_class = labelled(tmp_path / "one", 0)
    named = labelled(tmp_path / "two", 0, labels=False)
    listing = Path(named) / "metadata.jsonl"
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    for index, row in enumerate(rows):
        row["shown"] = "Edema|Mass" if index % 2 else "Effusion"
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = evaluate(config(file, real=by_class, generated=by_class))
    two = evaluate(config(file, real=named, generated=named, labels="shown"))
    classes = two["details"]["auroc_real@xrv"]["classes"]
    assert set(classes) == {"Edema", "Effusion", "Mass"}
    assert classes["Edema"] == one["details"]["auroc_real@xrv"]["classes"]["Edema"]


def test_what_auroc_needs(file, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="needs --real, with labels, and --extractor xrv:FILE"):
        EvaluateConfig(generated="x", real="y", metrics="auroc", extractor=("e",))
    real = labelled(tmp_path / "real", 0)
    monkeypatch.setattr(xrv, "_loaded", lambda file: (_Quick(), None))
    with pytest.raises(ValueError, match="lacks op_threshs"):
        evaluate(config(file, real=real, generated=real))
    monkeypatch.setattr(xrv, "_loaded", lambda file: (_Quick(), tiny.thresholds()))
    plain = labelled(tmp_path / "plain", 0, labels=False)
    monkeypatch.setattr(_Quick, "forward", None)  # told before a picture is looked at
    with pytest.raises(ValueError, match="no column says what the pictures show"):
        evaluate(config(file, real=plain, generated=real))
