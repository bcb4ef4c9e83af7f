"""Whole runs that meet a loss that is not finite: skipped, stopped, and taken up again."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from arra import cli
from arra.config import (
    AlignConfig,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from arra.config_json import to_json
from arra.objective import Terms
from arra.train import loop
from arra.train.guard import FILE
from arra.train.setup import Run, Step


@pytest.fixture
def config(tiny_dataset: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        data_folder=str(tiny_dataset),
        out=str(tmp_path / "run"),
        steps=12,
        batch_size=4,
        threads=1,
        model=ModelConfig(layers=1, hidden_size=16, heads=2, mlp_size=16, text_vocabulary=280),
        align=AlignConfig(layer=(1,)),
        optim=OptimConfig(lr=3e-3, ema=0.9),
        checkpoint=CheckpointConfig(every=3, keep=2),
        log=LogConfig(every=4, validate_images=4),
    )


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Steps, counted from 1, whose loss is NaN in every run of a test."""
    chosen: set[int] = set()
    now = [0]
    step_of, forward = loop.optimizer_step, Step.forward

    def optimizer_step(run: Run, step: int, tally: Any) -> None:
        now[0] = step + 1
        step_of(run, step, tally)

    def spoiled(self: Step, micro: Any, factor: float) -> Terms:
        terms = forward(self, micro, factor)
        if now[0] not in chosen or not self.training:
            return terms
        return dataclasses.replace(terms, sums={**terms.sums, "ar": terms.sums["ar"] * torch.nan})

    monkeypatch.setattr(loop, "optimizer_step", optimizer_step)
    monkeypatch.setattr(Step, "forward", spoiled)
    return chosen


def log_of(config: TrainConfig) -> list[dict[str, Any]]:
    lines = (Path(config.out) / "log.jsonl").read_text().splitlines()
    timed = {"images_per_s", "tokens_per_s", "tflops", "mfu", "overhead", "memory_gb", "data_wait"}
    return [{k: v for k, v in json.loads(x).items() if k not in timed} for x in lines]


def incidents(config: TrainConfig) -> list[tuple[str, int]]:
    lines = (Path(config.out) / FILE).read_text().splitlines()
    return [(line["kind"], line["step"]) for line in map(json.loads, lines)]


def saved(config: TrainConfig) -> list[int]:
    return [int(p.name[5:]) for p in sorted((Path(config.out) / "checkpoints").glob("step-*"))]


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    last = max((Path(config.out) / "checkpoints").glob("step-*"))
    files = sorted(last.glob("*.safetensors"))
    return {f"{file.name} {n}": t for file in files for n, t in load_file(file).items()}


def test_a_skipped_step_is_counted_and_resumes_as_it_was(
    config: TrainConfig, tmp_path: Path, spoil: set[int], capsys: pytest.CaptureFixture[str]
) -> None:
    spoil |= {5, 6}  # a checkpoint is due after 6: it waits until a step was good
    loop.train(config)
    assert saved(config) == [9, 12]
    assert incidents(config) == [("skipped", 5), ("skipped", 6)]
    assert [line["skipped"] for line in log_of(config)] == [0, 2, 2]
    assert all(line["loss_ar"] > 0 for line in log_of(config))
    assert "step 5 is skipped: ar nan" in capsys.readouterr().out
    broken = replace(config, out=str(tmp_path / "broken"))
    for stop in (4, 7, 10, None):
        loop.train(broken, stop_after=stop)
    assert log_of(broken) == log_of(config)
    assert incidents(broken) == incidents(config)
    a, b = weights(config), weights(broken)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_three_in_a_row_stop_the_run_and_it_goes_on_without_them(
    config: TrainConfig, tmp_path: Path, spoil: set[int], capsys: pytest.CaptureFixture[str]
) -> None:
    spoil |= {5, 6, 7}
    (tmp_path / "settings.json").write_text(json.dumps(to_json(config)))
    command = ["train", str(tmp_path / "settings.json"), "--out", config.out]
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for part in (
        "3 steps in a row were not finite (step 5: ar nan",
        "images train-",
        "The learning rate was 0.00",
        "checkpoint step-00000003 is kept",
        "--data.skip-steps 5-7",
        FILE,
    ):
        assert part in said, part
    kinds = [("skipped", 5), ("skipped", 6), ("skipped", 7), ("stop", 7)]
    assert incidents(config) == kinds
    assert saved(config) == [3]
    assert cli.main(command) == 1, "the same batches come again"
    assert incidents(config) == kinds, "and are told once"
    assert cli.main([*command, "--data.skip-steps", "5-7"]) == 0
    assert incidents(config) == [*kinds, *(("passed over", step) for step in (5, 6, 7))]
    assert [line["skipped"] for line in log_of(config)] == [0, 3, 3]
    spoil.clear()
    clean = replace(config, out=str(tmp_path / "clean"), data=DataConfig(skip_steps=("5-7",)))
    loop.train(clean)
    a, b = weights(config), weights(clean)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_interval_in_which_nothing_was_trained_has_a_line(
    config: TrainConfig, tmp_path: Path
) -> None:
    loop.train(replace(config, data=DataConfig(skip_steps=("4-9",))))
    line = log_of(config)[1]
    assert (line["step"], line["skipped"]) == (8, 5)
    assert "loss" not in line


@pytest.mark.parametrize("steps", ["0", "7-3", "some"])
def test_ranges_that_are_none_are_refused(steps: str) -> None:
    with pytest.raises(ValueError, match=rf"--data.skip-steps {steps}: write a step or a range"):
        DataConfig(skip_steps=(steps,))
