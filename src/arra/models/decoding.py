"""What makes steps of a few tokens a row fast on a CPU: packed weights and plain attention.

A step reads all weights for a few rows, so it takes as long as reading them. oneDNN, which does
PyTorch's products, reads a weight of PyTorch's own layout at less than half of memory's speed: it
orders parts of it anew each time (49 products of a 111M model in bfloat16, 4 rows, two threads of
an AMD Zen 4: 16.1 ms, packed 7.5 ms; float32: 48 and 15 ms). Here they are ordered once: in
bfloat16 for products of our own (`NativeLinear`) where the processor has them, else for oneDNN's.
Rows do not depend on each other: a test compares their bits.

Legend: D inputs, E outputs.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arra.models import native
from arra.models.base import Backbone
from arra.models.native import NativeLinear

LEAST_ROWS = 4
"""Of a packed product. Fewer are padded: 2 rows take 9.8 ms where 3 to 6 take 7.5."""
SHARE_OF_MEMORY = 1 / 4
"""Packed weights stand beside the plain ones. Those of a larger share of the machine's memory are
not packed."""
_DTYPES = (torch.float32, torch.bfloat16)
_product = torch.ops.mkldnn._linear_pointwise


class PackedLinear:
    """A linear layer's product with its weight in oneDNN's order, as the weight is now.

    oneDNN orders it for a number of rows, and takes every other number.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        weight = layer.weight.detach()
        self.weight_ED = torch.ops.mkldnn._reorder_linear_weight(weight, LEAST_ROWS)
        self.bias_E = None if layer.bias is None else layer.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's `forward`: (..., D) to (..., E)."""
        if torch.compiler.is_compiling():  # which cannot take packed weights
            return F.linear(x, self.layer.weight, self.layer.bias)
        rows_ND = x.reshape(-1, x.shape[-1])
        made_NE = self.of_rows(at_least(rows_ND))[: len(rows_ND)]
        return made_NE.view(*x.shape[:-1], -1)

    def of_rows(self, x_ND: Tensor, then: str = "none") -> Tensor:
        """Of at least `LEAST_ROWS` rows. `then` is oneDNN's name of a function for the result:
        none, or swish (SiLU)."""
        return _product(x_ND, self.weight_ED, self.bias_E, then, [], "")

    def joined(self, x_ND: Tensor, other_NE: Tensor, how: str) -> Tensor:
        """`of_rows` added to other numbers, or multiplied with them (`how`: add, mul), before it is
        rounded."""
        return _product.binary(x_ND, other_NE, self.weight_ED, self.bias_E, how)


def at_least(x_ND: Tensor) -> Tensor:
    """With rows of zeros up to `LEAST_ROWS`."""
    missing = LEAST_ROWS - len(x_ND)
    return F.pad(x_ND, (0, 0, 0, missing)) if missing > 0 else x_ND


Packed = PackedLinear | NativeLinear


class Decoding(AbstractContextManager[None]):
    """Around steps of a few tokens a row; it may be entered again and again.

    On a CPU that can, the linear layers of the blocks and the head's first are packed when it is
    entered and they have changed. It changes rounding, and nothing else: outside, the model is what
    it was. What is packed goes with this object.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._packed: list[Packed] = []
        self._stamps: list[object] = []  # of what is packed
        self._was_fused = False

    def __enter__(self) -> None:
        self._set_plain_attention()
        layers = _linears(self.backbone)
        stamps: list[object] = [_stamp(layer) for layer in layers]
        if stamps != self._stamps:
            self._packed.clear()
            self._packed = _packed(layers) if _room_for(layers) else []
            self._stamps = stamps
        for each in self._packed:
            each.layer.forward = each  # type: ignore[method-assign,assignment]
        self.packed(self._packed)

    def __exit__(self, *exception: object) -> None:
        for each in self._packed:
            del each.layer.forward
        self.packed([])
        if self._was_fused:
            self.backbone.set_attention("sdpa")

    def packed(self, layers: Sequence[Packed]) -> None:
        """Told which layers are packed from now on; a family may have a step made of them."""

    def _set_plain_attention(self) -> None:
        # With one query a row, the fused CPU kernel pays per row and head: 1.8 ms against 0.7 ms of
        # plain products for 128 rows, 6 heads, 80 columns, a third of all painting time. Its bits
        # also depend on the row where there are several threads. Not in float64: transformers'
        # plain attention rounds its softmax to float32.
        model = self.backbone.model
        fused = model.config._attn_implementation == "sdpa"
        self._was_fused = fused and model.device.type == "cpu" and model.dtype != torch.float64
        if self._was_fused:
            self.backbone.set_attention("eager")


def _linears(backbone: Backbone) -> list[nn.Linear]:
    """Those that can be packed."""
    modules: list[Any] = [*backbone.blocks.modules(), backbone.output_table]
    return [module for module in dict.fromkeys(modules) if _is_packable(module)]


def _packed(layers: Sequence[nn.Linear]) -> list[Packed]:
    served = [layer for layer in layers if native.serves(layer.weight)]
    ours = dict(zip(served, native.packed(served), strict=True))
    return [ours[layer] if layer in ours else PackedLinear(layer) for layer in layers]


def _is_packable(module: nn.Module) -> bool:
    if type(module) is not nn.Linear:  # others may compute otherwise
        return False
    weight = module.weight.data
    plain = type(weight) is Tensor and weight.device.type == "cpu" and weight.dtype in _DTYPES
    return plain and _cpu_packs(weight.dtype)


def _cpu_packs(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _room_for(layers: Sequence[nn.Linear]) -> bool:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return sum(layer.weight.nbytes for layer in layers) <= SHARE_OF_MEMORY * memory


def _stamp(layer: nn.Linear) -> tuple[nn.Linear, int, int]:
    """Changes when the layer or its weight does."""
    weight = layer.weight
    return layer, weight.data_ptr(), 0 if weight.is_inference() else weight._version
