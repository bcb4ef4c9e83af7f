"""Checkpoints: whole or not there, read by any number of processes, written beside training."""

import dataclasses
import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from ranks import in_ranks
from safetensors import safe_open
from saved_runs import assert_same, tensors_of
from small_runs import small_config, small_dataset, small_run, tiny_chameleon, whole
from torch import Tensor
from torch.distributed.checkpoint import filesystem

from arra.config import CheckpointConfig, EngineConfig, LoraConfig, OptimConfig, TrainConfig
from arra.models.run_folder import finished_checkpoints, latest_checkpoint, read_part
from arra.train.checkpoint import Saver, restore
from arra.train.setup import Run
from arra.train.step import optimizer_step
from arra.train.tally import Tally
from arra.train.world import World, open_world

ALONE = World(torch.device("cpu"))
FSDP, DDP = EngineConfig(parallel="fsdp"), EngineConfig(parallel="ddp")
HYBRID = EngineConfig(parallel="hybrid", shard_ranks=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(data: Path) -> TrainConfig:
    return small_config(data, optim=OptimConfig(lr=3e-3, warmup=0.2, ema=0.9))


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def advance(run: Run, first: int, end: int) -> list[float]:
    """The loss of each step, over all processes."""
    losses = []
    for step in range(first, end):
        tally = Tally(run.world)
        optimizer_step(run, step, tally)
        tally.read()
        losses.append(tally.means()["loss"])
    return losses


def session(config: TrainConfig, folder: Path, first: int, end: int) -> list[float]:
    """What one command does: goes on where the last one was, and saves."""
    with open_world("cpu") as world:
        run = small_run(config, world)
        info = restore(folder, run.state, world)
        assert (info or {"step": 0})["step"] == first
        losses = advance(run, first, end)
        with Saver(folder, run.state, world, config.checkpoint) as saver:
            saver.save(end, {})
    return losses


def trained(config: TrainConfig, folder: Path, steps: int = 2, saves: int = 1) -> Run:
    """A run of one process with `saves` checkpoints, one every `steps` steps."""
    run = small_run(config, ALONE)
    with Saver(folder, run.state, ALONE, config.checkpoint) as saver:
        for i in range(saves):
            advance(run, i * steps, (i + 1) * steps)
            saver.save((i + 1) * steps, {"number": i})
    return run


def everything(run: Run) -> dict[str, Tensor]:
    average = run.state.average
    assert average is not None
    names = {f"weights/{n}": t for n, t in run.state.trained().items()}
    names |= {f"average/{n}": t for n, t in average.weights.items()}
    names |= {f"projectors/{n}": t for n, t in run.state.objective.state_dict().items()}
    return {name: whole(tensor).clone() for name, tensor in names.items()}


# ---- other numbers of processes ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engines", "kind"),
    [
        pytest.param((FSDP, HYBRID), "whole", id="sharded"),
        pytest.param((DDP, FSDP), "adapter", id="adapter"),
        pytest.param((DDP, HYBRID), "whole", id="copied", marks=pytest.mark.long),
        pytest.param((FSDP, DDP), "adapter", id="sharded-adapter", marks=pytest.mark.long),
    ],
)
def test_the_number_of_processes_may_change(
    config: TrainConfig, tmp_path: Path, engines: tuple[EngineConfig, EngineConfig], kind: str
) -> None:
    """1, 2, 4 and 1 again: the losses and all that is kept stay those of one undisturbed run.

    Adapters are float32 whatever the model is.
    """
    adapter = kind == "adapter"
    if adapter:
        pytest.importorskip("peft")
        start = tiny_chameleon(tmp_path / "published")
        config = dataclasses.replace(config, model_path=start, lora=LoraConfig(rank=2))
    with default_type(torch.float32 if adapter else torch.float64):
        undisturbed = session(config, tmp_path / "one", 0, 5)
        losses, run = [], tmp_path / "many"
        plan = ((0, 2, 1, FSDP), (2, 3, 2, engines[0]), (3, 4, 4, engines[1]))
        for first, end, count, engine in plan:
            now = dataclasses.replace(config, engine=engine)
            for found in in_ranks(count, session, now, run, first, end)[:1]:
                losses += found
        losses += session(config, run, 4, 5)
    torch.testing.assert_close(losses, undisturbed, rtol=1e-5 if adapter else 1e-10, atol=0)
    for part in ("model", "objective", "optimizer", "ema"):
        one, many = tensors_of(tmp_path / "one", part), tensors_of(run, part)
        assert one.keys() == many.keys()
        for name in one:
            close = {"rtol": 1e-3, "atol": 1e-5} if adapter else {"rtol": 1e-8, "atol": 1e-12}
            torch.testing.assert_close(many[name], one[name], **close)


