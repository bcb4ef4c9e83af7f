"""Smaller weights for painting: the linear layers of a backbone's blocks in 8 or 4 bits.

int8 and int4 are weight-only: one scale per output (int8), or a scale and an offset per group of
inputs (int4); products are computed in the model's own type. fp8 rounds weights and activations,
each with one scale per row, for the products of Hopper. Embeddings, norms, the output head and all
that stands outside the blocks stay as they are. The rounding is torchao's.

On a GPU torchao's tensors multiply, too. On a CPU PyTorch's kernels do, called straight from the
layers below: torchao's int8 writes all weights out in bfloat16 first, unless it is compiled.

No row of a product depends on the others: scales of activations (fp8) are a row's own.

Legend: N rows, I inputs, O outputs, G groups of inputs.
"""

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from arra.models.base import Backbone
from arra.models.four_bits import linear_layers

Quantization = Literal["off", "int8", "int4", "fp8"]

GROUP = 64
"""Inputs of int4 that share a scale and an offset: 4.5 bits a weight (experiments/weights)."""
INPUTS = {"int8": 16, "int4": GROUP, "fp8": 16}
"""What a layer's inputs must be a multiple of. int8 on a CPU: PyTorch's kernel reads past the end
of other rows."""
OUTPUTS = {"int8": 1, "int4": 16, "fp8": 16}
KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_ACTIVATION = 1e-6
"""What a row's largest activation is taken for at least: of a row of zeros, as rows where nobody
sits may have, torchao's fp8 makes NaN, and that would stay in the cache."""
HOPPER = (9, 0)
"""Compute capability."""


def quantize_weights(
    backbone: Backbone, quantization: Quantization, device: torch.device | str = "cpu"
) -> None:
    """Replaces the linear layers of the blocks by smaller ones, one by one, in place, for painting:
    they do not train. Each moves to `device` on its own and the rest of the model at the end.

    Raises:
        ValueError: torchao is missing, the device has no such products, the model's layers cannot
            be rounded so, or are not plain: under an adapter, or quantised already.
    """
    device = torch.device(device)
    if quantization != "off":
        flag = f"--quantization {quantization}"
        _check_device(quantization, device, flag)
        layers = _layers(backbone, flag)
        for name, layer in layers.items():
            _check_layer(name, layer, quantization, device, flag)
        _check_torchao(flag)
        for name, layer in layers.items():
            parent, _, last = name.rpartition(".")
            smaller = _smaller(_plain(layer).to(device), quantization)
            setattr(backbone.model.get_submodule(parent), last, smaller)
    backbone.to(device)


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The model's state by name, in any order; torchao's tensors come in their parts."""
    for name, tensor in model.state_dict().items():
        if not is_traceable_wrapper_subclass(tensor):
            yield name, tensor
            continue
        for part in tensor.__tensor_flatten__()[0]:
            yield f"{name}.{part}", getattr(tensor, part)


# ---- what can be rounded -------------------------------------------------------------------------


def _check_torchao(flag: str) -> None:
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(f"{flag}: that needs torchao, pip install 'arra[torchao]'")


def _check_device(quantization: Quantization, device: torch.device, flag: str) -> None:
    if quantization != "fp8":
        return
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < HOPPER:
        raise ValueError(
            f"{flag} needs a GPU that multiplies fp8 (Hopper or newer), and here it would be "
            f"{device}: use --quantization int8"
        )


def _layers(backbone: Backbone, flag: str) -> dict[str, nn.Module]:
    """The linear layers of the blocks, by their names in the model."""
    kind = type(backbone.model).__name__
    if getattr(backbone.model, "peft_config", None):
        raise ValueError(f"{flag}: {kind} carries an adapter: merge it first (`arra export`)")
    layers = linear_layers(backbone)
    if any(not _weight(layer).is_floating_point() for layer in layers.values()) or not layers:
        raise ValueError(
            f"{flag}: {kind} has no plain linear layers, it may be quantised already: take the "
            f"weights that it was made from"
        )
    inside = sum(parameter.numel() for parameter in backbone.blocks.parameters())
    if 2 * sum(_weight(layer).numel() for layer in layers.values()) < inside:
        raise ValueError(
            f"{flag}: most weights of {kind} are in no linear layer (a mixture of experts?), so "
            f"little would be saved: leave it out"
        )
    return layers


def _check_layer(
    name: str, layer: nn.Module, quantization: Quantization, device: torch.device, flag: str
) -> None:
    plain = _plain(layer)
    dtype, inputs, outputs = plain.weight.dtype, plain.in_features, plain.out_features
    narrow = device.type == "cuda" and quantization != "int8"
    if dtype not in ((torch.bfloat16,) if narrow else KERNEL_TYPES):
        said = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{flag} does not work with weights in {said} on {device}: add --dtype bfloat16"
        )
    step, other = INPUTS[quantization], "leave it out"
    if quantization == "int4" and inputs % INPUTS["int8"] == 0:
        other = "use --quantization int8"
    if inputs % step:
        raise ValueError(
            f"{flag}: {name} has {inputs} inputs, which groups of {step} do not divide: {other}"
        )
    if outputs % OUTPUTS[quantization]:
        raise ValueError(
            f"{flag}: {name} has {outputs} outputs, no multiple of {OUTPUTS[quantization]}: {other}"
        )


def _weight(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight
    return weight


def _plain(layer: nn.Module) -> nn.Linear:
    """The same as a linear layer: GPT-2's are transposed."""
    if isinstance(layer, nn.Linear):
        return layer
    weight_OI = _weight(layer).detach().T.contiguous()
    plain = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(weight_OI, requires_grad=False)
    bias: Any = layer.bias
    plain.bias = bias
    return plain


