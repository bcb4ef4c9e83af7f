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

from arra.config import TrainConfig
from arra.device import pick_device
from arra.train.checkpoint import Saver, restore
from arra.train.claim import claim, unclaim
from arra.train.monitor import Monitor, log_line
from arra.train.optim import alignment_factor, learning_rate
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
    with open_world(pick_device(config.device)) as world, _deterministic(world.device):
        return _train(config, world, stop_after)


def _train(config: TrainConfig, world: World, stop_after: int | None) -> Path:
    started = time.monotonic()
    folder = Path(config.out)
    world.on_main(lambda: require_trackers(config.log.trackers))
    config, threads = world.on_main(lambda: claim(config, folder))
    torch.set_num_threads(threads)
    try:
        run = set_up(config, folder, world)
        info = restore(folder, run.state, world) or {"step": 0, "tally": {}}
        if config.log.probe_every:
            check_probe(run)
        end = min(config.steps, stop_after or config.steps)
        with (
            RunCard(run, info["step"], started) as card,
            Monitor(run, info["step"]) as monitor,
            Saver(folder, run.state, world, config.checkpoint) as saver,
            run.signs.watched(),
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
    config, signs, tally = run.config, run.signs, Tally(info["tally"])
    for step in range(info["step"], end):
        signs.given["unsaved"] = int(saver.failed)
        norm = optimizer_step(run, step, tally)
        if signs.heard["unsaved"]:
            saver.wait()  # raises, on all processes
        tally.add("grad_norm", norm, 1)
        done = step + 1
        monitor.step(done)
        finished = done == config.steps
        if done % config.log.every == 0 or finished:
            means = tally.means()
            fields = log_line(means) | {
                "lambda": config.align.weight * alignment_factor(step, config.steps, config.align),
                "lr": learning_rate(step, config.steps, config.optim),
                "grad_norm": means["grad_norm"],
                **monitor.measured(done, means),
            }
            every = config.log.validate_every
            if run.validation and (finished or (every and done % every == 0)):
                with monitor.apart():
                    fields |= {f"val_{k}": v for k, v in validate(run).items()}
            every = config.log.probe_every
            if every and (finished or done % every == 0):
                with monitor.apart():
                    scores, picture = probed(run, done)
                fields |= scores
                monitor.picture("probe", picture, done)
            monitor.write(done, fields)
            tally = Tally()
        if config.log.sample_every and done % config.log.sample_every == 0 and not signs.stopping:
            with monitor.apart():
                monitor.picture("samples", paint_samples(run, done), done)
        if done % config.checkpoint.every == 0 or done == end or signs.stopping:
            with monitor.apart():
                saver.save(done, {"tally": tally.saved()})
            card.update(done)
        if signs.stopping:
            saver.wait()
            if run.world.is_main:
                print(f"asked to stop: saved after step {done}; the same command goes on from it")
            raise signs.ending()


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On a CPU a run is a function of its config: no algorithm may depend on thread timing."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(device.type == "cpu" or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
