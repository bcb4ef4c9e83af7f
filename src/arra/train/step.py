"""One optimizer step, and the validation loss.

Legend: see objective.py; a tensor here is a sum or a norm.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from arra.config import TrainConfig
from arra.train.monitor import log_line
from arra.train.optim import alignment_factor, clip, learning_rate
from arra.train.setup import Run
from arra.train.tally import Tally


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


def _add_counts(parts: list[dict[str, int]]) -> dict[str, int]:
    return {name: sum(part[name] for part in parts) for name in parts[0]}
