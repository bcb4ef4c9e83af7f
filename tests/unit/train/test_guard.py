"""What happens when a loss or a gradient is not finite, and when a loss jumps."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import in_ranks
from small_runs import (
    CODES,
    small_config,
    small_dataset,
    small_run,
    tiny_chameleon,
    whole,
)
from tiny_painters import emu3_special_tokens, emu3_tokenizer, publish_emu3, publish_janus
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from arra.config import EngineConfig, ModelConfig, OptimConfig, TrainConfig
from arra.objective import Terms
from arra.train import guard as guards
from arra.train.setup import Run
from arra.train.step import optimizer_step
from arra.train.tally import StepRecord, Tally
from arra.train.world import World, open_world

CPU = World(torch.device("cpu"))
PAINTERS: dict[str, Callable[[Path], object]] = {
    "chameleon": tiny_chameleon,
    "janus": lambda folder: publish_janus(folder, CODES),
    "emu3": lambda folder: publish_emu3(folder, emu3_tokenizer(emu3_special_tokens(CODES)), CODES),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data"))


def made(config: TrainConfig, folder: Path, world: World = CPU) -> Run:
    run = small_run(config, world)
    run.guard.folder = folder
    return run


def poison(run: Run, term: str, factor: float, when: Callable[[], bool]) -> None:
    """`term` of the loss is multiplied by `factor` in forward passes at which `when()` is true."""

    def spoil(module: Any, arguments: Any, terms: Terms) -> Terms | None:
        if not when() or not torch.is_grad_enabled():
            return None
        return dataclasses.replace(terms, sums={**terms.sums, term: terms.sums[term] * factor})

    run.step.register_forward_hook(spoil)


def steps(run: Run, tally: Tally, which: range, now: list[int] | None = None) -> None:
    for step in which:
        if now is not None:
            now[:] = [step]
        optimizer_step(run, step, tally)


def weights(run: Run) -> dict[str, Tensor]:
    named = {
        **dict(run.step.model.named_parameters()),
        **dict(run.step.objective.named_parameters()),
    }
    states = {
        f"{key}/{i}": value
        for i, values in enumerate(run.state.optimizer.state.values())
        for key, value in values.items()
    }
    averages = {f"ema/{n}": t for n, t in run.state.average.weights.items()}
    return {n: whole(t).clone() for n, t in (named | states | averages).items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def config_of(data: Path, **changes: Any) -> TrainConfig:
    optim = OptimConfig(lr=3e-3, warmup=0.2, ema=0.9)
    return small_config(data, optim=optim, **changes)


@pytest.mark.parametrize(("term", "factor"), [("ar", float("nan")), ("gva/clip", float("inf"))])
def test_one_bad_step_is_left_out_and_the_run_goes_on(
    data: Path, tmp_path: Path, term: str, factor: float
) -> None:
    run, now = made(config_of(data), tmp_path), [0]
    poison(run, term, factor, lambda: now == [2])
    tally = Tally(CPU)
    steps(run, tally, range(5), now)
    other = made(config_of(data), tmp_path)
    steps(other, Tally(CPU), range(2))
    steps(other, Tally(CPU), range(3, 5))
    assert_same(weights(run), weights(other))
    records = tally.read()
    assert [r.refused for r in records] == [False, False, True, False, False]
    run.guard.inspect(records)
    assert (run.guard.skipped, run.guard.streak) == (1, 0)


def test_a_gradient_of_the_projector_alone_is_enough(
    data: Path, tmp_path: Path, capsys: Any
) -> None:
    run = made(config_of(data), tmp_path)
    before = weights(run)
    projector = next(iter(run.step.objective.projectors.parameters()))
    projector.register_hook(lambda gradient: gradient * float("inf"))
    tally = Tally(CPU)
    optimizer_step(run, 0, tally)
    after = weights(run)
    assert_same({n: after[n] for n in before}, before)
    run.guard.inspect(tally.read())
    (line,) = incidents(tmp_path)
    assert line["terms"] == ["gradient of the projectors"]
    assert line["ids"] == run.loader.ids(0)
    assert "step 1 is skipped: gradient of the projectors inf" in capsys.readouterr().out


def incidents(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / guards.FILE).read_text().splitlines()]


def test_after_three_in_a_row_nothing_moves_until_the_host_has_looked(
    data: Path, tmp_path: Path
) -> None:
    run, now = made(config_of(data), tmp_path), [0]
    poison(run, "ar", float("nan"), lambda: now[0] in (1, 2, 3))
    tally = Tally(CPU)
    steps(run, tally, range(1), now)
    before = weights(run)
    steps(run, tally, range(1, 7), now)  # 4, 5 and 6 are good, and too late
    assert_same(weights(run), before)
    with pytest.raises(FloatingPointError) as error:
        run.guard.inspect(tally.read())
    text = str(error.value)
    for part in ("step 2: ar nan", "step 4: ar nan", "no checkpoint yet", "--data.skip-steps 2-4"):
        assert part in text
    assert f"images {run.loader.ids(1)[0]}, " in text
    assert [(x["kind"], x["step"]) for x in incidents(tmp_path)] == [
        ("skipped", 2),
        ("skipped", 3),
        ("skipped", 4),
        ("stop", 4),
    ]
    assert incidents(tmp_path)[0]["values"]["ar"] == "nan"


class Reads(TorchDispatchMode):
    """Counts the times at which a tensor becomes a Python number, a wait for a real device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "llamagen", *PAINTERS])
