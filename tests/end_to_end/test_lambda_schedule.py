"""A lambda that moves within a log interval: the run goes on, and `loss` is what was minimised."""

import dataclasses
import json
from pathlib import Path

import pytest

from arra.config import AlignConfig, LogConfig, ModelConfig
from arra.recipes import RECIPES
from arra.train.loop import train


def test_lambda_stops_within_a_log_interval(tiny_dataset: Path, tmp_path: Path) -> None:
    logs = []
    for every in (1, 4):
        run = tmp_path / f"every-{every}"
        config = dataclasses.replace(
            RECIPES["scenes"](str(tiny_dataset), str(run)),
            steps=4,
            batch_size=4,
            micro_batch=2,
            device="cpu",
            model=ModelConfig(layers=2, hidden_size=16, heads=2, mlp_size=16, max_length=64),
            align=AlignConfig(layer=(1,), schedule="stop", until=0.5),
            log=LogConfig(every=every),
        )
        train(config)
        logs.append([json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()])
    single, joined = logs
    assert [line["lambda"] for line in single] == [1.0, 1.0, 0.0, 0.0]
    for line in single:
        aligned = line["lambda"] * line.get("loss_gva", 0.0)
        assert line["loss"] == pytest.approx(line["loss_ar"] + aligned, rel=1e-5)
    assert joined[0]["loss"] == pytest.approx(sum(line["loss"] for line in single) / 4, rel=1e-5)
