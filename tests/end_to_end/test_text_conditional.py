"""From captions to pictures by features: prepare, train, paint, export, paint; stop and go on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from saved_runs import tensors_of
from tiny_t5 import WIDTH, save_tiny_t5
from transformers import AutoModel

from arra.cli import main
from arra.config import (
    AlignConfig,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from arra.data.prepare import prepare
from arra.data.prepare_config import PrepareConfig
from arra.data.shards import open_dataset
from arra.export import ExportConfig, export
from arra.files import read_json
from arra.generate.pictures import generate
from arra.generate.settings import GenerateConfig
from arra.image_tokenizers.vq import VQModel
from arra.models import load_model
from arra.models.llamagen_model import LlamaGenForImageGeneration
from arra.study.worker import Losses, Painting, WorkerJob, answer
from arra.train.loop import train

LENGTH = 10


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5") / "tiny-t5"
    save_tiny_t5(folder)
    return folder


@pytest.fixture(scope="module")
def data(tiny_tokenizer: VQModel, t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    lines = []
    for i in range(16):
        Image.effect_noise((8, 8), 10 * i).convert("RGB").save(source / f"{i}.png")
        words = ["a red circle", "two small blue squares left of the line", "a photo", "the line"]
        lines.append({"file_name": f"{i}.png", "text": words[i % 4]})
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path_factory.mktemp("prepared") / "data"
    return prepare(
        PrepareConfig(
            source=str(source),
            image_tokenizer=str(tiny_tokenizer.folder),
            out=out,
            encoder=("clip=builtin:scenes-clip",),
            text_encoder=f"t5={t5}",
            text_length=LENGTH,
            size=8,
            val_fraction=0.25,
            threads=1,
        )
    )


def config(data: Path, out: Path) -> TrainConfig:
    return TrainConfig(
        data_folder=str(data),
        out=str(out),
        recipe="base",
        steps=5,
        batch_size=4,
        threads=1,
        model=ModelConfig(
            architecture="llamagen", layers=2, hidden_size=16, heads=2, mlp_size=32, dropout=0.1
        ),
        align=AlignConfig(layer=(1,)),
        data=DataConfig(prompt_dropout=0.4),
        optim=OptimConfig(lr=3e-3, ema=0.5),
        checkpoint=CheckpointConfig(every=2, keep=0),
        log=LogConfig(every=1, validate_images=4, sample_every=5, samples=2),
    )


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config(data, tmp_path_factory.mktemp("runs") / "run"))


def test_a_run_learns_from_features_and_says_whose(run: Path, data: Path, t5: Path) -> None:
    info = open_dataset(data).manifest.text_features["t5"]
    assert read_json(run / "pipeline.json")["text_encoder"] == {
        "spec": str(t5),
        "length": LENGTH,
        "fingerprint": info.encoder,
    }
    backbone = load_model(run)
    assert (backbone.text_slots, backbone.text_width) == (LENGTH, WIDTH)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["val_loss_ar"] > 0
    assert lines[-1]["loss_gva"] > 0
    assert (run / "samples" / "step-00000005.png").is_file()
    torch.manual_seed(0)
    start = tensors_of(run, step=2)
    end = tensors_of(run)
    moved = {name for name, value in end.items() if not torch.equal(value, start[name])}
    assert {"cls_embedding.cap_proj.fc1.weight", "cls_embedding.uncond_embedding"} <= moved


def test_a_stopped_run_ends_at_the_same_tensors_of(run: Path, data: Path, tmp_path: Path) -> None:
    settings = config(data, tmp_path / "again")
    train(settings, stop_after=3)
    train(settings)
    again = tensors_of(tmp_path / "again")
    for name, value in tensors_of(run).items():
        assert torch.equal(value, again[name]), name


def test_run_and_export_paint_alike(run: Path, t5: Path, tmp_path: Path) -> None:
    exported = export(ExportConfig(str(run), str(tmp_path / "export"), weights="ema"))
    assert type(AutoModel.from_pretrained(exported / "model")) is LlamaGenForImageGeneration
    pictures = {}
    for name, model in {"run": run, "export": exported}.items():
        settings = GenerateConfig(
            str(model), str(tmp_path / name), ("a red circle", "the line"), num=2, slots=2
        )
        folder = generate(settings)
        pictures[name] = [file.read_bytes() for file in sorted(folder.glob("0*.png"))]
        assert len(pictures[name]) == 4
        assert generate(settings) == folder, "nothing left to paint"
    assert pictures["run"] == pictures["export"]
    moved = tmp_path / "moved"
    shutil.copytree(t5, moved)
    said = main(
        ["generate", str(exported), "a red circle", "--out", str(tmp_path / "moved-pictures")]
        + ["--text-encoder", str(moved), "--num", "1", "--slots", "2"]
    )
    assert said == 0
    assert (tmp_path / "moved-pictures" / "00000-0.png").read_bytes() == pictures["run"][0]
    # As published: a bare model folder, which names neither tokenizer nor encoder.
    said = main(
        ["generate", str(exported / "model"), "a red circle", "--out", str(tmp_path / "bare")]
        + ["--image-tokenizer", str(exported / "image_tokenizer"), "--text-encoder", str(t5)]
        + ["--num", "1", "--slots", "2"]
    )
    assert said == 0
    assert (tmp_path / "bare" / "00000-0.png").read_bytes() == pictures["run"][0]


def test_another_encoder_is_refused_when_painting_and_when_training_on(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_t5(tmp_path / "other", seed=1)
    arguments = ["generate", str(run), "a", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--text-encoder", str(tmp_path / "other")]) == 1
    assert "is not the text encoder that the model was trained with" in capsys.readouterr().err

    exported = export(ExportConfig(str(run), str(tmp_path / "export")))
    described = read_json(exported / "pipeline.json")
    described["text_encoder"]["fingerprint"] = "another"
    (exported / "pipeline.json").write_text(json.dumps(described))
    settings = replace(config(data, tmp_path / "on"), model_path=str(exported))
    with pytest.raises(ValueError, match="was trained with another text encoder or length"):
        train(settings)


def test_a_dataset_without_features_is_refused(
    run: Path, bare_dataset: Path, tmp_path: Path
) -> None:
    settings = replace(config(bare_dataset, tmp_path / "run"), align=AlignConfig(weight=0))
    with pytest.raises(ValueError, match="--text-encoder"):
        train(settings)
    exported = export(ExportConfig(str(run), str(tmp_path / "export")))
    with pytest.raises(ValueError, match=r"the dataset has none: prepare it with --text-encoder"):
        train(replace(settings, out=str(tmp_path / "on"), model_path=str(exported)))


def test_a_study_asks_it_like_any_other(run: Path, data: Path, tmp_path: Path) -> None:
    checkpoint = "step-00000005"
    losses = Losses(checkpoint, str(data), "val", 3, str(tmp_path / "losses.json"))
    painting = Painting(checkpoint, ["a red circle", "a photo"], 2.0, str(tmp_path / "painted"))
    answer(WorkerJob(str(run), 2, "cpu", [painting], [losses]))
    assert len(read_json(tmp_path / "losses.json")) == 3
    assert len(list((tmp_path / "painted").glob("*.png"))) == 2
