"""A checkpoint as its authors publish it: adapted, exported and painted with, in its own format."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import ChameleonForConditionalGeneration

from arra.cli import main
from arra.files import read_json

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from tiny_chameleon import CODE_IDS, publish, publish_lumina, tiny


def command(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--steps", "2", "--batch-size", "2", "--dtype", "float32", "--optim.lr", "1e-3"]
    places = ["--model", str(model), "--data", str(data), "--out", str(out)]
    return ["train", "adapt", *places, *sizes, "--engine.activation-checkpointing", "none", *more]


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
def test_adapt_export_and_paint(rank: int, tiny_dataset: Path, tmp_path: Path) -> None:
    if rank:
        pytest.importorskip("peft")
    published = publish(tmp_path / "published")
    run, out = tmp_path / "run", tmp_path / "export"
    lora = ["--lora.rank", str(rank)] if rank else []
    assert main(command(published, tiny_dataset, run, *lora)) == 0
    assert main(["export", str(run), "--out", str(out)]) == 0
    before = load_file(published / "model.safetensors")
    after = load_file(out / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("model.vqmodel.") for name in moved)
    blocks = {name for name in before if name.endswith("_proj.weight")}
    assert blocks <= moved
    if not rank:
        assert moved == {name for name in before if not name.startswith("model.vqmodel.")}
    _, found = ChameleonForConditionalGeneration.from_pretrained(
        out / "model", output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pictures = tmp_path / "pictures"
    paint = ["generate", str(out), "a line", "--num", "1", "--slots", "2", "--out", str(pictures)]
    assert main(paint) == 0
    assert (pictures / "00000-0.png").exists()
    assert read_json(pictures / "settings.json")["top_p"] == 0.9


def test_an_untaught_head_is_reset_only_when_asked(
    tiny_dataset: Path, tmp_path: Path, capsys: Any
) -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[CODE_IDS] = 0
    published = publish(tmp_path / "published", model)
    assert main(command(published, tiny_dataset, tmp_path / "a")) == 1
    assert "--model.reset-image-head" in capsys.readouterr().err
    assert main(command(published, tiny_dataset, tmp_path / "b", "--model.reset-image-head")) == 0


def test_sides_that_a_format_cannot_write_are_refused(
    tiny_dataset: Path, tmp_path: Path, capsys: Any
) -> None:
    published = publish_lumina(tmp_path / "published")
    assert main(command(published, tiny_dataset, tmp_path / "run")) == 1
    assert "a side of 3 codes has no size token" in capsys.readouterr().err
