"""The training loop: plain PyTorch, readable in one sitting.

One image's way: data/loader.py lays it out -> `setup.Step` runs the backbone and taps it ->
objective.py turns hidden states into sums -> step.py divides and steps -> this file logs and saves.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils import deterministic as deterministic_settings

from arra.config import TrainConfig
from arra.device import keep_freed_memory, pick_device
from arra.train.checkpoint import Saver, restore
from arra.train.claim import claim, unclaim
from arra.train.monitor import Monitor, log_line
from arra.train.optim import alignment_factor, learning_rate
from arra.train.peers import check_peers
from arra.train.probe import check_probe, probed
from arra.train.run_card import RunCard
from arra.train.samples import paint_samples
from arra.train.setup import Run, set_up
from arra.train.step import optimizer_step, validate
from arra.train.tally import Tally
from arra.train.trackers import require_trackers
from arra.train.world import World, open_world


def train(config: TrainConfig, *, stop_after: int | None = None) -> Path:
    """Trains until `config.steps`, resuming what is in `config.out`; returns the run folder.

    Args:
        stop_after: end (with a checkpoint) after this many optimizer steps, schedules unchanged.
    """
    with open_world(pick_device(config.device)) as world, deterministic(world.device):
        if world.device.type == "cpu":
            keep_freed_memory()
        return _train(config, world, stop_after)


def _train(config: TrainConfig, world: World, stop_after: int | None) -> Path:
    started = time.monotonic()
    folder = Path(config.out)
    world.on_main(lambda: require_trackers(config.log.trackers))
    flags = config
    config, threads = world.on_main(lambda: claim(flags, folder))
    torch.set_num_threads(threads)
    try:
        check_peers(world, flags, folder)
        run = set_up(config, folder, world)
        fresh: dict[str, Any] = {"step": 0, "tally": {}, "guard": run.guard.saved()}
        info = restore(folder, run.state, world) or fresh
        run.guard.restore(info["guard"], info["step"])
        if config.log.probe_every:
            check_probe(run)
        end = min(config.steps, stop_after or config.steps)
        with (
            RunCard(run, info["step"], started) as card,
            Monitor(run, info["step"], info["step"] - _unlogged(config, info)) as monitor,
            Saver(folder, run.state, world, config.checkpoint) as saver,
            run.signs.watched(),
            run.loader.ahead(end, world.device),
        ):
            _loop(run, monitor, saver, card, info, end)
    except (ValueError, OSError):
        if world.is_main:
            unclaim(folder)
        raise
    return folder


def _loop(
    run: Run, monitor: Monitor, saver: Saver, card: RunCard, info: Mapping[str, Any], end: int
) -> None:
    config, signs, guard = run.config, run.signs, run.guard
    tally, overdue = Tally(run.world, info["tally"]), False
    if _unlogged(config, info):
        _log(run, monitor, tally, info["step"])
    for step in range(info["step"], end):
        _advance(run, tally, saver, step)
        done = step + 1
        monitor.step(done)
        logs = _due(config, config.log.every, done)
        saves = done % config.checkpoint.every == 0 or done == end or overdue or signs.stopping
        if logs or saves:
            guard.inspect(tally.read())
        if logs:
            _log(run, monitor, tally, done)
        if config.log.sample_every and done % config.log.sample_every == 0 and not signs.stopping:
            with monitor.apart():
                monitor.picture("samples", paint_samples(run, done), done)
        saves |= signs.stopping  # a validation may have heard of it
        # After a refused update the weights may be past saving: that is known three steps later.
        overdue = saves and guard.streak > 0 and done != end
        if saves and not overdue:
            with monitor.apart():
                saver.save(done, {"tally": tally.saved(), "guard": guard.saved()})
            guard.kept = done
            card.update(done, guard.skipped)
        if signs.stopping:
            saver.wait()
            if run.world.is_main:
                kept = "not saved, since updates are being refused" if overdue else "saved"
                print(f"asked to stop: {kept} after step {done}; the same command goes on")
            raise signs.ending()


def _advance(run: Run, tally: Tally, saver: Saver, step: int) -> None:
    """One optimizer step, or a batch that is passed over. In either each process hears of signs
    that others have seen, a checkpoint that could not be written among them."""
    signs = run.signs
    signs.given["unsaved"] = int(saver.failed)
    if run.guard.passes_over(step):
        signs.agree(run.world)
    else:
        optimizer_step(run, step, tally)
    if signs.heard["unsaved"]:
        saver.wait()  # raises, on all processes


def _log(run: Run, monitor: Monitor, tally: Tally, done: int) -> None:
    """Writes the line of an interval that is over, and begins the next.

    Where a stop cuts its validation short, the interval is saved as it is: a resume begins here.
    """
    config, means = run.config, tally.means()
    fields = log_line(means) | {
        "lambda": config.align.weight * alignment_factor(done - 1, config.steps, config.align),
        "lr": learning_rate(done - 1, config.steps, config.optim),
        **monitor.measured(done, means),
        "skipped": run.guard.skipped,
    }
    if "grad_norm" in means:
        fields["grad_norm"] = means["grad_norm"]
    validates = run.validation is not None and _due(config, config.log.validate_every, done)
    probes = config.log.probe_every > 0 and _due(config, config.log.probe_every, done)
    with monitor.apart():
        if validates:
            fields |= {f"val_{k}": v for k, v in validate(run).items()}
        if probes and not run.signs.stopping:
            scores, picture = probed(run, done)
            fields |= scores
            monitor.picture("probe", picture, done)
    if run.signs.stopping and (validates or probes):
        return
    monitor.write(done, fields)
    tally.clear()


def _due(config: TrainConfig, every: int, done: int) -> bool:
    """Whether something is that is done every so many steps (0 = never), and at the end."""
    return done == config.steps or (every > 0 and done % every == 0)


def _unlogged(config: TrainConfig, info: Mapping[str, Any]) -> bool:
    """Whether a stop came before the log line of the step that a checkpoint was made after."""
    return bool(info["tally"]) and _due(config, config.log.every, info["step"])


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """On a CPU a run is a function of its config: no algorithm may depend on thread timing."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = deterministic_settings.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(device.type == "cpu" or before)
    # Filling memory before it is written would take 4 % of a step; nothing here reads it before.
    deterministic_settings.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        deterministic_settings.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
