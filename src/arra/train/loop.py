"""The training loop: plain PyTorch, readable in one sitting.

One image's way: data/loader.py lays it out -> `setup.Step` runs the backbone and taps it ->
objective.py turns hidden states into sums -> this file divides, steps, logs and saves.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arra.config import TrainConfig
from arra.device import pick_device
from arra.models.loading import latest_checkpoint
from arra.train import checkpoint
from arra.train.monitor import Monitor, Tally, log_line, print_line, write_run_card
from arra.train.optim import alignment_factor, clip, learning_rate
from arra.train.samples import paint_samples
from arra.train.setup import Run, claim, manifest_hash, set_up, unclaim
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
    config, threads = world.on_main(lambda: claim(config, folder))
    torch.set_num_threads(threads)
    try:
        run = set_up(config, folder, world)
        last = latest_checkpoint(folder)
        fresh: dict[str, Any] = {"step": 0, "tally": {}}
        info = checkpoint.restore(last, run.state) if last else fresh
        monitor = Monitor(folder, config, info["step"])
        try:
            _loop(run, monitor, info, min(config.steps, stop_after or config.steps))
        finally:
            monitor.close()
    except (ValueError, OSError):
        if world.is_main:
            unclaim(folder)
        raise
    known = run.loader.dataset.manifest.aligned()
    known |= {name: target.info for name, target in run.loader.targets.items()}
    encoders = {name: info.encoder for name, info in known.items()}
    seconds = time.monotonic() - started
    write_run_card(folder, manifest_hash(config), encoders, seconds)
    return folder


def _loop(run: Run, monitor: Monitor, info: Mapping[str, Any], end: int) -> None:
    config, tally = run.config, Tally(info["tally"])
    for step in range(info["step"], end):
        norm = optimizer_step(run, step, tally)
        tally.add("grad_norm", norm, 1)
        done = step + 1
        finished = done == config.steps
        if done % config.log.every == 0 or finished:
            means = tally.means()
            fields = log_line(means) | {
                "lambda": config.align.weight * alignment_factor(step, config.steps, config.align),
                "lr": learning_rate(step, config.steps, config.optim),
                "grad_norm": means["grad_norm"],
                "images_per_s": monitor.images_per_second(done),
            }
            every = config.log.validate_every
            if run.validation and (finished or (every and done % every == 0)):
                fields |= {f"val_{k}": v for k, v in validate(run).items()}
            monitor.write(done, fields)
            print_line(done, config.steps, fields, monitor.remaining(done))
            tally = Tally()
        if config.log.sample_every and done % config.log.sample_every == 0:
            paint_samples(run, done)
        if done % config.checkpoint.every == 0 or done == end:
            extra = {"tally": tally.saved()}
            checkpoint.save(run.folder, done, run.state, extra, config.checkpoint.keep)


def optimizer_step(run: Run, step: int, tally: Tally) -> Tensor:
    """One optimizer step: every term is divided once, by its count over all micro-batches."""
    config, state = run.config, run.state
    # Dropout inside a model, if any, depends on (seed, step) only: EDM2's way to an exact resume.
    torch.manual_seed((config.seed << 32) + step)
    factor = alignment_factor(step, config.steps, config.align)
    micros = [micro.to(run.world.device) for micro in run.loader.step(step)]
    counts = run.world.sum(_add_counts([run.step.objective.counts(m.batch) for m in micros]))
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(step, config.steps, config.optim)
    loss = torch.zeros((), device=run.world.device)
    for micro in micros:
        with _autocast(config, run.world.device):
            terms = run.step(micro, factor)
        share = terms.total(counts)
        share.backward()
        loss = loss + share.detach()
        tally.add_terms(terms)
    tally.add("loss", loss, 1)
    norm = clip(run.step.model, run.step.objective, config.optim.clip)
    state.optimizer.step()
    state.optimizer.zero_grad()
    if state.average is not None:
        state.average.update(state.trained().items(), step)
    return norm


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """Mean terms over the first images of the validation split, prompts kept."""
    assert run.validation is not None
    tally = Tally()
    run.step.eval()
    for micro in run.validation.in_order(run.config.log.validate_images):
        with _autocast(run.config, run.world.device):
            terms = run.step(micro.to(run.world.device), 1.0)
        tally.add_terms(terms)
    run.step.train()
    return log_line(tally.means())


def _autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    if config.dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On a CPU a run is a function of its config: no algorithm may depend on thread timing."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(device.type == "cpu" or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _add_counts(parts: list[dict[str, int]]) -> dict[str, int]:
    return {name: sum(part[name] for part in parts) for name in parts[0]}
