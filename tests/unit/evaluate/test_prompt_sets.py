"""GenEval and DPG-Bench: what their scorers read is what we write, and their files are read back.

The golden numbers were printed by the scorers' own code on files made here: GenEval's
summary_scores.py at af4902f; DPG-Bench's compute_dpg_bench.py (ELLA at 3c228f1) with a made-up
judge in the place of its network.
"""

import json
from pathlib import Path

import pytest
from PIL import Image

from arra.cli import main
from arra.evaluate.prompt_sets import (
    ArrangeConfig,
    ScoredConfig,
    arrange,
    read_scored,
    told,
)
from arra.generate.pictures import read_prompts
from arra.generate.settings import GenerateConfig

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "cow"}], "prompt": "a photo of a cow"},
    {"tag": "counting", "include": [], "exclude": [], "prompt": "a photo of two clocks"},
    {"tag": "counting", "include": [], "prompt": "a photo of four clöcks"},
]
DPG = {"COCOval2014000000580698": "A barn.\n", "12": "Two clocks on a wall"}


def paint(folder: Path, prompts: list[str], num: int, side: int = 8) -> Path:
    """As `arra generate` writes a folder; picture n is grey n."""
    folder.mkdir()
    lines = []
    for i, prompt in enumerate(prompts):
        for j in range(num):
            name = f"{i:05d}-{j}.png"
            Image.new("RGB", (side, side), (i * num + j,) * 3).save(folder / name)
            lines.append(json.dumps({"file": name, "prompt": prompt, "seed": j}))
    (folder / "images.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def geneval(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(e) + "\n" for e in GENEVAL), encoding="utf-8")
    return file


@pytest.fixture
def dpg(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for item, prompt in DPG.items():
        (folder / f"{item}.txt").write_text(prompt, encoding="utf-8")
    return folder


def prompts_of(spec: Path) -> list[str]:
    return read_prompts(GenerateConfig("m", "o", (), str(spec)))


def test_geneval_folders(geneval, tmp_path):
    painted = paint(tmp_path / "painted", prompts_of(geneval), 4)
    out = tmp_path / "out"
    said = arrange(ArrangeConfig("geneval", str(painted), str(geneval), str(out)))
    assert "3 prompts, 4 pictures each" in said
    assert sorted(p.name for p in out.iterdir()) == ["00000", "00001", "00002"]
    for number, entry in enumerate(GENEVAL):
        folder = out / f"{number:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text("utf-8")) == entry
        names = sorted(p.name for p in (folder / "samples").iterdir())
        assert names == ["00000.png", "00001.png", "00002.png", "00003.png"]
        for image, name in enumerate(names):
            with Image.open(folder / "samples" / name) as opened:
                assert opened.getpixel((0, 0)) == (4 * number + image,) * 3
    with pytest.raises(FileExistsError):
        arrange(ArrangeConfig("geneval", str(painted), str(geneval), str(out)))


def test_dpg_grids(dpg, tmp_path):
    painted = paint(tmp_path / "painted", prompts_of(dpg), 4)
    out = tmp_path / "out"
    said = arrange(ArrangeConfig("dpg", str(painted), str(dpg), str(out)))
    assert "PIC_NUM=4" in said
    assert said.endswith(" 8")
    assert sorted(p.name for p in out.iterdir()) == ["12.png", "COCOval2014000000580698.png"]
    with Image.open(out / "COCOval2014000000580698.png") as grid:
        assert grid.size == (16, 16)
        corners = [grid.getpixel(p) for p in ((0, 0), (8, 0), (0, 8), (8, 8))]
    assert corners == [(value,) * 3 for value in (4, 5, 6, 7)]


def test_dpg_single_pictures(dpg, tmp_path):
    painted = paint(tmp_path / "painted", prompts_of(dpg), 1)
    arrange(ArrangeConfig("dpg", str(painted), str(dpg), str(tmp_path / "out")))
    with Image.open(tmp_path / "out" / "12.png") as one:
        assert one.size == (8, 8)


def test_what_cannot_be_arranged(geneval, dpg, tmp_path):
    prompts = prompts_of(geneval)

    def refused(match, painted, benchmark="geneval", spec=geneval):
        out = tmp_path / "out"
        with pytest.raises(ValueError, match=match):
            arrange(ArrangeConfig(benchmark, str(painted), str(spec), str(out)))
        assert not out.exists()

    refused("has no images.jsonl", tmp_path)
    refused("no multiple of the 3 prompts", paint(tmp_path / "a", prompts[:2], 2))
    refused("picture 0 of .* shows 'a photo of four", paint(tmp_path / "b", prompts[::-1], 1))
    broken = paint(tmp_path / "c", prompts, 1)
    (broken / "00001-0.png").unlink()
    refused("is listed but not there", broken)
    outside = paint(tmp_path / "f", prompts, 1)
    listing = (outside / "images.jsonl").read_text("utf-8")
    for name in ("../secret.png", "/secret.png"):
        (outside / "images.jsonl").write_text(listing.replace("00000-0.png", name), "utf-8")
        refused("picture 0 of .* cannot be used", outside)
    refused("at most 4", paint(tmp_path / "d", prompts_of(dpg), 5), "dpg", dpg)
    odd = paint(tmp_path / "e", prompts_of(dpg), 2)
    Image.new("RGB", (8, 16)).save(odd / "00001-1.png")
    refused("8x16 pixels; the scorer cuts squares", odd, "dpg", dpg)
    geneval.write_text('{"prompt": "a"}\n')
    refused("line 1 is no JSON object with a tag", broken)


def made_up_results(file: Path) -> Path:
    """25 images: prompts have unequal numbers of pictures, tags unequal numbers of prompts."""
    rows = []
    for prompt in range(9):
        tag = ("single_object", "counting", "colors")[prompt % 7 % 3]
        metadata = json.dumps({"tag": tag, "prompt": f"p{prompt}"})
        for image in range(1 + prompt % 5):
            correct = (prompt * 7 + image * 3) % 5 < 2
            name = f"o/{prompt:05d}/samples/{image:05d}.png"
            rows.append(
                {"filename": name, "tag": tag, "prompt": f"p{prompt}", "correct": correct,
                 "reason": "", "metadata": metadata, "details": "{}"}
            )  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_geneval_scores_are_the_scorers_own(tmp_path):
    results = made_up_results(tmp_path / "results.jsonl")
    found = read_scored(ScoredConfig("geneval", str(results), out=str(tmp_path / "s.json")))
    shares = {name: (finding.value, finding.n) for name, finding in found.items()}
    assert shares == {
        name: (pytest.approx(value, abs=5e-6), n) for name, (value, n) in GOLDEN_GENEVAL.items()
    }
    for finding in found.values():
        assert finding.low <= finding.value <= finding.high
    assert json.loads((tmp_path / "s.json").read_text())["scores"]["geneval"]["n"] == 25
    assert told(found).startswith("geneval  ")


def test_geneval_prompts_that_were_not_scored(geneval, tmp_path):
    results = made_up_results(tmp_path / "results.jsonl")
    with pytest.raises(ValueError, match="3 of 3 prompts are not scored"):
        read_scored(ScoredConfig("geneval", str(results), str(geneval)))
    results.write_text('{"tag": "counting", "metadata": "no JSON", "correct": true}\n')
    with pytest.raises(ValueError, match="3 of 3 prompts are not scored"):
        read_scored(ScoredConfig("geneval", str(results), str(geneval)))
    results.write_text('{"tag": "counting"}\n')
    with pytest.raises(ValueError, match="line 1 has no tag, metadata and correct"):
        read_scored(ScoredConfig("geneval", str(results)))


def test_dpg_scores_are_the_scorers_own(dpg, tmp_path):
    results = tmp_path / "r.txt"
    results.write_text(GOLDEN_DPG.replace("Image path: o", "Image path: 12"))
    found = read_scored(ScoredConfig("dpg", str(results), str(dpg)))
    assert found["dpg"].value == pytest.approx(GOLDEN_DPG_SCORE, rel=1e-12)
    assert found["dpg"].n == 2
    assert {k: f.value for k, f in found.items() if k != "dpg"} == GOLDEN_DPG_CATEGORIES
    (dpg / "z.txt").write_text("a barn")
    with pytest.raises(ValueError, match=r"1 of 3 prompts are not scored in .*'z'"):
        read_scored(ScoredConfig("dpg", str(results), str(dpg)))
    results.write_text(GOLDEN_DPG.splitlines()[0] + "\n" + GOLDEN_DPG.split("\n", 2)[2])
    with pytest.raises(ValueError, match="lines of several runs"):
        read_scored(ScoredConfig("dpg", str(results)))
    results.write_text(GOLDEN_DPG.splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="no score at its end"):
        read_scored(ScoredConfig("dpg", str(results)))


# What summary_scores.py printed: shares with their (right / all), the overall score to five digits.
GOLDEN_GENEVAL = {
    "geneval": (0.48485, 25),
    "geneval/single_object": (5 / 10, 10),
    "geneval/counting": (5 / 11, 11),
    "geneval/colors": (2 / 4, 4),
}
# What compute_dpg_bench.py wrote about a folder of `arrange`, two prompts of four pictures.
GOLDEN_DPG = """\
o/COCOval2014000000580698.png, 0.0, 0.3333333333333333, 1.0, 0.0, 0.3333333333333333
o/12.png, 0.5, 0.5, 0.25, 0.5, 0.4375
Model: o
L1 category scores:
\tentity: 66.66666666666666
\trelation: 0.0
\tother: 50.0
\tattribute: 100.0
L2 category scores:
\tattribute - color: 100.0
\tentity - whole: 66.66666666666666
\tother - count: 50.0
\trelation - spatial: 0.0
Image path: o
Save results to: r.txt
DPG-Bench score: 38.541666666666664
"""
GOLDEN_DPG_SCORE = 38.541666666666664
GOLDEN_DPG_CATEGORIES = {
    "dpg/entity": 66.66666666666666,
    "dpg/relation": 0.0,
    "dpg/other": 50.0,
    "dpg/attribute": 100.0,
    "dpg/attribute - color": 100.0,
    "dpg/entity - whole": 66.66666666666666,
    "dpg/other - count": 50.0,
    "dpg/relation - spatial": 0.0,
}


def test_from_the_command_line(geneval, tmp_path, capsys):
    painted = paint(tmp_path / "painted", prompts_of(geneval), 2)
    results = made_up_results(tmp_path / "results.jsonl")
    out = str(tmp_path / "out")
    assert (
        main(
            [
                "evaluate",
                "arrange",
                "geneval",
                str(painted),
                "--prompts",
                str(geneval),
                "--out",
                out,
            ]
        )
        == 0
    )
    assert "score them with evaluate_images.py" in capsys.readouterr().out
    assert main(["evaluate", "scored", "geneval", str(results)]) == 0
    assert capsys.readouterr().out.startswith("geneval  ")
    assert main(["evaluate", "scored", "geneval", str(results), "--prompts", str(geneval)]) == 1
    assert "3 of 3 prompts are not scored" in capsys.readouterr().err
    assert main(["evaluate", "score", "geneval"]) == 2
    assert "there is arrange, compare, scored, sweep" in capsys.readouterr().err
