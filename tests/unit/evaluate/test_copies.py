"""The nearest training picture of each generated one, and who is blamed for copies."""

import json
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from arra.data.builtin import caption, draw, scene_at
from arra.data.images import to_pil, to_uint8
from arra.evaluate.copies import share_closer
from arra.evaluate.nearest import BLOCK, Nearest
from arra.evaluate.protocol import evaluate
from arra.evaluate.report import told
from arra.evaluate.settings import EvaluateConfig
from arra.image_tokenizers import load_image_tokenizer

# ---- the nearest row -----------------------------------------------------------------------------


def streamed(queries_QD, rows_TD, keys_T, batches, order=None):
    order = np.arange(len(rows_TD)) if order is None else order
    nearest = Nearest(queries_QD)
    for part in np.array_split(order, batches):
        nearest.add(rows_TD[part], part, keys_T[part])
    return nearest.distance_Q, nearest.number_Q


def test_equals_all_distances_whatever_the_batches_and_order():
    rng = np.random.default_rng(0)
    rows_TD = rng.normal(size=(2 * BLOCK + 77, 16)).astype(np.float32) + 50
    queries_QD = rng.normal(size=(BLOCK + 30, 16)).astype(np.float32) + 50
    queries_QD[3] = rows_TD[1500]
    keys_T = rng.integers(0, 2**63, len(rows_TD)).astype(np.uint64)
    all_QT = torch.cdist(
        torch.from_numpy(queries_QD).double(),
        torch.from_numpy(rows_TD).double(),
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    expected, at = all_QT.min(dim=1)
    for batches, order in ((1, None), (9, None), (40, rng.permutation(len(rows_TD)))):
        distance_Q, number_Q = streamed(queries_QD, rows_TD, keys_T, batches, order)
        np.testing.assert_allclose(distance_Q, expected.numpy(), rtol=1e-8, atol=1e-8)
        np.testing.assert_array_equal(number_Q, at.numpy())
        assert distance_Q[3] == 0


def test_of_equal_rows_the_smallest_key_is_named():
    rows_TD = np.zeros((5, 3), np.float32)
    keys_T = np.array([9, 4, 7, 2, 5], np.uint64)
    for order in (np.arange(5), np.arange(5)[::-1]):
        for batches in (1, 5):
            _, number_Q = streamed(np.ones((2, 3), np.float32), rows_TD, keys_T, batches, order)
            assert number_Q.tolist() == [3, 3]


# ---- the share -----------------------------------------------------------------------------------


def test_held_out_pictures_themselves_give_one_percent():
    distances = np.random.default_rng(0).gamma(4, size=20_000)
    found = share_closer(distances[:10_000], distances[10_000:])
    assert found.low < 0.01 < found.high
    assert found.details["threshold"] == pytest.approx(np.percentile(distances, 1), rel=0.1)
    assert found.n == 10_000


def test_no_value_without_enough_held_out_pictures():
    near = share_closer(np.ones(5), np.ones(99), in_training=3)
    assert near.value is None
    assert "takes 100 held-out pictures, and --real has 99 (3 of the held-out" in near.reason
    alone = share_closer(np.ones(5), np.zeros(0), same_set=True)
    assert alone.value is None
    assert "there are distances only" in alone.reason
    assert alone.details["distances"] == [1.0] * 5


# ---- through arra evaluate -----------------------------------------------------------------------

COUNT, COPIED = 120, 36


@cache
def scenes(split, count):
    return [scene_at(split, index) for index in range(count)]


def folder(path, pictures, captions):
    path.mkdir()
    rows = []
    for index, (picture, text) in enumerate(zip(pictures, captions, strict=True)):
        Image.fromarray(picture).save(path / f"{index}.png")
        rows.append({"file": f"{index}.png", "prompt": text, "seed": 0})
    (path / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def painted(pictures):
    """As a painter would paint them at best: through the image tokenizer."""
    tokenizer = load_image_tokenizer("builtin:scenes")
    codes = tokenizer.encode(to_uint8([Image.fromarray(each) for each in pictures]))
    return [np.asarray(each) for each in to_pil(tokenizer.decode(codes))]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Pictures that were trained on, sound ones, and the same with copies among them: two to the
    pixel, the others as they come out of the image tokenizer."""
    base = tmp_path_factory.mktemp("sets")
    trained, own = scenes("train", 200), scenes("test", COUNT)
    pictures, texts = painted(map(draw, own)), [caption(each) for each in own]
    found = {
        "training": folder(base / "t", [draw(e) for e in trained], [caption(e) for e in trained]),
        "sound": folder(base / "s", pictures, texts),
    }
    copies = [draw(each) for each in trained[:2]] + painted(map(draw, trained[2:COPIED]))
    texts = [caption(each) for each in trained[:COPIED]] + texts[COPIED:]
    found["copied"] = folder(base / "c", copies + pictures[COPIED:], texts)
    return found


METRICS = "fd,kid,cmmd,prdc,vendi,scenes,clip_score"


def measured(sets, which, **given):
    wanted = {"real": "builtin:scenes", "split": "val", "limit": 150, "training": sets["training"]}
    return evaluate(
        EvaluateConfig(
            generated=sets[which],
            extractor=("builtin:scenes-clip",),
            device="cpu",
            **{"metrics": "copies"} | wanted | given,
        )
    )


def test_copies_are_noticed_by_copies_and_blamed_by_nothing_else(sets):
    asked = {
        "metrics": f"{METRICS},copies",
        "clip": ("builtin:scenes-clip",),
        "kid_subsets": 20,
        "kid_subset_size": 100,
    }
    sound, copied = (measured(sets, which, **asked) for which in ("sound", "copied"))
    key = "copies@scenes-clip"
    assert sound["metrics"][key] < 0.05
    assert copied["intervals"][key]["low"] > sound["intervals"][key]["high"]
    assert copied["metrics"][key] > 0.7 * COPIED / COUNT
    assert sound["metrics"]["exact_copies"] == 0
    assert copied["metrics"]["exact_copies"] == pytest.approx(2 / COUNT)
    details = copied["details"][key]
    assert details["held_out"] + details["held_out_in_training"] == 150
    assert key in told(copied)
    for name in ("fd", "kid", "cmmd", "precision", "recall", "density", "coverage", "vendi"):
        name = f"{name}@scenes-clip"
        one, two = sound["metrics"][name], copied["metrics"][name]
        assert two == pytest.approx(one, rel=0.2, abs=0.1), name
    for name in ("scenes", "clip_score@scenes-clip"):
        assert copied["metrics"][name] == pytest.approx(sound["metrics"][name], rel=0.05)


def test_order_and_batches_do_not_matter(sets, tmp_path):
    turned = {}
    for which in ("copied", "training"):
        shutil.copytree(sets[which], tmp_path / which)
        listing = tmp_path / which / "images.jsonl"
        listing.write_text("".join(reversed(listing.read_text("utf-8").splitlines(True))), "utf-8")
        turned[which] = str(tmp_path / which)
    one = measured(sets, "copied")
    key = "copies@scenes-clip"
    for two in (measured(sets, "copied", batch_size=7), measured(turned, "copied", workers=1)):
        assert one["metrics"] == two["metrics"]
        assert one["intervals"] == two["intervals"]
        limits = [report["details"][key]["threshold"] for report in (one, two)]
        assert limits[0] == pytest.approx(limits[1], rel=1e-4)


def test_the_folder_shows_each_beside_its_nearest(sets, tmp_path):
    measured(sets, "copied", out=tmp_path / "out")
    with Image.open(tmp_path / "out" / "copies-scenes-clip.png") as sheet:
        assert sheet.width > 1000
    scores = [
        json.loads(line)["scores"]["nearest_training@scenes-clip"]
        for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()
    ]
    assert scores[:2] == [0, 0]
    assert max(scores[:COPIED]) < np.median(scores[COPIED:])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Nearest training pictures" in page
    assert "0.png" in page
    assert "distance 0, the same pixels" in page
    assert "1 % of held-out real pictures are closer than" in page


def test_without_held_out_pictures_there_are_distances_only(sets):
    alone = measured(sets, "copied", training=None, real=sets["training"], split=None)
    same = measured(sets, "copied", real=sets["training"], split=None, limit=None)
    for report in (alone, same):
        assert report["metrics"]["copies@scenes-clip"] is None
        assert "distances only" in report["reasons"]["copies@scenes-clip"]
        assert report["metrics"]["exact_copies"] == pytest.approx(2 / COUNT)
        assert report["details"]["exact_copies"]["training"] == 200  # --limit does not shorten it


def test_held_out_pictures_that_were_trained_on_do_not_count(sets):
    report = measured(sets, "sound", training=sets["copied"], real=sets["training"], split=None)
    details = report["details"]["copies@scenes-clip"]
    assert (details["held_out"], details["held_out_in_training"]) == (148, 2)
    assert "2 of the held-out pictures are training" in report["reasons"]["copies@scenes-clip"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metrics": "copies", "extractor": ("e",)}, "needs --training"),
        ({"metrics": "scenes", "training": "t"}, "give both"),
        ({"metrics": "copies", "training": "t"}, "needs --extractor"),
    ],
)
def test_wrong_use(given, message):
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(generated="x", **given)
