"""The model card of an export says what the run was, and nothing that is nobody's business."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from arra.config import (
    AlignConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from arra.export import ExportConfig, export
from arra.files import read_json, write_json
from arra.models import load_model
from arra.train.loop import train

CAPTIONS = ("a red circle", "two blue squares", "a line")


@pytest.fixture
def config(tiny_dataset: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        data_folder=str(tiny_dataset),
        out=str(tmp_path / "run"),
        steps=3,
        batch_size=4,
        threads=1,
        device="cpu",
        model=ModelConfig(layers=2, hidden_size=24, heads=2, mlp_size=32, text_vocabulary=280),
        align=AlignConfig(weight=0.5, layer=(2,)),
        loss=LossConfig(z=1e-5),
        optim=OptimConfig(ema=0.9),
    )


def test_the_card_says_what_was_trained(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    out = export(ExportConfig(config.out, str(tmp_path / "my painter"), weights="ema"))
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-to-image"
    assert card.data.license is None
    assert "arra" in card.data.tags
    text = card.content
    for said in (
        "12 train, 4 val",
        "lambda 0.5, block 2, positions `hybnext`, raw features",
        "next-token cross entropy over all tokens, z-loss 1e-05",
        "3 of 3, averaged weights (decay 0.9)",
        "12 (4 a step)",
        "2 x 3 codes",
        "made up (class, 6 values)",
        "`gva_constant`",
        "not for diagnosis",
        "Nothing of that is left at inference",
        "arra generate 'my painter'",
        read_json(Path(config.out) / "run_card.json")["hashes"]["dataset_manifest"],
    ):
        assert said in text, said
    for hidden in (str(tmp_path), config.data_folder, str(Path.home()), *CAPTIONS):
        assert hidden not in text, hidden
    # The last Python on the page opens the model without this package.
    code = re.findall(r"```python\n(.*?)```", text, re.S)[-1]
    space: dict = {}
    exec(code.replace("my painter", str(out)), space)
    own = load_model(out).model
    assert sum(p.numel() for p in space["model"].parameters()) == own.num_parameters()


def test_a_baseline_and_names_of_the_hub(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, align=AlignConfig(weight=0), optim=OptimConfig())
    train(config)
    card = read_json(Path(config.out) / "run_card.json")
    card["model"]["name"], card["data"]["source"] = "someone/small-lm", "someone/pictures"
    write_json(Path(config.out) / "run_card.json", card)
    written = ModelCard.load(export(ExportConfig(config.out, str(tmp_path / "out"))) / "README.md")
    assert written.data.base_model == "someone/small-lm"
    assert written.data.datasets == ["someone/pictures"]
    assert "plain next-token baseline" in written.content
    assert "encoder sees" not in written.content
    assert "started from someone/small-lm" in written.content


def test_an_adapter_alone(config: TrainConfig, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    train(replace(config, out=str(tmp_path / "first")))
    painter = export(ExportConfig(str(tmp_path / "first"), str(tmp_path / "painter")))
    train(replace(config, model_path=str(painter), lora=LoraConfig(rank=2)))
    out = export(ExportConfig(config.out, str(tmp_path / "adapter"), adapter_only=True))
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "peft"
    assert "PeftModel.from_pretrained" in card.content
    assert "rank 2" in card.content
    assert "started from painter" in card.content
    assert str(tmp_path) not in card.content
