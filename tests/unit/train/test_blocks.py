"""Blocks that are computed again or compiled: what is kept, what taps see, what is not compiled."""

import functools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import small_config, small_dataset, small_run, tiny_chameleon, trajectory
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from arra.config import EngineConfig, TrainConfig
from arra.train import blocks
from arra.train.setup import Run
from arra.train.step import validate
from arra.train.world import World

ALONE = World(torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(data: Path) -> TrainConfig:
    return small_config(data)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles down to PyTorch's own operators: seconds less than machine code."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(
        blocks.torch, "compile", functools.partial(torch.compile, backend="aot_eager")
    )


def run_of(config: TrainConfig, recompute: str = "none", compiled: bool = False) -> Run:
    engine = EngineConfig(activation_checkpointing=recompute, compile=compiled)  # type: ignore
    return small_run(replace(config, engine=engine), ALONE)


class Count(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def backward_calls(run: Run) -> Counter[str]:
    """Operators of the backward pass through the blocks."""
    micro = run.loader.step(0)[0]
    total = run.step(micro, 1.0).total()
    with Count() as count:
        total.backward()
    return count.calls


def test_what_is_computed_again(config: TrainConfig) -> None:
    """full: every product of the forward pass; selective: none, but what is elementwise."""
    none, selective, full = (
        backward_calls(run_of(config, recompute)) for recompute in ("none", "selective", "full")
    )
    linear = 7 * config.model.layers
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    # One product of each block, its last, is needed by nothing behind it: it is not made again.
    assert full["mm"] - none["mm"] in (linear, linear - config.model.layers)
    assert full[attention] == config.model.layers
    assert selective["mm"] == none["mm"]
    assert selective[attention] == none[attention] == 0
    assert selective["silu"] == full["silu"] == config.model.layers > none["silu"]


long = pytest.mark.long  # compiling takes seconds


@pytest.mark.parametrize(
    "recompute",
    ["selective", pytest.param("none", marks=long), pytest.param("full", marks=long)],
)
def test_compiled_once_and_then_for_other_lengths(
    recompute: str, config: TrainConfig, traced: None
) -> None:
    """One graph a length and one for any; neither more blocks nor validation add any, and what
    taps and losses see is the same."""
    config = replace(config, model=replace(config.model, layers=3))
    expected, weights = trajectory(run_of(config), 4)
    run = run_of(config, recompute, compiled=True)
    lengths = {run.loader.step(step)[0].batch.ids_BT.shape[1] for step in range(4)}
    assert len(lengths) > 1, "no test of lengths"
    found, found_weights = trajectory(run, 4)
    validate(run)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    for a, b in zip(found, expected, strict=True):
        assert a["gva/clip"] == pytest.approx(b["gva/clip"], abs=1e-5)
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert all(torch.allclose(found_weights[n], t, atol=1e-5) for n, t in weights.items())


@pytest.mark.parametrize(
    "family", ["chameleon", pytest.param("llamagen", marks=long), pytest.param("gpt2", marks=long)]
)
def test_other_families_compile_whole(
    family: str, config: TrainConfig, tmp_path: Path, traced: None
) -> None:
    """A piece that the compiler cannot take would be an error."""
    if family == "chameleon":
        config = replace(config, model_path=tiny_chameleon(tmp_path / "model"))
    else:
        folder = small_dataset(tmp_path / "classes", classes=3)
        model = replace(config.model, architecture=family, hidden_size=32)
        config = replace(config, data_folder=str(folder), model=model)
    trajectory(run_of(config, "selective", compiled=True), 1)
    assert counters["stats"]["unique_graphs"] == 1


def test_outputs_are_collected_when_asked_again(config: TrainConfig) -> None:
    """Hooks that transformers left at load are taken away; asked again, it puts them back."""
    run = run_of(config, compiled=True)
    model = run.backbone.model
    hooks = [h for m in model.modules() for h in m._forward_hooks.values()]
    assert not hooks
    with blocks.eagerly(), torch.no_grad():
        output = model(run.loader.step(0)[0].batch.ids_BT, output_hidden_states=True)
    assert len(output.hidden_states) == config.model.layers + 1
