"""LlamaGen's layers on a CPU, with fewer passes over memory than their formulas have.

Outside the matrix products a CPU's training step waits for memory, and autograd writes down every
step of a formula. These functions keep only their inputs and have their gradients by hand. On a GPU
torch.compile does the like from the formulas (llamagen_layers.py), which stay what is meant: a test
compares both in float64.

Legend: B rows, T tokens, N = B x heads, w a head's width, P = w / 2 pairs, D model width,
R queries.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERIES = 64
"""Queries that attend at a time, and no keys after the last of them. 32 to 128 are alike."""


def serves(x: Tensor) -> bool:
    """Whether these functions are the faster ones for `x`."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class RMSNormCPU(torch.autograd.Function):
    """x / rms(x) * weight for x (..., D) and a weight (D,) of the same type, float32 or float64;
    rounded to `dtype` at the end."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, inverse)
        return (x * inverse).mul_(weight_D).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight_D, inverse = ctx.saved_tensors
        unit, grad = x * inverse, grad.to(x.dtype)
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = (grad * unit).flatten(0, -2).sum(0)
        inner = grad * weight_D
        along = torch.linalg.vecdot(inner, unit)[..., None].div_(-x.shape[-1])
        return inner.addcmul_(unit, along).mul_(inverse), weight_grad, None, None


class TurnCPU(torch.autograd.Function):
    """Turns neighbouring pairs of a head's width: a product of complex numbers."""

    @staticmethod
    def forward(ctx: Any, x_BHTw: Tensor, cos_BTP: Tensor, sin_BTP: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BTP, sin_BTP)
        return _turned(x_BHTw, torch.complex(cos_BTP, sin_BTP)).to(x_BHTw.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTw: Tensor) -> tuple[Tensor, None, None]:
        cos_BTP, sin_BTP = ctx.saved_tensors
        # Laid out as the projection that queries and keys come from.
        back_BTP = torch.complex(cos_BTP, -sin_BTP).transpose(1, 2)
        grad = _turned(grad_BHTw.transpose(1, 2), back_BTP).to(grad_BHTw.dtype)
        return grad.transpose(1, 2), None, None


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """In the type of the turn, contiguous."""
    pairs = x.to(turn.real.dtype, copy=True, memory_format=torch.contiguous_format)
    torch.view_as_complex(pairs.unflatten(-1, (-1, 2))).mul_(turn)
    return pairs


class TurnedAttentionCPU(torch.autograd.Function):
    """Causal attention of queries, keys and values (B, T, 3HW), side by side as their projection
    makes them, queries and keys turned first: softmax(scale * q k^T) v, (B, T, HW).

    PyTorch's fused kernel works in float32 and waits for it. Here weights are rounded to the
    inputs' type, as in its plain attention, and kept for the gradient: 5/8 of T^2 a head at 256
    tokens. Some queries are worked on at a time, with the keys up to the last of them.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv_BTE: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, heads: int, scale: float
    ) -> Tensor:
        rows, tokens, width = *qkv_BTE.shape[:2], qkv_BTE.shape[2] // (3 * heads)
        qkv_BT3Hw = qkv_BTE.unflatten(-1, (3, heads, width))
        # Queries are scaled by what turns them; scaled alone they would be read once more.
        factors_211 = cos_BTP.new_tensor([[[scale]], [[1.0]]])
        turn_BT21P = torch.complex(cos_BTP, sin_BTP)[:, :, None, None] * factors_211
        qk_BT2Hw = _turned(qkv_BT3Hw[:, :, :2], turn_BT21P)
        qk_2BHTw = qkv_BTE.new_empty(2, rows, heads, tokens, width)
        query_NTw, key_NTw = qk_2BHTw.copy_(qk_BT2Hw.permute(2, 0, 3, 1, 4)).flatten(1, 2)
        value_NTw = qkv_BT3Hw[:, :, 2].transpose(1, 2).flatten(0, 1)
        mixed_BTHw = qkv_BTE.new_empty(rows, tokens, heads, width)
        kept = []
        for some in _queries(tokens):
            scores = query_NTw[:, some] @ key_NTw[:, : some.stop].transpose(1, 2)
            later = torch.full((scores.shape[1],) * 2, float("-inf"), dtype=scores.dtype).triu_(1)
            scores[:, :, some] += later
            weights = scores.softmax(-1)
            if ctx.needs_input_grad[0]:
                kept.append(weights)
            mixed = weights @ value_NTw[:, : some.stop]
            mixed_BTHw[:, some] = mixed.unflatten(0, (rows, heads)).transpose(1, 2)
        ctx.save_for_backward(query_NTw, key_NTw, value_NTw, turn_BT21P, *kept)
        return mixed_BTHw.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, None, None, None, None]:
        query_NTw, key_NTw, value_NTw, turn_BT21P, *kept = ctx.saved_tensors
        rows, tokens = grad_BTD.shape[:2]
        heads = len(query_NTw) // rows
        grad_BHTw = grad_BTD.unflatten(-1, (heads, -1)).transpose(1, 2)
        query_grad = torch.empty_like(query_NTw)
        # Tokens outermost: what belongs to the first of them is one piece, and is added to as such.
        key_grad, value_grad = key_NTw.new_zeros(2, *key_NTw.transpose(0, 1).shape).transpose(1, 2)
        for some, weights in zip(_queries(tokens), kept, strict=True):
            seen, grad_NRw = slice(some.stop), grad_BHTw[:, :, some].flatten(0, 1)
            value_grad[:, seen].baddbmm_(weights.transpose(1, 2), grad_NRw)
            into = grad_NRw @ value_NTw[:, seen].transpose(1, 2)
            scores = torch._softmax_backward_data(into, weights, -1, weights.dtype)
            query_grad[:, some] = scores @ key_NTw[:, seen]
            key_grad[:, seen].baddbmm_(scores.transpose(1, 2), query_NTw[:, some])
        parts = [part.unflatten(0, (rows, heads)) for part in (query_grad, key_grad, value_grad)]
        qkv_grad = grad_BTD.new_empty(rows, tokens, 3, heads, query_NTw.shape[-1])
        for i, part_BHTw in enumerate(parts):
            qkv_grad[:, :, i] = part_BHTw.transpose(1, 2)
        qkv_grad[:, :, :2] = _turned(qkv_grad[:, :, :2], turn_BT21P.conj())
        return qkv_grad.flatten(2), None, None, None, None


def _queries(tokens: int) -> list[slice]:
    return [slice(i, min(i + QUERIES, tokens)) for i in range(0, tokens, QUERIES)]


def dropout_cpu(x: Tensor, probability: float) -> Tensor:
    """Dropout with 16 random bits a value, so `probability` is met to 2^-17, and what is kept is
    scaled by what it really is. PyTorch draws 32 bits, and on most CPUs one value after another;
    here it draws only the seed of a faster generator."""
    below = round(probability * 2**16)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    words = torch.from_numpy(np.random.SFC64(seed).random_raw(-(-x.numel() // 4)))
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    kept = bits.ge_(below - 2**15).to(x.dtype)
    return x * kept.mul_(2**16 / (2**16 - below))
