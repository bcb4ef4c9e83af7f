"""What training runs have left behind, for tests that compare them."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arra.models.run_folder import latest_checkpoint, read_part, stored_tensors, weights_folder
from arra.train.throughput import MEASURED

PARTS = ("model", "objective", "optimizer", "ema")


def tensors_of(run: str | Path, part: str = "model", step: int | None = None) -> dict[str, Tensor]:
    """The whole tensors of one part of a checkpoint, the newest by default."""
    folder = latest_checkpoint(Path(run))
    assert folder is not None
    if step is not None:
        folder = folder.with_name(f"step-{step:08d}")
    return read_part(weights_folder(folder) if part == "model" else folder / part)


def file_of(run: str | Path, part: str) -> Path:
    """A file of one part of the newest checkpoint."""
    folder = latest_checkpoint(Path(run))
    assert folder is not None
    return max((folder / part).glob("*.safetensors"))


def parts_of(run: str | Path) -> list[str]:
    """The parts that the newest checkpoint has."""
    folder = latest_checkpoint(Path(run))
    assert folder is not None
    return [p for p in PARTS if p == "model" or stored_tensors(folder / p)]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def assert_same_run(one: str | Path, other: str | Path) -> None:
    """Equal bit for bit: the log but for its speeds, and the newest checkpoint."""
    assert log_of(one) == log_of(other)
    assert parts_of(one) == parts_of(other)
    for part in parts_of(one):
        assert_same(tensors_of(one, part), tensors_of(other, part))


def log_of(run: str | Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl without what depends on the machine's speed."""
    lines = (Path(run) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in MEASURED} for x in lines]
