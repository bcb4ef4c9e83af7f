"""The linear layers of a backbone's blocks in 4 bits: NF4 with doubly quantised scales, as QLoRA
(arXiv 2305.14314) has them, by bitsandbytes.

They are replaced in the model that a family has opened, not by transformers' loader: families open
files in ways of their own, and what is quantised is told by place (the blocks), not by name.
"""

import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from arra.device import pick_device
from arra.models.base import Backbone

Compute = Literal["float32", "bfloat16"]
"""What the weights are written out in to be multiplied with."""

LINEAR = (nn.Linear, Conv1D)  # Conv1D is a transposed linear layer: GPT-2's
_KIND: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}


def require_bitsandbytes(why: str) -> None:
    """Checks that the library bitsandbytes is installed.

    Raises:
        ValueError: it is not.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"{why}: that needs bitsandbytes, pip install 'arra[quantize]'")


def linear_layers(backbone: Backbone) -> dict[str, nn.Module]:
    """The linear layers of the decoder blocks, by their names in the backbone's model."""
    names = {id(module): name for name, module in backbone.model.named_modules()}
    return {names[id(m)]: m for m in backbone.blocks.modules() if isinstance(m, LINEAR)}


def quantize(backbone: Backbone, compute: Compute, device: torch.device | str = "cpu") -> None:
    """Replaces the linear layers of the blocks by frozen 4-bit ones, one by one, in place.

    Each moves to `device` as it is quantised, and the rest of the model at the end: it never has
    to fit there in more bits.
    """
    require_bitsandbytes("a base in 4 bits")
    import bitsandbytes

    for name, layer in linear_layers(backbone).items():
        weight = _weight(layer, compute)
        packed: Any = bitsandbytes.nn.Linear4bit(
            weight.shape[1],
            weight.shape[0],
            bias=layer.bias is not None,
            compute_dtype=weight.dtype,
            device="meta",
            **_KIND,
        )
        packed.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **_KIND)
        if layer.bias is not None:
            packed.bias = layer.bias
        # Else a CPU that has bfloat16 rounds the scales at the first forward of evaluation.
        packed.support_avx512bf16_for_cpu = False
        parent, _, last = name.rpartition(".")
        setattr(backbone.model.get_submodule(parent), last, packed.to(device))
    model: Any = backbone.model
    model.is_loaded_in_4bit = True  # what peft goes by
    backbone.to(device)


@torch.no_grad()
def round_weights(backbone: Backbone, compute: Compute) -> None:
    """Gives the same layers the values that `quantize` would leave them, as plain weights."""
    require_bitsandbytes("this run's base is kept in 4 bits")
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = pick_device("auto")
    for layer in linear_layers(backbone).values():
        packed, state = quantize_4bit(_weight(layer, compute).to(device), **_KIND)
        rounded: Tensor = dequantize_4bit(packed, state)
        weight: Any = layer.weight
        weight.data.copy_(rounded.T if isinstance(layer, Conv1D) else rounded)


def _weight(layer: nn.Module, compute: Compute) -> Tensor:
    """The matrix (out, in) of a linear layer, contiguous, in the type it is written out in."""
    weight: Any = layer.weight
    matrix = weight.data.T if isinstance(layer, Conv1D) else weight.data
    return matrix.to(getattr(torch, compute)).contiguous()
