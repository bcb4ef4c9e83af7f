"""`arra evaluate compare`: what is compared, what is refused, and which paired tests there are."""

import copy
import json

import numpy as np
import pytest
from PIL import Image

from arra.cli import main
from arra.data.builtin import caption, draw, scene_at
from arra.evaluate.comparison import Opened, compared_reports, open_report, told
from arra.evaluate.directions import better
from arra.evaluate.paired import over_seeds, paired_difference
from arra.evaluate.report import begun


def report(**values):
    """As `arra evaluate` writes one."""
    return begun(0) | {
        "real": {"sha256": "a" * 64, "n": 10},
        "generated": {
            "sha256": "b" * 64,
            "n": 20,
            "prompts_sha256": "c" * 64,
            "painted": {"model": "m", "cfg": 1.0, "seed": 0, "ran_on": {"dtype": "float32"}},
        },
        "extractors": {"tiny": {"spec": "here", "fingerprint": "f" * 64, "resize": "bicubic"}},
        "preprocessing": {"size": 64, "crop": "centre"},
        "metrics": {"fd@tiny": 5.0, **values},
        "intervals": {"fd@tiny": {"low": 4.0, "high": 6.0, "method": "jackknife"}},
        "counts": {"fd@tiny": [10, 20]},
    }


def changed(path, value, start=None):
    """A report with another value at `path`."""
    new = copy.deepcopy(start or report())
    at = new
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    return new


def compared(*reports, force=False):
    named = [Opened(f"r{i}", each) for i, each in enumerate(reports)]
    return compared_reports(named, force=force)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("real", "sha256"), "d" * 64, "reference (SHA-256 of its pixels) aaaaaaaaaaaa… against"),
        (("real", "n"), 11, "reference images 10 against 11"),
        (("real", "moments"), {"sha256": "e" * 64}, "moments of the reference (SHA-256) none aga"),
        (("generated", "n"), 21, "generated images 20 against 21"),
        (("generated", "prompts_sha256"), "d" * 64, "prompts (SHA-256) cccccccccccc… against"),
        (("extractors", "tiny", "fingerprint"), "e" * 64, "fingerprint of tiny ffffffffffff…"),
        (("extractors", "tiny", "resize"), "bilinear", "resize of tiny bicubic against bilinear"),
        (("preprocessing", "size"), 32, "size of the images 64 against 32"),
        (("format_version",), 3, "format of the report 2 against 3"),
        (("counts", "fd@tiny"), [10, 19], "images behind fd@tiny 20 against 19"),
    ],
)
def test_what_was_measured_differently_is_refused(path, value, named):
    other = changed(path, value)
    with pytest.raises(ValueError, match="did not measure the same way") as refused:
        compared(report(), other)
    assert named in str(refused.value)
    assert "--force" in str(refused.value)
    forced = compared(report(), other, force=True)
    assert any(named in text for text in forced["warnings"])
    assert forced["differences"]["fd@tiny"][1]["difference"] == 0


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("generated", "painted", "cfg"), 3.0, "painted with cfg 1.0 against 3.0"),
        (("generated", "painted", "seed"), 7, "painted with seed 0 against 7"),
        (("generated", "painted", "ran_on", "dtype"), "bfloat16", "dtype float32 against bfloat16"),
        (("generated", "painted"), None, "how one of them was painted is not known"),
        (("seed",), 1, "measured with --seed 0 against 1"),
        (("versions", "torch"), "0", "measured by torch"),
        (("warnings",), ["few images"], "r1: few images"),
    ],
)
def test_what_else_differs_is_a_warning(path, value, named):
    warnings = compared(report(), changed(path, value))["warnings"]
    assert any(named in text for text in warnings), warnings


def test_alike_reports_have_no_warning_but_that_of_equal_pictures():
    other = changed(("extractors", "tiny", "spec"), "elsewhere")
    other = changed(("generated", "painted", "model"), "n", other)
    assert compared(report(), other)["warnings"] == ["r0 and r1: both judge the very same pictures"]
    assert compared(report(), changed(("generated", "sha256"), "d" * 64, other))["warnings"] == []


