"""The demo is a study with fixed parts; what it asks for, and what it exports."""

from pathlib import Path

from arra.files import read_json, write_json
from arra.study import demo
from arra.study.arms import make_arms
from arra.study.demo import DemoConfig, run_demo


def test_demo_asks_for_a_study_that_the_issue_describes(tmp_path, monkeypatch):
    asked = []
    exported = []

    def run_study(config, *, data_label, depth):
        asked.append((config, depth))
        write_json(tmp_path / "guidance.json", {a: {"chosen": 2.0} for a in ("plain", "aligned")})
        return tmp_path / "report.html"

    def export(config):
        exported.append(config.run)
        folder = Path(config.out)
        write_json(folder / "pipeline.json", {"sampling": {"cfg": 3.0, "top_k": 0}})
        return folder

    monkeypatch.setattr(demo, "run_study", run_study)
    monkeypatch.setattr(demo, "export", export)
    monkeypatch.setattr(demo, "DEPTH", tmp_path / "none.json")
    given = DemoConfig(out=str(tmp_path), steps=7, settings=("align.layer=1",), device="cpu")
    assert run_demo(given) == tmp_path / "report.html"
    config, depth = asked[0]
    assert depth is None
    assert config.data == "builtin:scenes"
    assert config.prompts >= 512
    assert config.more_splits == ("compositional",)
    assert config.judge != config.encoder[0].partition("=")[2]  # another one judges
    plain, aligned = make_arms(config, tmp_path / "data")
    assert plain.config.steps == aligned.config.steps == 7
    assert (plain.config.align.weight, aligned.config.align.weight) == (0.0, 1.0)
    assert aligned.config.align.layer == (1,)
    assert plain.config.threads == 1
    for arm in ("plain", "aligned"):
        written = read_json(tmp_path / arm / "export" / "pipeline.json")
        assert written["sampling"] == {"cfg": 2.0, "top_k": 0}
    run_demo(given)
    assert len(exported) == 2  # finished exports are kept
