"""LlamaGen's layers on a CPU, with fewer passes over memory than their formulas have.

Outside the matrix products a CPU's training step waits for memory, and autograd writes down every
step of a formula. These functions keep only their inputs and have their gradients by hand. On a GPU
torch.compile does the like from the formulas (llamagen_layers.py), which stay what is meant: a test
compares both in float64.

Legend: B rows, T tokens, N = B x heads, w a head's width, P = w / 2 pairs, D model width,
R queries.
"""

from typing import Any

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
        return _turned(x_BHTw, torch.complex(cos_BTP, sin_BTP))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTw: Tensor) -> tuple[Tensor, None, None]:
        cos_BTP, sin_BTP = ctx.saved_tensors
        # Laid out as the projection that queries and keys come from.
        back_BTP = torch.complex(cos_BTP, -sin_BTP).transpose(1, 2)
        return _turned(grad_BHTw.transpose(1, 2), back_BTP).transpose(1, 2), None, None


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """Contiguous, whatever `x` was."""
    pairs = x.to(turn.real.dtype, copy=True, memory_format=torch.contiguous_format)
    pairs = torch.view_as_complex(pairs.unflatten(-1, (-1, 2))).mul_(turn)
    return torch.view_as_real(pairs).flatten(-2).to(x.dtype)


class CausalAttentionCPU(torch.autograd.Function):
    """softmax(scale * q k^T) v, every query with the keys up to its own: (N, T, w) each.

    Against PyTorch's fused kernel, which works in float32 and waits for it: weights are rounded to
    the inputs' type, as in its plain attention; nothing but the inputs is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, query_NTw: Tensor, key_NTw: Tensor, value_NTw: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(query_NTw, key_NTw, value_NTw)
        ctx.scale = scale
        mixed_NTw = torch.empty_like(query_NTw)
        for rows in _rows(query_NTw):
            weights = _weights(query_NTw, key_NTw, rows, scale)
            mixed_NTw[:, rows] = weights @ value_NTw[:, : rows.stop]
        return mixed_NTw

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NTw: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query_NTw, key_NTw, value_NTw = ctx.saved_tensors
        query_grad = torch.empty_like(query_NTw)
        key_grad, value_grad = torch.zeros_like(key_NTw), torch.zeros_like(value_NTw)
        for rows in _rows(query_NTw):
            seen, grad_NRw = slice(rows.stop), grad_NTw[:, rows]
            weights = _weights(query_NTw, key_NTw, rows, ctx.scale)
            value_grad[:, seen] += weights.transpose(1, 2) @ grad_NRw
            into = grad_NRw @ value_NTw[:, seen].transpose(1, 2)
            scores = torch._softmax_backward_data(into, weights, -1, weights.dtype).mul_(ctx.scale)
            query_grad[:, rows] = scores @ key_NTw[:, seen]
            key_grad[:, seen] += scores.transpose(1, 2) @ query_NTw[:, rows]
        return query_grad, key_grad, value_grad, None


def _rows(query_NTw: Tensor) -> list[slice]:
    tokens = query_NTw.shape[1]
    return [slice(i, min(i + QUERIES, tokens)) for i in range(0, tokens, QUERIES)]


def _weights(query_NTw: Tensor, key_NTw: Tensor, rows: slice, scale: float) -> Tensor:
    """Attention weights of some queries for the keys up to the last of them."""
    columns = torch.arange(rows.stop, device=query_NTw.device)
    later = columns > columns[rows, None]
    mask = torch.zeros(later.shape, dtype=query_NTw.dtype, device=query_NTw.device)
    mask.masked_fill_(later, float("-inf"))
    keys = key_NTw[:, : rows.stop].transpose(1, 2)
    return torch.baddbmm(mask, query_NTw[:, rows], keys, alpha=scale).softmax(-1)


def dropout_cpu(x: Tensor, probability: float) -> Tensor:
    """Dropout with 16 random bits a value, so `probability` is met to 2^-17, and what is kept is
    scaled by what it really is. PyTorch draws 32 bits, and on most CPUs one value after another."""
    below = round(probability * 2**16)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    bits = words.random_(-(2**63), None).view(torch.int16)[: x.numel()].view(x.shape)
    kept = (bits >= below - 2**15).to(x.dtype)
    return x * kept.mul_(2**16 / (2**16 - below))
