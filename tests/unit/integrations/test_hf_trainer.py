"""ArraTrainer is held to the loop: the same numbers, whatever the accumulation and the engine."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import in_ranks
from small_runs import small_config, small_dataset, small_run, trajectory
from transformers import AutoModelForCausalLM, TrainingArguments

from arra.config import OptimConfig, TrainConfig
from arra.integrations.hf_data import PreparedImages
from arra.integrations.hf_trainer import PROJECTORS, ArraTrainer
from arra.train.world import World

STEPS = 20
OPTIM = OptimConfig(lr=3e-3, schedule="constant", warmup=0.0)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}
"""Of float32: Adam turns a last bit into a step of other direction; seen 3e-5 after 20 steps."""


@pytest.fixture
def wide() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    (tmp_path / "data").mkdir()
    return small_config(small_dataset(tmp_path / "data"), steps=STEPS, optim=OPTIM)


def arguments(folder: Path, accumulate: int, ranks: int = 1, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8 // accumulate // ranks,
        "gradient_accumulation_steps": accumulate,
        "max_steps": STEPS,
        "learning_rate": OPTIM.lr,
        "lr_scheduler_type": "constant",
        "adam_beta2": OPTIM.beta2,
        "weight_decay": OPTIM.weight_decay,
        "max_grad_norm": OPTIM.clip,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**settings | changes)


def trainer_of(config: TrainConfig, args: TrainingArguments) -> ArraTrainer:
    """The Trainer that does what `config` says, from the same weights."""
    run = small_run(config, World(torch.device("cpu")))
    objective = run.step.objective
    images = PreparedImages(
        config.data_folder,
        run.backbone,
        objective.targets,
        prompt_dropout=config.data.prompt_dropout,
    )
    held_out = PreparedImages(config.data_folder, run.backbone, objective.targets, split="val")
    in_order = images.in_order(config.steps, config.batch_size, config.seed)
    return ArraTrainer(run.backbone, objective, args, in_order, held_out)


def lines_of(trainer: ArraTrainer) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss_ar" in line]


def weights_of(trainer: ArraTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in trainer.model.named_parameters()}


def assert_same_run(
    trainer: tuple[list[dict[str, float]], dict[str, torch.Tensor]],
    loop: tuple[list[dict[str, float]], dict[str, torch.Tensor]],
    tolerance: float,
) -> None:
    (lines, weights), (expected, whole) = trainer, loop
    names = {
        "ar": "loss_ar",
        "z": "loss_z",
        "gva/clip": "loss_gva",
        "gva_constant/clip": "gva_constant",
        "retrieval/clip": "retrieval",
        "grad_norm": "grad_norm",
    }
    assert len(lines) == len(expected) == STEPS
    for step, (line, wanted) in enumerate(zip(lines, expected, strict=True)):
        for ours, theirs in names.items():
            assert line[theirs] == pytest.approx(wanted[ours], rel=tolerance, abs=tolerance), (
                step,
                theirs,
            )
    assert weights.keys() == whole.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, whole[name], rtol=tolerance, atol=tolerance, msg=name)


def loop_of(config: TrainConfig, accumulate: int) -> Any:
    config = dataclasses.replace(config, micro_batch=config.batch_size // accumulate)
    return trajectory(small_run(config, World(torch.device("cpu"))), STEPS)


@pytest.mark.parametrize("accumulate", [1, 4, 8])
@pytest.mark.usefixtures("wide")
def test_trajectory_is_the_loops(config: TrainConfig, tmp_path: Path, accumulate: int) -> None:
    trainer = trainer_of(config, arguments(tmp_path / "run", accumulate))
    trainer.train()
    found = (lines_of(trainer), weights_of(trainer))
    assert_same_run(found, loop_of(config, accumulate), TOLERANCE[torch.float64])


@pytest.mark.parametrize("accumulate", [1, 8])
def test_trajectory_in_float32(config: TrainConfig, tmp_path: Path, accumulate: int) -> None:
    trainer = trainer_of(config, arguments(tmp_path / "run", accumulate))
    trainer.train()
    found = (lines_of(trainer), weights_of(trainer))
    assert_same_run(found, loop_of(config, accumulate), TOLERANCE[torch.float32])