def test_a_step_never_waits_for_the_device(family: str, tmp_path: Path) -> None:
    data = small_dataset(tmp_path / "data", classes=3)
    if family in PAINTERS:
        config = config_of(data, model_path=str(PAINTERS[family](tmp_path / "model")))
    else:
        config = config_of(data, model=ModelConfig(family, layers=2, hidden_size=24, heads=2))
    run, tally = made(config, tmp_path), Tally(CPU)
    steps(run, tally, range(1))
    with Reads() as reads:
        assert torch.ones(()).item()
        assert reads.count == 1
        steps(run, tally, range(1, 3))
        assert reads.count == 1


def test_eight_bit_states_are_left_alone_too(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = config_of(data)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, bits=8))
    run, now = made(config, tmp_path), [0]
    poison(run, "ar", float("nan"), lambda: now == [1])
    steps(run, Tally(CPU), range(1), now)
    before = {n: p.detach().clone() for n, p in run.step.named_parameters()}
    steps(run, Tally(CPU), range(1, 2), now)
    assert_same(dict(run.step.named_parameters()), before)
    steps(run, Tally(CPU), range(2, 3), now)
    assert all(torch.isfinite(p).all() for p in run.step.parameters())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_agree_when_one_of_them_fails(data: Path, tmp_path: Path, parallel: str) -> None:
    config = config_of(data, engine=EngineConfig(parallel=parallel))

    def one(left_out: bool) -> tuple[dict[str, Tensor], Any]:
        with open_world("cpu") as world:
            run, now = made(config, tmp_path, world), [0]
            poison(run, "ar", float("nan"), lambda: now == [1] and world.rank == 1)
            tally = Tally(world)
            steps(run, tally, range(1), now)
            steps(run, tally, range(2 if left_out else 1, 3), now)
            run.guard.inspect(tally.read())
            return weights(run), (run.guard.skipped, tally.means()["ar"], run.loader.ids(1))

    (first, said), (second, same) = in_ranks(2, one, False)
    (third, plain), _ = in_ranks(2, one, True)
    assert_same(first, second)
    assert_same(first, third)
    assert said[:2] == same[:2]
    assert (said[0], plain[0]) == (1, 0)
    assert said[1] == plain[1], "a refused step counts in no mean"
    (line,) = incidents(tmp_path)
    assert (line["rank"], line["terms"][0], line["ids"]) == (1, "ar", same[2])


# ---- spikes --------------------------------------------------------------------------------------


def record(step: int, value: float) -> StepRecord:
    return StepRecord(step, False, ("ar",), {"ar": value * 10}, {"ar": 10.0})


def wave(step: int) -> float:
    return 3.0 - step * 1e-3 + 0.05 * ((step * 7) % 11 - 5) / 5


def test_a_spike_is_told_once_with_its_images(data: Path, tmp_path: Path, capsys: Any) -> None:
    guard = made(config_of(data), tmp_path).guard
    jumps = {100: 9.0, 101: 8.0, 150: 4.0}
    guard.inspect([record(step, jumps.get(step, wave(step))) for step in range(200)])
    first, second = incidents(tmp_path)
    assert (first["kind"], first["step"], first["values"]) == ("spike", 101, {"ar": 9.0})
    assert first["usual"]["ar"] == pytest.approx(2.95, abs=0.03)
    assert first["ids"] == guard.loader.ids(100)
    assert second["step"] == 151
    assert "step 101: a spike, ar is 9, usually 2.9" in capsys.readouterr().out


def test_what_is_usual_survives_a_resume(data: Path, tmp_path: Path) -> None:
    whole_run = made(config_of(data), tmp_path / "a").guard
    before = made(config_of(data), tmp_path / "b").guard
    after = made(config_of(data), tmp_path / "b").guard
    records = [record(step, 9.0 if step in (90, 91) else wave(step)) for step in range(120)]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    whole_run.inspect(records)
    before.inspect(records[:91])
    after.restore(json.loads(json.dumps(before.saved())), 91)
    after.inspect(records[91:])
    assert after.saved() == whole_run.saved()
    assert incidents(tmp_path / "a") == incidents(tmp_path / "b")


def test_losses_learned_by_heart_are_no_spikes(data: Path, tmp_path: Path) -> None:
    guard = made(config_of(data), tmp_path).guard
    guard.inspect([record(step, 1e-3 + 1e-9 * (step % 3)) for step in range(200)])
    guard.inspect([record(200, 1.005e-3)])
    assert not (tmp_path / guards.FILE).exists()
