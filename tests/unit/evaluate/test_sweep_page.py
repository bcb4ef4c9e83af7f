"""The pages of `arra evaluate sweep`: they say what sweep.json says, and show the same prompts."""

import json
import re

import pytest
from PIL import Image

from arra.evaluate.gallery import SHOWN, Gallery, drawn_from, read_samples, write_samples
from arra.evaluate.report import begun
from arra.evaluate.sweep_page import write_pages
from arra.pages.sheet import Cell

NAMES = [f"{number:05d}-0" for number in range(20)]


def evaluation(folder, colour):
    """A folder with the samples of twenty pictures of one colour."""
    folder.mkdir(parents=True)
    report = begun(0) | {"real": {"source": "r", "sha256": "a" * 64, "n": 30}}
    report["reasons"]["fd@e"] = "rank deficient"
    (folder / "report.json").write_text(json.dumps(report), "utf-8")
    rows = [{"name": name, "caption": f"prompt {name}", "scores": {}} for name in NAMES]
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    cells = [Cell((Image.new("RGB", (8, 8), colour),), ("",), "") for _ in drawn_from(NAMES)]
    write_samples(folder, Gallery("samples", "", "", "", cells))


@pytest.fixture
def out(tmp_path):
    models, scales = ("plain", "aligned"), (1.0, 2.0)
    reports, curves, intervals, best = [], {}, {}, {}
    for number, model in enumerate(models):
        for cfg in scales:
            folder = f"{model}/cfg-{cfg:g}"
            evaluation(tmp_path / folder, ("red", "blue")[number])
            asked = {"model": model, "cfg": cfg, "limit": 20}
            reports.append({"model": model, "cfg": cfg, "folder": folder, "asked": asked})
        values = {"fd@e": 12.5 - number, "precision@e": 0.5, "recall@e": 0.625, "scenes/size": 0.25}
        curves[model] = {key: [[1.0, value], [2.0, 2 * value]] for key, value in values.items()}
        intervals[model] = {key: [[0.0, 30.0], None] for key in values}
        intervals[model]["scenes/size"] = [None, None]
        best[model] = {"fd@e": {"cfg": 1.0, "value": 12.5 - number, "low": 11.0, "high": 14.0}}
    points = [[10, 12.5], [20, 11.5]]
    test = {"mean": -1.0, "low": -1.5, "high": -0.5, "p": 0.01, "n": 20}
    change = {"difference": -1.0, "better": "lower", "over_prompts": test}
    found = {
        "format_version": 1,
        "models": [
            {"name": m, "model": f"runs/{m}", "weights": "b" * 64, "steps": 10} for m in models
        ],
        "cfg": list(scales),
        "reports": reports,
        "curves": curves,
        "intervals": intervals,
        "best": best,
        "best_chosen": "chosen here",
        "differences": {"fd@e": {"aligned": change}},
        "steps": {"plain": {"models": list(models), "curves": {"fd@e": points}}},
        "warnings": ["careful"],
    }
    write_pages(tmp_path, found)
    return tmp_path


def test_the_page(out):
    text = (out / "sweep.html").read_text("utf-8")
    assert not re.search(r"<script|<link|@import|https?://(?!www\.w3\.org)", text)
    for said in (
        "careful",
        "rank deficient",
        "chosen here",
        "−1 ▲",
        "p = 0.01, 20 prompts",
        "guidance 1",
        "a" * 64,
    ):
        assert said in text
    # Guidance: four measures, one of them folded; precision against recall; steps.
    assert text.count("<svg") == 6
    assert text.index("1 more, of parts of a measure") < text.index("scenes/size:")
    # Eight prompts, two models, two scales; the best is framed for each model and prompt.
    assert text.count("<img") == 8 * 2 * 2
    assert text.count('class="best"') == 8 * 2
    for name in drawn_from(NAMES)[:SHOWN]:
        assert f"prompt {NAMES[name]}" in text


def test_the_markdown(out):
    text = (out / "sweep.md").read_text("utf-8")
    assert "12.5" in text
    assert "warning: careful" in text
    for name in re.findall(r"\]\(([^)]+)\)", text):
        assert (out / name / "report.json").is_file()


def test_samples_come_back(out):
    found = read_samples(out / "aligned/cfg-2")
    assert list(found) == [NAMES[index] for index in drawn_from(NAMES)]
    assert {picture.getpixel((3, 3)) for _, picture in found.values()} == {(0, 0, 255)}
    assert all(caption == f"prompt {name}" for name, (caption, _) in found.items())


def test_a_plot_has_the_scales_that_were_measured_and_no_more_than_was_found(out):
    text = (out / "sweep.html").read_text("utf-8")
    plot = text[text.index("<svg") : text.index("</svg>")]
    ticks = re.findall(r"<text[^>]*>([^<]*)</text>", plot)
    assert {"1", "2"} <= set(ticks)
    assert "1.5" not in ticks
    # Three measures have intervals, scenes/size has none; and the plot over steps has them.
    assert text.count("bars are 95 % intervals") == 3 + 1
