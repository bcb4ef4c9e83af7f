"""ArraTrainer is held to the loop: the same numbers, whatever the accumulation and the engine."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import in_ranks
from small_runs import small_config, small_dataset, small_run, tiny_chameleon, trajectory
from transformers import AutoModelForCausalLM, TrainingArguments

from arra.config import OptimConfig, TrainConfig
from arra.device import cpu_has_bfloat16
from arra.integrations.hf_data import PreparedImages
from arra.integrations.hf_trainer import PROJECTORS, ArraTrainer
from arra.train.world import World

STEPS = 20
OPTIM = OptimConfig(lr=3e-3, schedule="constant", warmup=0.0)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}
"""Of float32: what other orders of summing may do; on the machines seen, weights are bit-equal."""


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
    named = trainer.model.named_parameters()
    return {name: p.detach() for name, p in named if p.requires_grad}


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


def test_trajectory_in_float32(config: TrainConfig, tmp_path: Path) -> None:
    trainer = trainer_of(config, arguments(tmp_path / "run", 8))
    trainer.train()
    found = (lines_of(trainer), weights_of(trainer))
    assert_same_run(found, loop_of(config, 8), TOLERANCE[torch.float32])


@pytest.mark.parametrize("family", ["llamagen", "chameleon"])
@pytest.mark.usefixtures("wide")
def test_other_families(config: TrainConfig, tmp_path: Path, family: str) -> None:
    """Classes as prompts and codes with a table of their own; a model of images and text that has
    parts which no step uses."""
    if family == "chameleon":
        config = dataclasses.replace(config, model_path=tiny_chameleon(tmp_path / "published"))
    else:
        (tmp_path / "classes").mkdir()
        data = str(small_dataset(tmp_path / "classes", classes=3))
        model = dataclasses.replace(config.model, architecture=family)
        config = dataclasses.replace(config, data_folder=data, model=model)
    saving = {"save_strategy": "steps", "save_steps": 10}
    trainer = trainer_of(config, arguments(tmp_path / "run", 4, **saving))
    trainer.train()
    found = (lines_of(trainer), weights_of(trainer))
    assert_same_run(found, loop_of(config, 4), TOLERANCE[torch.float64])
    again = trainer_of(config, arguments(tmp_path / "again", 4))
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    for name, tensor in weights_of(again).items():
        torch.testing.assert_close(tensor, found[1][name], rtol=0, atol=0)


@pytest.mark.skipif(not cpu_has_bfloat16(), reason="this CPU has no bfloat16 instructions")
def test_trajectory_in_bfloat16(config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, dtype="bfloat16")
    trainer = trainer_of(config, arguments(tmp_path / "run", 4, bf16=True))
    trainer.train()
    found = (lines_of(trainer), weights_of(trainer))
    assert_same_run(found, loop_of(config, 4), TOLERANCE[torch.float32])


# ---- lambda means the same ----------------------------------------------------------------------


def step_gradients(config: TrainConfig, args: TrainingArguments) -> dict[str, torch.Tensor]:
    """The gradients of one optimizer step, before clipping."""
    trainer = trainer_of(config, args)
    found: dict[str, torch.Tensor] = {}

    def keep(model: torch.nn.Module) -> torch.Tensor:
        found.update({n: p.grad.clone() for n, p in trainer.model.named_parameters()})
        return torch.zeros(())

    trainer._clip_grad_norm = keep  # type: ignore[method-assign]
    trainer.train()
    return found | {"loss": torch.tensor(lines_of(trainer)[0]["loss"])}


@pytest.mark.usefixtures("wide")
def test_a_step_is_the_same_at_any_accumulation(config: TrainConfig, tmp_path: Path) -> None:
    """A term added to the Trainer's own loss would weigh 4 and 8 times as much."""
    config = dataclasses.replace(config, steps=1)
    whole, *others = (
        step_gradients(config, arguments(tmp_path / "run", accumulate, max_steps=1))
        for accumulate in (1, 4, 8)
    )
    assert whole["objective.projectors.clip@1.up.weight"].abs().max() > 1e-4
    for other in others:
        for name, gradient in whole.items():
            tolerance = 1e-6 if name == "loss" else 1e-12  # the Trainer sums losses in float32
            torch.testing.assert_close(other[name], gradient, rtol=0, atol=tolerance, msg=name)