def test_each_process_writes_what_it_holds(config: TrainConfig, tmp_path: Path) -> None:
    in_ranks(2, session, config, tmp_path, 0, 1)
    folder = latest_checkpoint(tmp_path)
    assert folder is not None
    files = sorted((folder / "optimizer").iterdir())
    assert len(files) == 2
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) < 1.3 * min(sizes)
    hashed = json.loads((folder / "state.json").read_text())["sha256"]
    stored = {str(p.relative_to(folder)) for p in folder.rglob("*.safetensors")}
    assert set(hashed) == stored


def test_one_process_writes_plain_files(config: TrainConfig, tmp_path: Path) -> None:
    """With one shard, safetensors alone opens a part; nothing in a checkpoint is a pickle."""
    run = trained(config, tmp_path)
    folder = latest_checkpoint(tmp_path)
    assert folder is not None
    (file,) = (folder / "model").iterdir()
    with safe_open(file, "pt") as stored:
        for name, tensor in run.state.model.state_dict().items():
            assert torch.equal(stored.get_tensor(name), tensor)
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} == {".safetensors", ".json"}


# ---- in the background ---------------------------------------------------------------------------


@pytest.mark.parametrize("background", [True, False])
def test_what_happens_after_a_save_is_not_in_it(
    config: TrainConfig, tmp_path: Path, background: bool
) -> None:
    saving = CheckpointConfig(background=background)
    run = trained(dataclasses.replace(config, checkpoint=saving), tmp_path / "x")
    before = everything(run)
    with Saver(tmp_path / "run", run.state, ALONE, saving) as saver:
        saver.save(2, {})
        advance(run, 2, 4)
        saver.save(4, {})
        advance(run, 4, 5)
    fresh = small_run(config, ALONE)
    (tmp_path / "run" / "checkpoints" / "step-00000004").rename(tmp_path / "later")
    restore(tmp_path / "run", fresh.state, ALONE)
    assert_same(everything(fresh), before)
    advance(fresh, 2, 5)
    assert_same(everything(fresh), everything(run))


