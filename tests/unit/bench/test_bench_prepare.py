"""`arra bench prepare`: every stage is timed, and the result is one JSON line at the end."""

import json

import pytest
from PIL import Image

from arra.bench import pictures
from arra.cli import main


def test_the_stages_and_the_whole(capsys, monkeypatch):
    monkeypatch.setattr(pictures, "DISTINCT", 5)
    small = ["--images", "24", "--stage-images", "10", "--size", "32", "--workers", "0"]
    small += ["--image-tokenizer", "builtin:scenes", "--encoder", "builtin:scenes-clip"]
    assert main(["bench", "prepare", *small, "--compare-one-by-one"]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["images"] == 24
    assert result["left_out"] == 0
    assert set(result["stages_alone"]) == {"decode", "device", "write"}
    assert result["slowest_stage"] in result["stages_alone"]
    parts = {"read", "decode and crop", "preprocess scenes-clip", "tokenizer", "write"}
    assert set(result["split_ms_per_image"]) == parts | {"encoder scenes-clip"}
    assert result["batch_size"] == 4
    assert result["times_one_by_one"] > 0
    assert any("slowest stage" in line for line in lines[:-1])


def test_what_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "DISTINCT", 2)
    pictures.write_pictures(tmp_path, 3)
    files = sorted(tmp_path.rglob("*.jpg"))
    assert len((tmp_path / "metadata.jsonl").read_text().splitlines()) == len(files) == 3
    for file in files:
        assert all(256 <= side < 512 for side in Image.open(file).size)


@pytest.mark.parametrize("wrong", [["--images", "0"], ["nothing"]])
def test_wrong_use(wrong, capsys):
    verb = ["bench", "prepare", *wrong] if wrong[0].startswith("-") else ["bench", *wrong]
    with pytest.raises(SystemExit, match="2"):
        raise SystemExit(main(verb))
    assert capsys.readouterr().err
