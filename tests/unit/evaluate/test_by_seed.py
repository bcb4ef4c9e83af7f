"""`arra evaluate --by-seed`: a seed's values are those of its pictures alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from arra.data.builtin import caption, draw, scene_at
from arra.evaluate.by_seed import put_by_seed
from arra.evaluate.comparison import Opened, compared_reports
from arra.evaluate.finding import Finding
from arra.evaluate.paired import student_t
from arra.evaluate.passes import ScenePass, go_through
from arra.evaluate.protocol import evaluate
from arra.evaluate.reference import stored_set
from arra.evaluate.report import begun, told
from arra.evaluate.settings import EvaluateConfig

PROMPTS, SEEDS = 8, (3, 4, 5)


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    """A folder of all seeds and one of each seed; of seed 4 the last picture is wrong."""
    root = tmp_path_factory.mktemp("painted")
    rows = []
    for number in range(PROMPTS):
        for seed in SEEDS:
            scene = scene_at("test", 10 * number + seed)
            wrong = seed == 4 and number == PROMPTS - 1
            name = f"{number}-{seed}.png"
            drawn = scene_at("test", 999) if wrong else scene
            rows.append(({"file": name, "prompt": caption(scene), "seed": seed}, draw(drawn)))
    for folder in ("all", *SEEDS):
        (root / str(folder)).mkdir()
        kept = [row for row in rows if folder in ("all", row[0]["seed"])]
        for row, pixels in kept:
            Image.fromarray(pixels).save(root / str(folder) / row["file"])
        listing = "".join(json.dumps(row) + "\n" for row, _ in kept)
        (root / str(folder) / "images.jsonl").write_text(listing, encoding="utf-8")
    return root


def config(folder, **given):
    return EvaluateConfig(
        real="builtin:scenes",
        split="val",
        limit=PROMPTS * len(SEEDS),
        generated=str(folder),
        metrics="fd,kid,prdc,fd_infinity,scenes",
        extractor=("builtin:scenes-judge",),
        kid_subsets=5,
        kid_subset_size=6,
        device="cpu",
        **given,
    )


def test_a_seeds_values_are_those_of_its_pictures_alone(painted):
    report = evaluate(config(painted / "all", by_seed=True))
    assert list(report["by_seed"]) == ["3", "4", "5"]
    for seed in SEEDS:
        alone = evaluate(config(painted / str(seed)))["metrics"]
        found = report["by_seed"][str(seed)]
        assert [key for key in alone if alone[key] is None] == [
            k for k in found if found[k] is None
        ]
        known = {key: value for key, value in alone.items() if value is not None}
        assert {key: found[key] for key in known} == pytest.approx(known, rel=1e-6, abs=1e-9)
    assert report["by_seed"]["4"]["scenes"] == 1 - 1 / PROMPTS
    over = report["over_seeds"]["scenes"]
    values = [1, 1 - 1 / PROMPTS, 1]
    half = student_t(2) * np.std(values, ddof=1) / 3**0.5
    assert over["mean"] == pytest.approx(report["metrics"]["scenes"])
    assert (over["low"], over["high"]) == pytest.approx((over["mean"] - half, over["mean"] + half))
    assert (over["seeds"], over["pictures_each"]) == (3, PROMPTS)
    few = next(found for key, found in report["over_seeds"].items() if "fd_infinity" in key)
    assert few["mean"] is None
    assert "images" in few["reason"]
    assert "scenes over 3 seeds  0.958333" in told(report)
    same = compared_reports([Opened("a", report), Opened("b", report)])
    assert same["differences"]["scenes"][1]["over_seeds"]["seeds"] == 3


def test_what_has_no_seeds_to_tell_apart(painted, tmp_path):
    def refused(match, seeds):
        folder = tmp_path / match[:4].strip()
        folder.mkdir()
        lines = []
        for number, seed in enumerate(seeds):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
            lines.append(json.dumps({"file": f"{number}.png", "prompt": "p", "seed": seed}))
        (folder / "images.jsonl").write_text("\n".join(lines), encoding="utf-8")
        with pytest.raises(ValueError, match=match):
            evaluate(config(folder, by_seed=True))

    refused("does not say with which seeds", [None, None])
    refused("was painted with 1 seeds", [0, 0])
    refused("with 17 seeds", range(17))
    refused("has 1 pictures of one seed and 2 of another", [0, 0, 1])


def test_scores_whose_mean_is_no_value_stay_out():
    report = begun(0)
    report["metrics"] = {"mean": 2.5, "other": 9.0}
    found = {0: {"fd": Finding(1.0, 2)}, 1: {"fd": Finding(3.0, 2)}}
    scores = {name: np.array([1.0, 2, 3, 4]) for name in ("mean", "other", "third")}
    put_by_seed(report, [0, 1], found, scores, [0, 1, 0, 1])
    assert report["by_seed"] == {"0": {"fd": 1.0, "mean": 2.0}, "1": {"fd": 3.0, "mean": 3.0}}


def test_verdicts_are_by_index_though_pictures_come_in_any_order(painted):
    class Backwards:
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __iter__(self):
            return iter(list(self.images)[::-1])

    images = stored_set(config(painted / "4"), str(painted / "4"), None)
    judge = ScenePass(())
    go_through(Backwards(images), [judge], 64, 3)
    assert judge.scores()["scenes"].tolist() == [1] * (PROMPTS - 1) + [0]


def test_seeds_of_a_painter(painted):
    report = evaluate(
        replace(
            config(painted),
            generated=None,
            model="builtin:scenes",
            num=2,
            limit=2,
            metrics="scenes",
            extractor=(),
            by_seed=True,
        )
    )
    assert list(report["by_seed"]) == ["0", "1"]
