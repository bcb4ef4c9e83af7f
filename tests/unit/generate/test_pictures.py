"""`arra generate`: the folder it writes, going on after a stop, and bad input."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from arra.cli import main
from arra.files import read_json
from arra.generate import pictures
from arra.generate.pictures import generate, read_prompts
from arra.generate.pipeline import Pipeline
from arra.generate.request import Request
from arra.generate.settings import GenerateConfig

PROMPTS = ("a red circle", "two blue squares left of a line")


def config(model: Path, out: Path, **changes: object) -> GenerateConfig:
    options: dict[str, object] = {"prompts": PROMPTS, "num": 2, "seed": 5, "slots": 2}
    return GenerateConfig(model=str(model), out=str(out), device="cpu", **(options | changes))


def contents(folder: Path) -> dict[str, bytes]:
    assert not [name for name in os.listdir(folder) if name.endswith(".partial")]
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_the_folder(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = generate(config(exported, tmp_path / "pics", cfg=2.0, top_k=9))
    names = ["00000-0.png", "00000-1.png", "00001-0.png", "00001-1.png"]
    assert sorted(contents(out)) == [*names, "grid.png", "images.jsonl", "settings.json"]
    lines = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    sampling = {
        "cfg": 2.0,
        "temperature": 1.0,
        "top_k": 9,
        "top_p": 1.0,
        "cfg_interval": [0.0, 1.0],
    }
    assert lines == [
        {"file": name, "prompt": PROMPTS[i // 2], "seed": 5 + i % 2} | sampling
        for i, name in enumerate(names)
    ]
    pipe = Pipeline.from_pretrained(exported)
    expected = pipe([PROMPTS[1]], seeds=[6], cfg=2.0, top_k=9, slots=2)[0]
    with Image.open(out / "00001-1.png") as found:
        assert found.convert("RGB").tobytes() == expected.tobytes()
    settings = read_json(out / "settings.json")
    assert settings["prompts"] == list(PROMPTS)
    assert settings["ran_on"]["device"] == "cpu"
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "4/4 images" in captured.err, "plain lines where there is no terminal"


def test_the_same_command_paints_only_what_is_missing(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(exported, tmp_path / "pics")
    before = contents(generate(wanted))
    painted: list[str] = []
    requests = Pipeline.requests

    def counting(self: Pipeline, prompts: list[str], *rest: Any) -> list[Request]:
        painted.extend(prompts)
        return requests(self, prompts, *rest)

    monkeypatch.setattr(Pipeline, "requests", counting)
    generate(wanted)
    assert painted == []
    (tmp_path / "pics" / "00001-0.png").unlink()
    (tmp_path / "pics" / "images.jsonl").unlink()
    generate(wanted)
    assert painted == [PROMPTS[1]]
    assert contents(tmp_path / "pics") == before


def test_stopped_half_way_it_ends_at_the_same_bytes(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(generate(config(exported, tmp_path / "whole")))

    def full(*_: object) -> torch.Tensor:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        calls = iter([Pipeline.decode, full])
        patch.setattr(Pipeline, "decode", lambda *a: next(calls)(*a))
        with pytest.raises(OSError, match="No space"):
            generate(config(exported, tmp_path / "half"))
    half = contents(tmp_path / "half")
    assert len(half) == 2, "settings and the first picture"
    assert "images.jsonl" not in half, "the list says that all are finished"
    assert contents(generate(config(exported, tmp_path / "half"))) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"cfg": 2.0}, r"--cfg: 3.0 -> 2.0"),
        ({"seed": 6}, r"--seed: 5 -> 6"),
        ({"num": 3, "slots": 4}, r"--num: 2 -> 3, --slots: 2 -> 4"),
        ({"prompts": PROMPTS[:1]}, r"the prompts"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(
    change: dict[str, object],
    named: str,
    exported: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    out = tmp_path_factory.getbasetemp() / "shared-pics"
    before = contents(generate(config(exported, out)))
    with pytest.raises(ValueError, match=rf"other settings \({named}\): choose another --out"):
        generate(config(exported, out, **change))
    assert contents(out) == before


def test_other_weights_are_refused_and_a_moved_model_is_not(exported: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(exported, tmp_path / "moved")
    out = generate(config(exported, tmp_path / "pics"))
    generate(config(moved, out))
    pipe = Pipeline.from_pretrained(moved)
    with torch.no_grad():
        pipe.backbone.model.get_output_embeddings().weight[0] += 1e-3
    pipe.backbone.save(moved)
    with pytest.raises(ValueError, match=r"\(the model's weights\)"):
        generate(config(moved, out))


def test_a_mistake_that_painted_nothing_may_be_corrected(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="codes needs"):
        generate(config(exported, tmp_path / "pics", grid=(90, 90)))
    generate(config(exported, tmp_path / "pics"))


def test_somebody_elses_pictures_are_left_alone(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "holiday.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds pictures but no settings\.json"):
        generate(config(exported, tmp_path))
    assert os.listdir(tmp_path) == ["holiday.png"]


# ---- prompts -------------------------------------------------------------------------------------


def test_prompts_from_files(tmp_path: Path) -> None:
    text = tmp_path / "p.txt"
    text.write_bytes(b"\xef\xbb\xbfa red circle\r\n two\xc2\x85words \n\n")
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "a", "text": "b"}\n{"text": "c\u2028d"}\n', encoding="utf-8")
    first = GenerateConfig("m", "o", ("zero",), str(text))
    assert read_prompts(first) == ["zero", "a red circle", " two\x85words "]
    assert read_prompts(GenerateConfig("m", "o", (), str(lines))) == ["a", "c\u2028d"]


def test_prompts_from_a_folder_of_one_file_each(tmp_path: Path) -> None:
    config = GenerateConfig("m", "o", (), str(tmp_path))
    with pytest.raises(ValueError, match="is a folder without prompts"):
        read_prompts(config)
    (tmp_path / "b.txt").write_text("a red\ncircle\n", encoding="utf-8")
    (tmp_path / "a10.txt").write_text("two lines", encoding="utf-8")
    assert read_prompts(config) == ["two lines", "a red circle"]
    (tmp_path / "c.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"c.txt is empty"):
        read_prompts(config)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("p.txt", b"", "is empty: write one prompt per line"),
        ("p.txt", b"\n \n", "is empty"),
        ("p.txt", b"a\n\nb\n", "line 2 is not a prompt"),
        ("p.txt", b"caf\xe9\n", r"is not UTF-8 \(byte 3\)"),
        ("p.jsonl", b'{"prompt": "a"}\n{"caption": "b"}\n', 'line 2 is not a JSON object with "pr'),
        ("p.jsonl", b'{"prompt": ""}\n', "line 1 is not"),
        ("p.jsonl", b"a red circle\n", "line 1 is not a JSON object"),
        ("p.jsonl", b'{"prompt": 3}\n', "line 1 is not"),
    ],
)
def test_bad_prompt_files(name: str, content: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        read_prompts(GenerateConfig("m", "o", (), str(tmp_path / name)))


@pytest.mark.parametrize(
    ("prompts", "file", "complaint"),
    [
        ((), None, "nothing to paint"),
        (("a", " "), None, "prompt 2 is empty"),
        (("a\udce9",), None, "prompt 1 is not UTF-8"),
        ((), "nowhere.txt", "nowhere.txt: there is no such file"),
    ],
)
def test_missing_prompts(
    prompts: tuple[str, ...], file: str | None, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "Pipeline", None)  # said before anything is loaded
    with pytest.raises(ValueError, match=complaint):
        generate(GenerateConfig("m", "o", prompts, file))


# ---- the command ---------------------------------------------------------------------------------


def test_the_command(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "pics")
    command = ["generate", str(exported), "a circle", "--out", out, "--device", "cpu"]
    assert main([*command, "--num", "1", "--cfg", "1", "--top-k", "4", "--slots", "1"]) == 0
    assert capsys.readouterr().out.strip() == out
    assert read_json(tmp_path / "pics" / "settings.json")["top_k"] == 4
    assert main([*command, "--num", "1"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "--cfg: 1.0 -> 3.0, --top-k: 4 -> 0, --slots: 1 -> 32" in told


@pytest.mark.parametrize(
    "wrong",
    [["--cfg", "-1"], ["--num", "0"], ["--slots", "0"], ["--seed", "-1"], ["--top-p", "0"]],
)
def test_wrong_use_exits_2(wrong: list[str], tmp_path: Path) -> None:
    command = ["generate", "builtin:scenes", "a", "--out", str(tmp_path / "o"), *wrong]
    try:
        code = main(command)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("device", ["toaster", "cuda:7"])
def test_a_device_that_is_not_there(device: str, exported: Path, tmp_path: Path) -> None:
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=f"--device {device}"):
        generate(GenerateConfig(str(exported), str(tmp_path / "o"), ("a",), device=device))
