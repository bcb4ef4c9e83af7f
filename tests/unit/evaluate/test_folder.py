"""The folder that `arra evaluate --out FOLDER` writes: everything says what report.json says."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from arra.data.builtin import caption, draw, scene_at
from arra.evaluate.facts import protocol
from arra.evaluate.gallery import galleries
from arra.evaluate.outputs import check_out
from arra.evaluate.page import page
from arra.evaluate.protocol import evaluate
from arra.evaluate.settings import EvaluateConfig

COUNT = 24


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """An evaluation of scenes, every third of which was painted of another prompt."""
    folder = tmp_path_factory.mktemp("painted")
    rows = []
    for index in range(COUNT):
        drawn = scene_at("test", index + (100 if index % 3 == 0 else 0))
        Image.fromarray(draw(drawn)).save(folder / f"{index}.png")
        text = caption(scene_at("test", index))
        rows.append({"file": f"{index}.png", "prompt": text, "seed": 5})
    (folder / "images.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    out = folder.parent / "evaluation"
    evaluate(
        EvaluateConfig(
            real="builtin:scenes",
            split="val",
            limit=40,
            generated=str(folder),
            metrics="scenes,fd,kid,prdc",
            extractor=("builtin:scenes-judge",),
            kid_subset_size=1000,  # more than there are: null, with a reason
            device="cpu",
            out=out,
        )
    )
    return out


@pytest.fixture(scope="module")
def report(out):
    return json.loads((out / "report.json").read_text("utf-8"))


def test_markdown_has_every_value(out, report):
    text = (out / "report.md").read_text("utf-8")
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.split("\n## ")[0].splitlines()
        if line.startswith("| ")
    ]
    rows = {row[0]: row for row in table[1:]}
    assert list(rows) == list(report["metrics"])
    for key, value in report["metrics"].items():
        name, shown, between, counted, _, said = rows[key]
        assert shown == ("null" if value is None else f"{value:.6g}")
        if key in report["intervals"]:
            ends = [float(end) for end in between.split(" to ")]
            interval = report["intervals"][key]
            assert ends == pytest.approx([interval["low"], interval["high"]], rel=1e-5)
        assert counted.endswith(str(report["counts"][key][1]))
        assert report["reasons"].get(key, "") in said
    assert report["metrics"]["kid@scenes-judge"] is None
    for named in ("real", "generated"):
        assert report[named]["sha256"] in text
    assert report["extractors"]["scenes-judge"]["fingerprint"] in text
    assert report["versions"]["torch"] in text
    for name in re.findall(r"\]\(([^)]+)\)", text):
        assert (out / name).is_file()


def test_page_has_every_value_and_needs_nothing_else(out, report):
    text = (out / "report.html").read_text("utf-8")
    assert not re.search(r"<script|<link|@import|url\(http", text)
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources
    assert all(each.startswith(("data:", "#")) for each in sources)
    for key, value in report["metrics"].items():
        assert f"<th>{key}" in text
        assert (f'title="{value:.6g}"' if value is not None else 'title="null"') in text
    for reason in report["reasons"].values():
        assert reason.split(",")[0] in text
    for fact in (report["real"]["sha256"], report["versions"]["torch"]):
        assert fact in text
    assert text.count("<svg") == 2  # shares, precision against recall
    assert {name.name for name in out.iterdir()} >= {"samples.png", "best-scenes.png"}


def test_scores_are_those_behind_the_means(out, report):
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text("utf-8").splitlines()]
    assert [row["index"] for row in rows] == list(range(COUNT))
    assert {row["seed"] for row in rows} == {5}
    for key in ("scenes", "scenes/colour", "scenes/relation"):
        values = [row["scores"][key] for row in rows if row["scores"][key] is not None]
        assert np.mean(values) == pytest.approx(report["metrics"][key], rel=1e-9)
        assert len(values) == report["counts"][key][1]
    assert rows[1]["caption"] == caption(scene_at("test", 1))


def test_an_evaluation_is_replaced_and_nothing_else_is(out, tmp_path):
    check_out(out)
    check_out(tmp_path / "new")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"no report \(it holds notes.txt\)"):
        check_out(tmp_path)
    with pytest.raises(ValueError, match=r"is a file: name a new folder"):
        check_out(tmp_path / "notes.txt")
    text = tmp_path / "text.txt"
    text.write_text("a red circle\n\na blue square\n", "utf-8")
    told = tmp_path / "told"
    config = EvaluateConfig(model="builtin:scenes", text=text, out=told, device="cpu")
    evaluate(config)
    first = (told / "report.json").read_text("utf-8")
    evaluate(config)
    assert (told / "report.json").read_text("utf-8") == first
    assert sorted(each.name for each in told.iterdir()) == [
        *("report.html", "report.json", "report.md")
    ]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["notes.txt", "text.txt", "told"]


class Ten:
    """Ten grey pictures."""

    source, names, captions, seeds = "ten", [f"{i}" for i in range(10)], None, None

    def __len__(self):
        return 10

    def at(self, indices):
        from arra.evaluate.image_set import Picture

        image = Image.new("RGB", (8, 8), "grey")
        return [Picture(i, self.names[i], image, None, None, i) for i in indices]


def test_best_and_worst_go_by_the_measure_s_direction():
    rising = np.arange(10.0)
    scores = {"scenes": rising, "scenes/fragments": rising, "unheard of": rising}
    scores["clip_score@x"] = np.where(rising < 8, np.nan, rising)
    scores["scenes/shape"] = np.ones(10)
    found = {each.name: each for each in galleries(Ten(), None, scores, 8)}
    assert len(found["samples"].cells) == 10
    firsts = {name: each.cells[0].heads[0] for name, each in found.items() if each.score}
    assert firsts == {
        **{"best-scenes": "9", "worst-scenes": "0"},
        **{"best-scenes-fragments": "0", "worst-scenes-fragments": "9"},
        **{"highest-unheard-of": "9", "lowest-unheard-of": "0"},
        **{"best-clip_score-x": "9", "worst-clip_score-x": "8"},
    }
    assert [cell.heads[0] for cell in found["worst-scenes"].cells] == list("01234")


def test_what_no_page_knows_is_shown_all_the_same(report):
    odd = report | {
        "warnings": ["a <b>careful</b> reader"],
        "by_seed": {"3": {"fd@e": 1.5}, "4": {"fd@e": 2.5}},
        "metrics": {"unheard@e": 3.25},
        "heard of": {"it": "yesterday", "list": [{"name": "x|y"}]},
    }
    text = "".join(page(odd, {}, [])[1])
    assert "a &lt;b&gt;careful&lt;/b&gt; reader" in text
    assert "unheard@e" in text
    assert "seed 3" in text
    assert ("Heard of", [("it", "yesterday"), ("list: 1: name", "x|y")]) in protocol(odd)


def test_seeds_and_subsets_on_the_page(report):
    over = {"mean": 2.0, "low": 1.0, "high": 3.0, "seeds": 2, "reason": "few for a seed"}
    curve = [[1 / n, 1 + 100 / n] for n in (100, 50, 25)]
    found = report | {
        "by_seed": {"3": {"fd@e": 1.5}, "4": {"fd@e": 2.5}},
        "over_seeds": {"fd@e": over},
        "metrics": {"fd_infinity@e": 1.0},
        "details": {"fd_infinity@e": {"curve": curve, "slope": 100.0}},
    }
    counted = np.array([0, 0, 1, 2, 3, 4, 9.0])
    text = "".join(page(found, {"nearest_training@e": counted}, [])[1])
    assert "<th>fd<wbr>@e<small>few for a seed</small></th>" in text
    assert '<td data-head="95 % interval">1 to 3</td>' in text
    assert "nearest_training@e of each picture: distance to the nearest" in text
    line, bars = text.split("<svg")[1:3]
    # Subsets are points, through which a line goes.
    assert "fill: none; stroke: var(--plain)" in line
    assert "fill: none; stroke: var(--aligned)" not in line
    # A bar for each whole number, 0 to 9.
    assert bars.count("fill: var(--aligned)") == 10
