"""Stand-ins for bitsandbytes, whose kernels need values and a GPU: its bytes, no arithmetic."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from arra.models.base import Backbone

BLOCK_8BIT, SMALLEST_8BIT = 256, 4096
"""Values that share a scale in 8-bit states, and the least that a quantised parameter has
(bitsandbytes, optim/optimizer.py and functional.py)."""
BLOCK_4BIT, BLOCK_SCALES = 64, 256
"""Weights that share a scale in NF4, and scales that share one (QLoRA, arXiv 2305.14314)."""


class EightBitAdamW(torch.optim.AdamW):
    """Holds what bitsandbytes' AdamW8bit holds and leaves the parameters alone.

    As an AdamW it is not asked to wait for the device before a step, where nothing has a value.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__([{"params": g["params"]} for g in groups], lr=0.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = _states(parameter)


def _states(parameter: Tensor) -> dict[str, Tensor]:
    count = parameter.numel()
    if count < SMALLEST_8BIT:
        return {
            name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("state1", "state2")
        }
    made = {}
    for name in ("1", "2"):
        made[f"state{name}"] = torch.zeros_like(parameter, dtype=torch.uint8)
        made[f"absmax{name}"] = parameter.new_zeros(-(-count // BLOCK_8BIT), dtype=torch.float32)
    return made


class FourBitLinear(nn.Linear):
    """A frozen linear layer of packed 4-bit weights: unpacked for each product, then forgotten."""

    def __init__(self, original: nn.Linear | Conv1D, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        shape = original.weight.shape
        self.out_features, self.in_features = shape if type(original) is nn.Linear else shape[::-1]
        count, scales = original.weight.numel(), original.weight.numel() // BLOCK_4BIT
        packed = torch.empty((count + 1) // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = original.bias
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8))
        self.register_buffer("scales_of_scales", torch.empty(-(-scales // BLOCK_SCALES)))
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        out = _Product.apply(x.to(self.dtype), self.weight, shape)
        out = out if self.bias is None else out + self.bias.to(out.dtype)
        return out.to(x.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape, ctx.dtype = shape, x.dtype
        return x @ packed.new_empty(shape, dtype=x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        return grads[0] @ packed.new_empty(ctx.shape, dtype=grads[0].dtype), None, None


def quantise_blocks(backbone: Backbone, dtype: torch.dtype) -> None:
    """Puts packed 4-bit layers in the place of the blocks' linear layers, in place."""
    for module in list(backbone.blocks.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (nn.Linear, Conv1D)):
                setattr(module, name, FourBitLinear(child, dtype))