# ---- rounding ------------------------------------------------------------------------------------


def _smaller(layer: nn.Linear, quantization: Quantization) -> nn.Module:
    if layer.weight.device.type == "cpu":
        return {"int8": Int8Linear, "int4": Int4Linear}[quantization](layer)
    return rounded(layer, quantization)


@torch.no_grad()
def rounded(layer: nn.Linear, quantization: Quantization) -> nn.Module:
    """A linear layer of the same device whose weight is a tensor of torchao."""
    with _quiet():
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int4WeightOnlyConfig,
            Int8WeightOnlyConfig,
            PerRow,
            quantize_,
        )
    if quantization == "int8":
        config: Any = Int8WeightOnlyConfig()
    elif quantization == "int4":
        config = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    else:
        config = Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), activation_value_lb=LEAST_ACTIVATION
        )
    held = nn.Sequential(layer)
    quantize_(held, config)
    return held[0]


class SmallLinear(nn.Module):
    """A linear layer for a CPU, in fewer bits. It is called like any, or as a step calls packed
    layers (`PackedLinear`)."""

    bias_O: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return self.of_rows(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    def of_rows(self, x_NI: Tensor, then: str = "none") -> Tensor:
        """(N, O). `then`: none, or swish (SiLU)."""
        y_NO = self.product(x_NI)
        if self.bias_O is not None:
            y_NO = y_NO + self.bias_O
        return F.silu(y_NO) if then == "swish" else y_NO

    def joined(self, x_NI: Tensor, other_NO: Tensor, how: str) -> Tensor:
        """`of_rows` added to other numbers (`how`: add), or multiplied with them (mul)."""
        y_NO = self.of_rows(x_NI)
        return y_NO + other_NO if how == "add" else y_NO * other_NO

    def product(self, x_NI: Tensor) -> Tensor:
        """Without the bias."""
        raise NotImplementedError


class Int8Linear(SmallLinear):
    """A linear layer in int8 on a CPU: y_NO = (x_NI W_OI^T) * scale_O."""

    weight_OI: Tensor
    scale_O: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        dtype, bias_O = layer.weight.dtype, layer.bias
        packed: Any = rounded(layer, "int8").weight
        self.register_buffer("weight_OI", packed.qdata)
        self.register_buffer("scale_O", packed.scale.flatten().to(dtype))
        self.register_buffer("bias_O", None if bias_O is None else bias_O.detach())

    def product(self, x_NI: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x_NI, self.weight_OI, self.scale_O)


class Int4Linear(SmallLinear):
    """A linear layer in int4 on a CPU: each group of inputs has a scale and an offset."""

    packed: Tensor
    scale_GO2: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        with _quiet():
            from torchao.prototype.quantization.int4 import Int4OpaqueTensor
        packed: Any = Int4OpaqueTensor.from_hp(layer.weight.detach(), [1, GROUP])
        self.register_buffer("packed", packed.qdata)
        self.register_buffer("scale_GO2", packed.scale_and_zero)
        self.register_buffer("bias_O", None if layer.bias is None else layer.bias.detach())

    def product(self, x_NI: Tensor) -> Tensor:
        mm: Any = torch.ops.aten._weight_int4pack_mm_for_cpu
        return mm(x_NI.contiguous(), self.packed, GROUP, self.scale_GO2)


@contextmanager
def _quiet() -> Iterator[None]:
    """torchao warns of its GPU extensions where they cannot be loaded, and of PyTorch's changes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
