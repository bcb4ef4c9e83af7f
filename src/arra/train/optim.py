"""AdamW's groups, the learning-rate schedule, the schedule of lambda, and averaged weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from arra.config import AlignConfig, OptimConfig
from arra.models.four_bits import require_bitsandbytes


def decayed_parameters(model: PreTrainedModel, objective: nn.Module) -> list[nn.Parameter]:
    """Matrices decay; norms, biases and token tables do not (rows of rare tokens would only
    shrink)."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    # An adapter keeps the rows that train beside the table, as parameters of their own.
    tables |= {id(p) for p in model.get_input_embeddings().parameters()}
    trained = [p for m in (model, objective) for p in m.parameters() if p.requires_grad]
    return [p for p in trained if p.ndim >= 2 and id(p) not in tables]


def build_optimizer(
    model: PreTrainedModel, objective: nn.Module, config: OptimConfig
) -> torch.optim.Optimizer:
    """AdamW with every trainable parameter in exactly one group.

    With `bits` 8 both moments are bitsandbytes' blockwise quantised ones (arXiv 2110.02861);
    parameters of less than 4,096 values keep float32 states.

    Raises:
        ValueError: 8 bits without bitsandbytes.
    """
    trained = [p for m in (model, objective) for p in m.parameters() if p.requires_grad]
    decayed = decayed_parameters(model, objective)
    chosen = {id(p) for p in decayed}
    rest = [p for p in trained if id(p) not in chosen]
    assert len(decayed) + len(rest) == len({id(p) for p in trained}), "a parameter has two groups"
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    betas = (config.beta1, config.beta2)
    if config.bits == 8:
        require_bitsandbytes("--optim.bits 8")
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, lr=config.lr, betas=betas)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then its shape."""
    warmup = max(1, round(config.warmup * steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(1, steps - warmup)
    low = config.final_lr
    return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def alignment_factor(step: int, steps: int, config: AlignConfig) -> float:
    """The factor on lambda at optimizer step `step`.

    step: 1, then 1/2 after `until` (Mirai halves at half of training). cosine: 1 to 0 at `until`.
    stop: 1, then 0 after `until` (HASTE).
    """
    progress = step / steps
    late = progress >= config.until
    match config.schedule:
        case "step":
            return 0.5 if late else 1.0
        case "stop":
            return 0.0 if late else 1.0
        case "cosine":
            return 0.0 if late else 0.5 * (1 + math.cos(math.pi * progress / config.until))
        case _:
            return 1.0


def clip(model: nn.Module, objective: nn.Module, limit: float) -> dict[str, Tensor]:
    """Clips the model's and the projectors' gradients apart; returns both norms, before.

    Together, a large projector gradient would scale down the model's, and an aligned run would
    differ from its baseline by more than its loss.
    """
    parts = {"grad_norm": model, "grad_norm/projectors": objective}
    return {
        name: _clip([p for p in part.parameters() if p.grad is not None], limit)
        for name, part in parts.items()
        if any(p.grad is not None for p in part.parameters())
    }


def _clip(parameters: list[nn.Parameter], limit: float) -> Tensor:
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def update(optimizer: torch.optim.Optimizer, refused: Tensor) -> None:
    """One step of the optimizer, unless `refused` (float32, 0 or 1): then nothing moves, its
    moments and step counters neither.

    PyTorch's fused AdamW looks at it on the device, by the attribute that its GradScaler sets.
    bitsandbytes' optimizers have no such door: with 8 bits the host waits for it in each step.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = refused  # type: ignore[attr-defined]
        optimizer.step()
    elif not refused.item():
        optimizer.step()
    optimizer.zero_grad()


class Average:
    """Exponential moving average of the weights that train, with warm-up: decay
    min(d, (1 + t) / (10 + t))."""

    def __init__(self, named: Iterable[tuple[str, Tensor]], decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in named}

    @torch.no_grad()
    def update(self, named: Iterable[tuple[str, Tensor]], step: int, refused: Tensor) -> None:
        """Moves the average towards the weights after optimizer step `step` (from 0), unless the
        step was `refused` (0 or 1, on the device)."""
        share = (1 - min(self.decay, (1 + step) / (10 + step))) * (1 - refused.double())
        for name, parameter in named:
            self.weights[name].lerp_(parameter.detach(), share.to(parameter.dtype))