def test_the_last_ones_are_kept(config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(keep=2))
    trained(config, tmp_path, steps=1, saves=4)
    assert [p.name for p in finished_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_weights_that_are_not_finite_replace_nothing(config: TrainConfig, tmp_path: Path) -> None:
    run = trained(config, tmp_path)
    next(iter(run.state.trained().values())).data[0] = torch.nan
    refused = pytest.raises(FloatingPointError, match="not finite after step 3")
    with Saver(tmp_path, run.state, ALONE, config.checkpoint) as saver, refused:
        saver.save(3, {})
    assert [p.name for p in finished_checkpoints(tmp_path)] == ["step-00000002"]


# ---- what goes wrong -----------------------------------------------------------------------------


def full_disk(*_: object) -> Iterator[None]:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disks(config: TrainConfig, folder: Path, which: int) -> None:
    """Rank `which` runs out of space: all processes are told."""
    with open_world("cpu") as world, pytest.MonkeyPatch.context() as patch:
        run = small_run(config, world)
        with Saver(folder, run.state, world, config.checkpoint) as saver:
            save_and_wait(saver, 1)
            if world.rank == which:
                patch.setattr(filesystem.FileSystem, "create_stream", full_disk)
            with pytest.raises(OSError, match="No space left") as caught:
                save_and_wait(saver, 2)
            assert caught.value.errno == errno.ENOSPC
            assert not saver.failed


def save_and_wait(saver: Saver, step: int) -> None:
    saver.save(step, {})
    saver.wait()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_an_error_and_leaves_the_last_checkpoint(
    config: TrainConfig, tmp_path: Path, ranks: int, background: bool
) -> None:
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(background=background))
    in_ranks(ranks, full_disks, config, tmp_path, ranks - 1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert restore(tmp_path, small_run(config, ALONE).state, ALONE) is not None


def test_a_failure_is_known_before_the_next_save(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_run(config, ALONE)
    monkeypatch.setattr(filesystem.FileSystem, "create_stream", full_disk)
    saver = Saver(tmp_path, run.state, ALONE, config.checkpoint)
    saver.save(1, {})
    while not saver.failed:
        pass
    with pytest.raises(OSError, match="No space left"):
        saver.save(2, {})


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def first_file(part: Path) -> Path:
    return next(iter(part.glob("*.safetensors")))


DAMAGE = {
    "a bit": lambda folder: flip(first_file(folder / "optimizer")),
    "a file": lambda folder: first_file(folder / "model").unlink(),
    "its end": lambda folder: os.truncate(first_file(folder / "ema"), 100),
    "what says it": lambda folder: (folder / "state.json").unlink(),
    "half of that": lambda folder: os.truncate(folder / "state.json", 20),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_and_named(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    run = trained(config, tmp_path, saves=2)
    folder = latest_checkpoint(tmp_path)
    assert folder is not None
    DAMAGE[what](folder)
    fresh = small_run(config, ALONE)
    info = restore(tmp_path, fresh.state, ALONE)
    assert info is not None
    assert (info["step"], info["number"]) == (2, 0)
    said = capsys.readouterr().err
    assert str(folder) in said
    assert "damaged-step-00000004" in said
    with Saver(tmp_path, fresh.state, ALONE, config.checkpoint) as saver:
        advance(fresh, 2, 4)
        saver.save(4, {})
    assert_same(everything(fresh), everything(run))
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["damaged-step-00000004", "step-00000002", "step-00000004"]


def seen(config: TrainConfig, folder: Path) -> int:
    with open_world("cpu") as world:
        info = restore(folder, small_run(config, world).state, world)
        assert info is not None
        return int(info["step"])


def test_all_processes_skip_the_same_one(config: TrainConfig, tmp_path: Path) -> None:
    """Each of them looks at some of the files only."""
    trained(config, tmp_path, saves=2)
    flip(first_file(tmp_path / "checkpoints" / "step-00000004" / "objective"))
    assert in_ranks(3, seen, config, tmp_path) == [2, 2, 2]


def test_without_a_whole_one_nothing_starts_over(config: TrainConfig, tmp_path: Path) -> None:
    trained(config, tmp_path)
    flip(first_file(tmp_path / "checkpoints" / "step-00000002" / "model"))
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole .*train from the start"):
        restore(tmp_path, small_run(config, ALONE).state, ALONE)
    assert latest_checkpoint(tmp_path) is not None


def test_checkpoints_of_other_versions_are_refused_by_name(
    config: TrainConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints" / "step-00000002"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text('{"step": 2, "sha256": {"model.safetensors": "0"}}')
    with pytest.raises(ValueError, match="step-00000002 has format 1, and this version of arra"):
        restore(tmp_path, small_run(config, ALONE).state, ALONE)


def test_missing_shards_are_missed(config: TrainConfig, tmp_path: Path) -> None:
    in_ranks(2, session, config, tmp_path, 0, 1)
    folder = latest_checkpoint(tmp_path)
    assert folder is not None
    min((folder / "model").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"model is not whole: shards of .* are missing"):
        read_part(folder / "model")
