"""A folder of class folders becomes a class-conditional painter, by the commands of the README."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from saved_runs import assert_same, tensors_of
from transformers import AutoModel, ViTConfig, ViTImageProcessorPil, ViTModel

from arra.cli import main
from arra.image_tokenizers.vq import VQModel
from arra.models import load_model
from arra.models.llamagen import LlamaGen

CLASSES = {"dark_red": (120, 0, 0), "green": (0, 200, 0), "light blue": (120, 160, 255)}
TINY = [
    *("--model.layers", "3", "--model.hidden-size", "32", "--model.heads", "2"),
    *("--model.mlp-size", "48", "--align.layer", "2", "--batch-size", "4", "--optim.lr", "0.01"),
    *("--steps", "10", "--checkpoint.every", "5", "--checkpoint.keep", "0", "--log.every", "1"),
    *("--threads", "1", "--dtype", "float32", "--optim.ema", "0.5"),
]


@pytest.fixture(scope="module")
def dataset(tiny_tokenizer: VQModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, encoder = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("vit")
    generator = np.random.default_rng(0)
    for name, colour in CLASSES.items():
        (source / name).mkdir()
        for i in range(4):
            pixels = np.clip(np.array(colour) + generator.normal(0, 20, (10, 10, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(source / name / f"{i}.png")
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 12, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    ViTModel(ViTConfig(**sizes), add_pooling_layer=False).save_pretrained(encoder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(encoder)
    out = tmp_path_factory.mktemp("prepared") / "data"
    command = ["prepare", str(source), "--image-tokenizer", str(tiny_tokenizer.folder)]
    command += ["--encoder", f"vit={encoder}", "--size", "8", "--out", str(out)]
    assert main(command) == 0
    return out


def trained(dataset: Path, run: Path, *extra: str) -> Path:
    assert main(["train", "base", "--data", str(dataset), "--out", str(run), *TINY, *extra]) == 0
    return run


def test_a_class_dataset_from_folders_to_pictures(dataset: Path, tmp_path: Path) -> None:
    run = trained(dataset, tmp_path / "run")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    assert "loss_gva" in log[-1]
    backbone = load_model(run)
    assert isinstance(backbone, LlamaGen)
    assert list(backbone.model.config.id2label.values()) == list(CLASSES)
    painted, prompts = tmp_path / "painted", ["dark red", "light blue", "1"]
    assert main(["generate", str(run), *prompts, "--out", str(painted), "--num", "2"]) == 0
    images = [Image.open(painted / f"{i:05d}-{j}.png") for i in range(3) for j in range(2)]
    assert {image.size for image in images} == {(8, 8)}
    assert main(["export", str(run), "--out", str(tmp_path / "export"), "--weights", "ema"]) == 0
    model = AutoModel.from_pretrained(tmp_path / "export" / "model")
    assert model.config.id2label[1] == "green"
    again = tmp_path / "again"
    assert main(["generate", str(tmp_path / "export"), *prompts, "--out", str(again)]) == 0
    for i in range(3):  # a run folder paints with its averaged weights as well
        one, other = (Image.open(at / f"{i:05d}-0.png") for at in (painted, again))
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_an_adapter_goes_on_with_a_class_painter(dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    start = trained(dataset, tmp_path / "start", "--align.weight", "0", "--optim.ema", "0")
    assert main(["export", str(start), "--out", str(tmp_path / "base")]) == 0
    command = ["train", "adapt", "--data", str(dataset), "--model", str(tmp_path / "base"), *TINY]
    assert main([*command, "--out", str(tmp_path / "run"), "--lora.rank", "2"]) == 0
    before, after = load_model(tmp_path / "base").model, load_model(tmp_path / "run").model
    moved = {n: not torch.equal(p, after.get_parameter(n)) for n, p in before.named_parameters()}
    assert moved == {name: "norm" not in name for name in moved}, "adapted or trained, but norms"


def test_an_adapter_keeps_the_names_that_a_dataset_gives(dataset: Path, tmp_path: Path) -> None:
    """A converted checkpoint numbers its classes: it holds the weights, but not the names."""
    pytest.importorskip("peft")
    trained(dataset, tmp_path / "start", "--align.weight", "0", "--optim.ema", "0")
    model = load_model(tmp_path / "start").model
    model.config.id2label = {i: str(i) for i in range(len(CLASSES))}
    model.save_pretrained(tmp_path / "numbered")
    command = ["train", "adapt", "--data", str(dataset), "--model", str(tmp_path / "numbered")]
    assert main([*command, *TINY, "--out", str(tmp_path / "run"), "--lora.rank", "2"]) == 0
    assert list(load_model(tmp_path / "run").model.config.id2label.values()) == list(CLASSES)


def test_what_a_class_painter_cannot_gets_one_line(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ["--loss.text", "--out", str(tmp_path / "text")]
    assert main(["train", "base", "--data", str(dataset), *TINY, *text]) == 1
    assert "prompts are no text" in capsys.readouterr().err
    run = trained(dataset, tmp_path / "run", "--align.weight", "0")
    assert main(["generate", str(run), "purple", "--out", str(tmp_path / "painted")]) == 1
    assert "there is no class 'purple': this model paints 3 classes" in capsys.readouterr().err


def test_a_stopped_run_ends_at_the_same_weights(dataset: Path, tmp_path: Path) -> None:
    """Dropout included: it is drawn from (seed, step)."""
    whole, parts = trained(dataset, tmp_path / "whole"), tmp_path / "parts"
    trained(dataset, parts)
    shutil.rmtree(parts / "checkpoints" / "step-00000010")
    trained(dataset, parts)
    assert_same(tensors_of(whole), tensors_of(parts))


def test_captions_without_features_train_a_language_model(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "base", "--data", str(tiny_dataset), *TINY, "--steps", "2"]
    small = ["--model.max-length", "64", "--model.text-vocabulary", "280"]
    assert main([*command, *small, "--out", str(tmp_path / "run")]) == 0
    assert load_model(tmp_path / "run").text_tokenizer is not None
    named = ["--out", str(tmp_path / "named"), "--model.architecture", "llamagen"]
    assert main([*command, *named]) == 1
    assert "prepare class folders" in capsys.readouterr().err
