"""`arra evaluate sweep`: curves over guidance, the best of each model, and what is kept."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_exports import export

from arra.cli import main
from arra.evaluate import reference, sweep_results
from arra.evaluate import sweep as sweep_module
from arra.evaluate.comparison import Opened
from arra.evaluate.protocol import evaluate
from arra.evaluate.report import begun
from arra.evaluate.sweep import SweepConfig, short_names, sweep
from arra.evaluate.sweep_results import Point, results
from arra.evaluate.training_steps import History, history_of


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Exports of one run after 10 and 20 steps, with weights of their own."""
    root = tmp_path_factory.mktemp("models")
    first, second = root / "ten", root / "twenty"
    shutil.move(export("llama", root / "made"), first)
    shutil.copytree(first, second)
    file = next(second.glob("model/*.safetensors"))
    weights = load_file(file)
    torch.manual_seed(0)
    changed = {k: v + 0.5 * torch.randn_like(v) * v.std() for k, v in weights.items()}
    save_file(changed, file, {"format": "pt"})
    for folder, step in ((first, 10), (second, 20)):
        described = json.loads((folder / "pipeline.json").read_text())
        described["origin"] = {"recipe": "base", "step": step}
        (folder / "pipeline.json").write_text(json.dumps(described))
    return str(first), str(second)


def config(models, out, **given):
    prompts = out.parent / "prompts.txt"
    prompts.write_text("a red circle\ntwo blue squares\na line\na green circle\n")
    return SweepConfig(
        models=models,
        out=out,
        cfg=(3.0, 1.0),
        real="builtin:scenes",
        split="val",
        limit=8,
        metrics="fd,vendi",
        extractor=("builtin:scenes-judge",),
        prompts=str(prompts),
        num=2,
        slots=16,
        device="cpu",
        **given,
    )


def test_a_sweep(models, tmp_path, monkeypatch):
    seen = []
    looked = reference.go_through

    def counted(images, passes, size, batch_size):
        seen.append(images.source)
        return looked(images, passes, size, batch_size)

    monkeypatch.setattr(reference, "go_through", counted)
    asked = config(models, tmp_path / "out")
    said = []
    found = sweep(asked, said.append)
    assert seen == ["builtin:scenes"], "the real images are looked at once"
    assert len(said) == 4
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == found
    assert found["cfg"] == [1, 3]
    assert [each["steps"] for each in found["models"]] == [10, 20]
    key = "fd@scenes-judge"
    for name, model in zip(("ten", "twenty"), models, strict=True):
        alone = evaluate(asked.at(model, 3.0))
        assert found["curves"][name][key][1] == [3, pytest.approx(alone["metrics"][key], rel=1e-6)]
        best = found["best"][name]
        assert best[key]["value"] == min(value for _, value in found["curves"][name][key])
        vendi = found["curves"][name]["vendi@scenes-judge"]
        assert best["vendi@scenes-judge"]["value"] == max(value for _, value in vendi)
    bests = [found["best"][name][key]["value"] for name in ("ten", "twenty")]
    difference = found["differences"][key]["twenty"]["difference"]
    assert difference == pytest.approx(bests[1] - bests[0])
    (steps,) = found["steps"].values()
    assert steps["models"] == ["ten", "twenty"]
    assert steps["curves"][key] == [[10, bests[0]], [20, bests[1]]]

    def never(*_):
        raise AssertionError("measured again")

    real_evaluate = sweep_module.evaluate
    monkeypatch.setattr(sweep_module, "evaluate", never)
    assert sweep(asked, said.append) == found
    assert len(said) == 4
    monkeypatch.setattr(sweep_module, "evaluate", real_evaluate)
    wider = sweep(replace(asked, cfg=(1.0, 3.0, 2.0)), said.append)
    assert said[4:] == [f"{model} with guidance 2" for model in models]
    assert wider["curves"]["ten"][key][::2] == found["curves"]["ten"][key]
    sweep(replace(asked, models=models[:1], cfg=(1.0,), seed=5), said.append)
    assert said[6:] == [f"{models[0]} with guidance 1"]
    again = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [each["folder"] for each in again["reports"]] == ["ten/cfg-1"]


