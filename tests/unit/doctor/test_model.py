"""The doctor of models: what is right is said, what is wrong is found and named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_chameleon import publish
from tiny_painters import publish_janus

from arra.cli import main
from arra.doctor.model import is_model, look_at
from arra.doctor.settings import ModelCheckConfig
from arra.files import read_json, write_json
from arra.resolve import resolve_folder


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    shutil.copytree(resolve_folder("builtin:scenes", "model"), folder)
    return folder


def found(folder: Path, **options: Any) -> dict[str, list[str]]:
    """Check -> its findings that are no notes, as lines."""
    audit = look_at(ModelCheckConfig(str(folder), **options))
    return {
        check.name: [f.line() for f in check.findings if f.level != "note"]
        for check in audit.checks
        if check.status != "ok"
    }


def change_weights(folder: Path, change: Any) -> None:
    file = next(folder.rglob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_a_whole_export_is_fine(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(export)]) == 0
    said = capsys.readouterr().out
    assert "CausalLM (Qwen3ForCausalLM): 4 blocks of width 256" in said
    assert "512 codes (ids 360 to 871), begin 358, end 359, 8 x 8 codes" in said
    assert "float16 3.46 M" in said
    assert "the one that it was trained with" in said
    assert said.endswith("verdict: fine\n")


def test_json_and_bundled_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "builtin:scenes", "--json"]) == 0
    facts = {c["name"]: c["facts"] for c in json.loads(capsys.readouterr().out)["checks"]}
    assert facts["weights"]["bytes"] == {"float16": 2 * facts["weights"]["parameters"]["float16"]}
    assert facts["format"]["grid"] == [8, 8]


@pytest.mark.parametrize("name", ["janus", "chameleon"])
def test_published_checkpoints(name: str, tmp_path: Path) -> None:
    publish_janus(tmp_path / name) if name == "janus" else publish(tmp_path / name)
    assert is_model(str(tmp_path / name))
    assert set(found(tmp_path / name)) <= {"image tokenizer", "format", "painting"}


def test_weights_that_are_not_finite(export: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])

    change_weights(export, spoil)
    (line,) = found(export)["weights"]
    assert "3 weights not finite in 1 tensor (model.norm.weight)" in line


def test_missing_tensors(export: Path) -> None:
    change_weights(export, lambda tensors: tensors.pop("model.norm.weight"))
    (line,) = found(export)["family"]
    assert "1 tensors are missing, such as model.norm.weight" in line
    assert main(["doctor", str(export)]) == 1


def test_a_file_that_is_cut_off(export: Path) -> None:
    file = next((export / "model").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    assert "damaged" in found(export)["weights"][0]


def test_shards_and_their_index(export: Path) -> None:
    file = next((export / "model").glob("*.safetensors"))
    names = load_file(file)
    index = {"weight_map": {**dict.fromkeys(names, file.name), "x": "model-2.safetensors"}}
    write_json(file.with_name("model.safetensors.index.json"), index)
    shutil.copy(file, file.with_name("model-3.safetensors"))
    missing, unread = found(export)["weights"]
    assert "1 file named by the index, but missing (model-2.safetensors)" in missing
    assert "1 file not named by the index, so never read (model-3.safetensors)" in unread


def test_pickles_and_code_are_warned_of(export: Path) -> None:
    (export / "model" / "training_args.bin").write_bytes(b"")
    config = export / "model" / "config.json"
    write_json(config, {**read_json(config), "auto_map": {"AutoModel": "modeling.Mine"}})
    (export / "model" / "modeling.py").write_text("raise SystemExit")
    pickled, code = found(export)["files"]
    assert "1 pickled file, which can run code when opened (model/training_args.bin)" in pickled
    assert "(model/modeling.py, model/config.json)" in code
    assert main(["doctor", str(export)]) == 0
    assert main(["doctor", str(export), "--strict"]) == 1


def test_another_image_tokenizer(export: Path) -> None:
    file = export / "pipeline.json"
    described = read_json(file)
    described["image_tokenizer"]["fingerprint"] = "0" * 64
    write_json(file, described)
    assert "its fingerprint differs" in found(export)["image tokenizer"][0]


def test_never_taught_to_paint(tmp_path: Path) -> None:
    publish(tmp_path)

    def wipe(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"][4:20] = 0

    change_weights(tmp_path, wipe)
    assert "never taught to paint" in found(tmp_path)["painting"][0]


def test_what_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path)]) == 2
    assert "no model" in capsys.readouterr().err
    (tmp_path / "c2i_B_256.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="arra convert"):
        look_at(ModelCheckConfig(str(tmp_path / "c2i_B_256.pt")))