def test_values_of_several_reports():
    first, second = report(scenes=0.5), changed(("metrics", "fd@tiny"), 3.0)
    third = changed(("metrics", "fd@tiny"), None)
    found = compared(first, second, third)
    assert found["metrics"]["fd@tiny"][1] == {"value": 3, "low": 4, "high": 6, "reason": None}
    assert found["differences"]["fd@tiny"] == [None, {"difference": -2, "better": "lower"}, None]
    assert found["differences"]["scenes"] == [None, None, None]
    lines = told(found).splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == ["fd@tiny ↓", "5 (4 to 6)", "3 (4 to 6)", "—", "-2", "—"]
    assert len({len(line) for line in lines[:4]}) == 1
    with pytest.raises(ValueError, match="no measure in common"):
        compared(first, first | {"metrics": {"kid@tiny": 1.0}})


def test_paired_over_seeds():
    values = np.array([[5.0, 6.0, 7.0], [4.0, 5.5, 5.0]])
    reports = [
        report() | {"by_seed": {str(s): {"fd@tiny": v} for s, v in enumerate(row)}}
        for row in values
    ]
    found = compared(*reports)
    assert found["differences"]["fd@tiny"][1]["over_seeds"] == over_seeds(*values)
    assert "paired over 3 sampling seeds" in told(found)
    reports[1]["by_seed"].pop("2")
    assert "over_seeds" not in compared(*reports)["differences"]["fd@tiny"][1]


def test_paired_over_prompts_takes_a_prompts_pictures_as_one():
    generator = np.random.default_rng(0)
    scores = generator.random((2, 6, 2))
    prompts = [f"p{i}" for i in range(6)]

    def opened(name, values, order):
        rows = [
            {"caption": prompts[i], "scores": {"scenes": values[i, j]}}
            for i in order
            for j in range(2)
        ]
        return Opened(name, report(scenes=float(values.mean())), rows)

    a, b = opened("a", scores[0], range(6)), opened("b", scores[1], range(5, -1, -1))
    found = compared_reports([a, b])["differences"]["scenes"][1]
    wanted = paired_difference(scores[0].mean(1), scores[1].mean(1))
    assert found["over_prompts"] == pytest.approx(wanted.to_json())
    assert found["over_prompts"]["n"] == 6
    c = Opened("c", b.report, b.scores[:-1])
    assert "over_prompts" not in compared_reports([a, c])["differences"]["scenes"][1]


def test_directions():
    assert [better(key) for key in ("fd@x", "scenes/colour", "scenes/fragments", "odd")] == [
        *("lower", "higher", "lower", None),
    ]


def test_from_the_command_line(tmp_path, capsys):
    rows = []
    for index in range(3):
        scene = scene_at("test", index)
        Image.fromarray(draw(scene)).save(tmp_path / f"{index}.png")
        rows.append({"file": f"{index}.png", "prompt": caption(scene), "seed": index})
    for name, kept in (("a", rows), ("b", rows[:2])):
        listing = "".join(json.dumps(row) + "\n" for row in kept)
        (tmp_path / "images.jsonl").write_text(listing, encoding="utf-8")
        command = ["--generated", str(tmp_path), "--metrics", "scenes", "--device", "cpu"]
        assert main(["evaluate", *command, "--out", str(tmp_path / f"{name}.json")]) == 0
    a, b, out = (str(tmp_path / name) for name in ("a.json", "b.json", "c.json"))
    capsys.readouterr()
    assert main(["evaluate", "compare", a, b]) == 1
    assert "generated images 3 against 2" in capsys.readouterr().err
    assert main(["evaluate", "compare", a, b, "--force", "--out", out]) == 0
    printed = capsys.readouterr().out
    assert "warning: " in printed
    assert "scenes ↑" in printed
    with open(out, encoding="utf-8") as file:
        assert json.load(file)["differences"]["scenes"][1]["difference"] == 0
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "compare", a])
    assert "two or more reports" in capsys.readouterr().err
    assert main(["evaluate", "compare", a, str(tmp_path / "no.json")]) == 1
    assert "there is no such report" in capsys.readouterr().err
    (tmp_path / "odd.json").write_text("{}")
    assert main(["evaluate", "compare", a, str(tmp_path / "odd.json")]) == 1
    assert "has no metrics" in capsys.readouterr().err


def test_a_comparison_is_no_report(tmp_path):
    file = tmp_path / "comparison.json"
    file.write_text(json.dumps(compared(report(), report())))
    with pytest.raises(ValueError, match="no report of `arra evaluate`: it has no counts"):
        open_report(str(file))
