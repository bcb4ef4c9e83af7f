"""`arra train cca` from a painter to an export: resume, log, default sampling, model card."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Literal

import pytest
import torch
from ranks import in_ranks
from saved_runs import assert_same_run, log_of, tensors_of

from arra.cli import main
from arra.config import (
    AlignConfig,
    CcaConfig,
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from arra.export import ExportConfig, export
from arra.files import read_json
from arra.train.loop import train


@pytest.fixture(scope="module")
def painter(bare_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("painter") / "run"
    model = ModelConfig(layers=2, hidden_size=24, heads=2, mlp_size=32, text_vocabulary=280)
    return train(
        TrainConfig(
            data_folder=str(bare_dataset),
            out=str(run),
            steps=2,
            batch_size=4,
            threads=1,
            model=model,
            align=AlignConfig(weight=0.0),
        )
    )


@pytest.fixture
def config(painter: Path, bare_dataset: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        data_folder=str(bare_dataset),
        out=str(tmp_path / "run"),
        model_path=str(painter),
        objective="cca",
        steps=6,
        batch_size=4,
        threads=1,
        align=AlignConfig(weight=0.0),
        cca=CcaConfig(beta=0.5, weight=2.0),
        data=DataConfig(prompt_dropout=0.25),
        optim=OptimConfig(lr=3e-3, schedule="constant", warmup=0.0),
        checkpoint=CheckpointConfig(every=2, keep=0),
        log=LogConfig(every=1, validate_images=4),
    )


def test_a_run_and_the_same_run_resumed(config: TrainConfig, tmp_path: Path) -> None:
    whole = train(config)
    halves = dataclasses.replace(config, out=str(tmp_path / "halves"))
    train(halves, stop_after=3)
    resumed = train(halves)
    assert_same_run(resumed, whole)
    first, *_, last = log_of(whole)
    assert first["loss_cca"] == first["loss"]
    assert first["reward_own"] == first["reward_other"] == first["ranked"] == 0
    assert last["reward_margin"] != 0
    assert last["reward_margin"] == pytest.approx(last["reward_own"] - last["reward_other"])
    assert math.isfinite(last["val_loss_cca"])
    assert "loss_ar" not in last


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_start_from_the_same(
    parallel: Literal["ddp", "fsdp"], config: TrainConfig, tmp_path: Path
) -> None:
    """Sharded, the frozen start gets its weights from process 0 as the model does."""
    split = dataclasses.replace(
        config, out=str(tmp_path / "split"), engine=EngineConfig(parallel=parallel)
    )
    in_ranks(2, train, dataclasses.replace(split, steps=3), timeout=200)
    alone = train(dataclasses.replace(config, steps=3))
    for one, other in zip(log_of(split.out), log_of(alone), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
    weights = tensors_of(alone)
    for name, tensor in tensors_of(split.out).items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-4)


def test_what_is_exported_paints_without_guidance(config: TrainConfig, tmp_path: Path) -> None:
    out = export(ExportConfig(run=str(train(config)), out=str(tmp_path / "painter")))
    pipeline = read_json(out / "pipeline.json")
    assert pipeline["sampling"]["cfg"] == 1
    assert pipeline["origin"]["recipe"] == "scenes"
    assert pipeline["origin"]["objective"] == "cca"
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "paint with it at cfg 1" in card
    assert "condition contrastive, beta 0.5, lambda 2" in card
    assert "val_loss_cca" not in card
    assert "`loss_cca`" in card
    assert "| Alignment | none |" in card


def test_mistakes_are_told(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = str(tmp_path / "other"), config.data_folder
    assert main(["train", "cca", "--data", data, "--out", out]) == 2
    assert "name it with --model" in capsys.readouterr().err
    contrast = ["--objective", "cca", "--align.weight", "0", "--data", data, "--out", out]
    assert main(["train", "scenes", *contrast]) == 1
    assert "goes on with a painter" in capsys.readouterr().err
    assert not Path(out).exists()
    writer = tmp_path / "writer"
    writer.mkdir()
    (writer / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert main(["train", "scenes", *contrast, "--model", str(writer)]) == 1
    assert "goes on with a painter" in capsys.readouterr().err
    alone = ["train", "cca", "--model", str(config.model_path), *contrast, "--batch-size", "1"]
    with pytest.raises(SystemExit):
        main(alone)
    assert "--batch-size must be at least 2" in capsys.readouterr().err
