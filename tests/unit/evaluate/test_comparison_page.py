"""The pages of `arra evaluate compare --out FOLDER`: they say what comparison.json says."""

import json
import re

import pytest

from arra.cli import main
from arra.evaluate.comparison_page import labels, verdict
from arra.evaluate.report import begun


def write(folder, values, shift):
    """An evaluation's folder of eight prompts, which differ by `shift` from the first."""
    report = begun(0) | {
        "real": {"source": "r", "sha256": "a" * 64, "n": 10},
        "generated": {"source": "g", "sha256": "b" * 64, "n": 8, "painted": {"cfg": 2.5}},
        "metrics": values,
        "intervals": {"scenes": {"low": 0.25, "high": 0.75, "method": "bootstrap over images"}},
        "reasons": {"kid@e": "too few images"},
    }
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report), "utf-8")
    rows = [
        {"index": i, "name": str(i), "caption": f"prompt {i}", "scores": {"scenes": i % 2 + shift}}
        for i in range(8)
    ]
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(folder)


@pytest.fixture
def out(tmp_path, capsys):
    one = write(tmp_path / "one", {"fd@e": 12.5, "scenes": 0.5, "kid@e": None}, 0.0)
    other = write(tmp_path / "other", {"fd@e": 11.25, "scenes": 0.75, "kid@e": None}, 0.25)
    folder = tmp_path / "compared"
    assert main(["evaluate", "compare", one, other, "--out", str(folder)]) == 0
    assert "scenes" in capsys.readouterr().out
    return folder


def test_pages_have_every_value(out):
    found = json.loads((out / "comparison.json").read_text("utf-8"))
    text = (out / "comparison.md").read_text("utf-8")
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert set(found["metrics"]) <= set(rows)
    assert "12.5" in rows["fd@e"]
    assert "-1.25" in rows["fd@e"]
    assert "0.5 (0.25 to 0.75)" in rows["scenes"]
    assert "8 prompts" in rows["scenes"]
    page = (out / "comparison.html").read_text("utf-8")
    assert "+0.25 ▲" in page
    assert "−1.25" in page
    assert '<small class="why">too few images</small>' in page  # may wrap, an interval may not
    assert not re.search(r"<script|<link|@import|https?://(?!www\.w3\.org)", page)
    assert page.count("<svg") == 2  # scenes, fd@e


def test_what_is_clear():
    test = {"mean": -0.5, "low": -0.7, "high": -0.3, "p": 0.001, "n": 40}
    few = {"mean": -0.5, "low": -0.7, "high": -0.3, "p": 0.5, "seeds": 2}
    change = {"difference": -0.5, "better": "lower", "over_prompts": test, "over_seeds": few}
    assert verdict(change) == "better"
    assert verdict(change | {"better": "higher"}) == "worse"
    assert verdict(change | {"over_prompts": test | {"high": 0.1}}) == "unclear"
    assert verdict(change | {"over_seeds": few | {"seeds": 6}}) == "unclear"
    assert verdict({"difference": 1.0, "better": "lower"}) == ""


def test_names_are_as_short_as_they_can_be():
    assert labels(["runs/a/eval", "runs/b/eval"]) == ["runs/a/eval", "runs/b/eval"]
    assert labels(["runs/eval/a", "runs/eval/b/report.json"]) == ["a", "b"]