@pytest.mark.usefixtures("wide")
def test_two_processes_are_one(config: TrainConfig, tmp_path: Path) -> None:
    def act() -> Any:
        trainer = trainer_of(config, arguments(tmp_path / "run", 2, ranks=2))
        trainer.train()
        return lines_of(trainer), weights_of(trainer), trainer.evaluate()

    first, second = in_ranks(2, act)
    assert_same_run((first[0], first[1]), loop_of(config, 4), TOLERANCE[torch.float64])
    for name, tensor in first[1].items():
        torch.testing.assert_close(tensor, second[1][name], rtol=0, atol=0)
    alone = trainer_of(config, arguments(tmp_path / "run", 1))
    alone.train()
    expected = alone.evaluate()
    for name in ("eval_loss", "eval_loss_ar", "eval_loss_gva", "eval_gva_constant"):
        assert first[2][name] == pytest.approx(expected[name], rel=1e-9), name
        assert first[2][name] == second[2][name]


@pytest.mark.usefixtures("wide")
def test_a_schedule_moves_lambda(config: TrainConfig, tmp_path: Path) -> None:
    trainer = trainer_of(config, arguments(tmp_path / "run", 2))
    trainer.schedule = lambda step, steps: 0.0 if step >= steps // 2 else 1.0
    trainer.train()
    lines = lines_of(trainer)
    assert [line["lambda"] for line in lines] == [0.5] * 10 + [0.0] * 10
    assert ["loss_gva" in line for line in lines] == [True] * 10 + [False] * 10


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("wide")
def test_resume_continues_the_run(config: TrainConfig, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 10}
    whole = trainer_of(config, arguments(tmp_path / "whole", 2, **saving))
    whole.train()
    again = trainer_of(config, arguments(tmp_path / "again", 2))
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-10"))
    assert lines_of(again)[10:] == lines_of(whole)[10:]
    for name, tensor in weights_of(again).items():
        torch.testing.assert_close(tensor, weights_of(whole)[name], rtol=0, atol=0)


def test_a_checkpoint_is_a_plain_folder_of_the_model(config: TrainConfig, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 20}
    trainer = trainer_of(config, arguments(tmp_path / "run", 1, **saving))
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-20"
    assert (folder / PROJECTORS).is_file()
    model = AutoModelForCausalLM.from_pretrained(folder)
    own = trainer.backbone.model.state_dict()
    assert model.state_dict().keys() == own.keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, own[name], rtol=0, atol=0)
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / PROJECTORS).exists()


def test_the_best_model_is_loaded_at_the_end(config: TrainConfig, tmp_path: Path) -> None:
    args = arguments(
        *(tmp_path / "run", 1),
        save_strategy="steps",
        save_steps=10,
        eval_strategy="steps",
        eval_steps=10,
        load_best_model_at_end=True,
        metric_for_best_model="loss_ar",
        greater_is_better=True,  # it falls, so the "best" is the first
    )
    trainer = trainer_of(config, args)
    trainer.train()
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-10")
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(
            tensor, trainer.backbone.model.state_dict()[name], rtol=0, atol=0
        )


def test_a_checkpoint_of_the_model_alone_cannot_resume(config: TrainConfig, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 20, "save_only_model": True}
    trainer_of(config, arguments(tmp_path / "run", 1, **saving)).train()
    again = trainer_of(config, arguments(tmp_path / "again", 1))
    with pytest.raises(ValueError, match="only its model cannot resume"):
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-20"))


# ---- orders and refusals ------------------------------------------------------------------------


def test_the_trainers_own_order_sees_each_sample_once_an_epoch(
    config: TrainConfig, tmp_path: Path
) -> None:
    """20 samples by 8 are two steps and a shorter one: counts follow."""
    run = small_run(config, World(torch.device("cpu")))
    images = PreparedImages(
        config.data_folder, run.backbone, run.step.objective.targets, prompt_dropout=0.5
    )
    args = arguments(
        *(tmp_path / "run", 4),
        max_steps=-1,
        num_train_epochs=2,
        train_sampling_strategy="random",
        dataloader_num_workers=1,
    )
    trainer = ArraTrainer(run.backbone, run.step.objective, args, images)
    trainer.train()
    assert trainer.state.global_step == 6
    assert trainer.state.log_history[-1]["epoch"] == 2
    lines = lines_of(trainer)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_what_does_not_fit_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="processes is 4"):
        trainer_of(config, arguments(tmp_path, 1, per_device_train_batch_size=4))
    with pytest.raises(ValueError, match="sequential"):
        trainer_of(config, arguments(tmp_path, 1, train_sampling_strategy="random"))
    with pytest.raises(ValueError, match="label_smoothing"):
        trainer_of(config, arguments(tmp_path, 1, label_smoothing_factor=0.1))
    run = small_run(config, World(torch.device("cpu")))
    (target,) = run.step.objective.targets
    with pytest.raises(ValueError, match="dim=6, not 7"):
        PreparedImages(config.data_folder, run.backbone, [dataclasses.replace(target, dim=7)])
    with pytest.raises(ValueError, match="no feature 'dino'"):
        PreparedImages(config.data_folder, run.backbone, [dataclasses.replace(target, name="dino")])