def test_from_the_command_line(models, tmp_path, capsys):
    asked = config(models, tmp_path / "out")
    arguments = [
        *("--real", "builtin:scenes", "--split", "val", "--limit", "4", "--metrics", "fd"),
        *("--extractor", "builtin:scenes-judge", "--prompts", asked.prompts, "--device", "cpu"),
    ]
    out = str(tmp_path / "out")
    command = ["evaluate", "sweep", models[0], "--cfg", "1", "2", *arguments, "--out", out]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "| fd@scenes-judge ↓ | cfg 1" in printed
    assert "chosen on the very pictures" in printed
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert main([*command[:-1], str(tmp_path / "other")]) == 1
    assert "is no sweep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"models": ()}, "takes a MODEL"),
        ({"models": ("a", "a")}, "named twice"),
        ({"cfg": (1.0, 1.0)}, "named twice"),
        ({"metrics": "fid"}, "unknown metric"),
        ({"extractor": ()}, "needs --extractor"),
    ],
)
def test_wrong_use(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        replace(config(("a", "b"), tmp_path / "out"), **given)


def test_short_names():
    assert short_names(["a/model", "b/model"]) == ["a-model", "b-model"]
    assert short_names(["runs/plain", "builtin:scenes"]) == ["plain", "builtin-scenes"]
    with pytest.raises(ValueError, match="one and the same"):
        short_names(["a", "a/"])


def test_short_names_stay_within_the_folder(tmp_path, monkeypatch):
    (tmp_path / "run" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run" / "below")
    assert short_names(["."]) == ["below"]
    assert short_names(["..", "a/model"]) == ["run", "model"]


def point(model, cfg, **values):
    report = begun(0) | {"metrics": values, "intervals": {"fd@x": {"low": 0.0, "high": 9.0}}}
    return Point(model, cfg, Opened(model, report))


def test_best_has_a_direction_and_says_where_it_may_lie_beyond():
    points = [
        point("a", 1.0, **{"fd@x": 5.0, "scenes": 0.5, "odd": 1.0}),
        point("a", 2.0, **{"fd@x": 4.0, "scenes": 0.9, "odd": 2.0}),
        point("a", 3.0, **{"fd@x": 4.0, "scenes": 1.0, "odd": None}),
    ]
    found = results(points, {"a": None})
    assert found["best"]["a"] == {
        "fd@x": {"cfg": 2.0, "value": 4.0, "low": 0.0, "high": 9.0},
        "scenes": {"cfg": 3.0, "value": 1.0, "low": None, "high": None},
    }
    assert found["curves"]["a"]["odd"] == [[1.0, 1.0], [2.0, 2.0]]
    assert found["warnings"] == ["a: best at the last --cfg tried, 3: scenes; try more"]
    told = sweep_results.told(found | {"models": [{"name": "a"}], "cfg": [1.0, 2.0, 3.0]})
    assert "4 (0 to 9) at 2" in told


def test_points_that_were_measured_differently_are_told():
    """Such as before and after the weights of a judge were changed."""
    points = [point("a", cfg, scenes=0.5 * cfg) for cfg in (1.0, 2.0)]
    for number, each in enumerate(points):
        each.opened.report["judges"] = {"clip_score@x": {"fingerprint": f"{number}"}}
    (told,) = (text for text in results(points, {"a": None})["warnings"] if "same way" in text)
    assert told.startswith("a at guidance 1 and 2 was not measured the same way: fingerprint of")


def test_steps_of_unlike_runs_are_no_curve(models):
    assert history_of(models[0]).steps == 10
    assert history_of(models[0]).run == history_of(models[1]).run
    points = [point("a", 1.0, scenes=0.5), point("b", 1.0, scenes=0.6)]
    other = {"a": History("one", 1), "b": History("two", 2)}
    assert results(points, other)["steps"] == {}
    same = results(points, {"a": History("one", 1), "b": History("one", 1)})
    assert same["steps"] == {}
    assert "do not say which run" in same["warnings"][-1]
