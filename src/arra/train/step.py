"""One optimizer step, and the validation loss.

Legend: see objective.py; a tensor here is a sum or a norm.
"""

from contextlib import AbstractContextManager, nullcontext
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from arra.config import TrainConfig
from arra.data.loader import MicroBatch
from arra.train.blocks import eagerly
from arra.train.monitor import log_line
from arra.train.optim import alignment_factor, clip, learning_rate, update
from arra.train.setup import Run
from arra.train.tally import StepSums, Tally, mean_of


def optimizer_step(run: Run, step: int, tally: Tally) -> None:
    """One optimizer step: every term is divided once, by its count over all micro-batches.

    Nothing here waits for the device: whether the update is made, it decides itself (guard.py).
    """
    config, state, sums = run.config, run.state, StepSums()
    torch.manual_seed(_dropout_seed(config.seed, step, run.world.rank))
    factor = alignment_factor(step, config.steps, config.align)
    micros = [micro.to(run.world.device) for micro in run.loader.step(step)]
    counted = _add_counts([run.step.counts(m) for m in micros])
    counts = run.world.sum(counted | run.signs.given)
    run.signs.hear(counts)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(step, config.steps, config.optim)
    loss = torch.zeros((), device=run.world.device)
    for micro in micros:
        with run.engine.micro_batch(last=micro is micros[-1]):
            with autocast(config, run.world.device):
                terms = run.engine.module(micro, factor)
            share = terms.total(counts)
            share.backward()
        loss = loss + share.detach()
        sums.add_terms(terms)
    # The processes' shares of a step's loss are summed, and the norms are the same on all.
    once = 1 / run.world.size
    sums.add("loss", loss, once)
    for name, norm in clip(run.step.model, run.step.objective, config.optim.clip).items():
        sums.add(name, norm * once, once)
    sums.known = _work(micros)
    refused = run.guard.judge(sums.values())
    update(state.optimizer, refused)
    if state.average is not None:
        state.average.update(state.trained().items(), step, refused)
    tally.add(step, sums, refused)


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """Mean terms over the first images of the validation split, prompts kept; none if a stop comes
    first."""
    assert run.validation is not None
    sums = StepSums()
    loader, limit = run.validation, run.config.log.validate_images
    images = min(limit, loader.num_samples)
    rounds = range(-(-images // (loader.batch_size * run.world.size)))
    run.step.eval()
    # Where weights are gathered for a forward pass, all processes must do as many: one whose share
    # is shorter repeats a batch that does not count.
    for _, micro in zip_longest(rounds, loader.in_order(limit)):
        run.signs.agree(run.world)
        if run.signs.stopping:
            break
        shown = micro or loader.spare()
        with eagerly(), autocast(run.config, run.world.device):
            terms = run.engine.module(shown.to(run.world.device), 1.0)
        sums.add_terms(terms, counted=micro is not None)
    run.step.train()
    return {} if run.signs.stopping else log_line(mean_of(sums, run.world))


def _work(micros: list[MicroBatch]) -> dict[str, float]:
    """What a model's operations are counted by (throughput.py): padding is computed as well."""
    shapes = [micro.batch.ids_BT.shape for micro in micros]
    return {
        "tokens": sum(rows * length for rows, length in shapes),
        "squares": sum(rows * length**2 for rows, length in shapes),
        "labels": sum(micro.batch.trained_N.numel() for micro in micros),
    }


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    """Dropout inside a model, if any, depends on (seed, step, rank) only: EDM2's way to an exact
    resume."""
    first = (seed << 32) + step
    if rank == 0:
        return first
    return int(np.random.SeedSequence([first, rank]).generate_state(1, np.uint64)[0])


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Around a forward pass: what the run computes in."""
    if config.dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def _add_counts(parts: list[dict[str, int]]) -> dict[str, int]:
    return {name: sum(part[name] for part in parts) for name in parts[0]}
