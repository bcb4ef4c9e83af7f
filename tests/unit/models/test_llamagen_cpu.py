"""LlamaGen's functions for CPUs against the formulas that they stand for."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arra.models import llamagen_cpu, llamagen_layers
from arra.models.llamagen_cpu import RMSNormCPU, TurnCPU, TurnedAttentionCPU, dropout_cpu
from arra.models.llamagen_layers import Dropout, RMSNorm, _turn


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def same(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Values and gradients."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    outer = drawn(*found.shape).detach()
    pairs = zip(
        torch.autograd.grad(found, inputs, outer),
        torch.autograd.grad(expected, inputs, outer),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_norm(monkeypatch) -> None:
    norm, x = RMSNorm(12, 1e-5).double(), drawn(2, 5, 12)
    torch.nn.init.normal_(norm.weight)
    found = norm(x)
    monkeypatch.setattr(llamagen_layers, "serves", lambda x: False)
    same(found, norm(x), [x, norm.weight])
    frozen = norm.weight.detach()
    fixed = RMSNormCPU.apply(x, frozen, 1e-5, torch.float64)
    (grad,) = torch.autograd.grad(fixed.sum(), [x])
    torch.testing.assert_close(grad, torch.autograd.grad(norm(x).sum(), [x])[0])


def test_under_autocast_a_norm_is_rounded_as_the_next_product_would(monkeypatch) -> None:
    norm, x = RMSNorm(12, 1e-5), drawn(2, 5, 12, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
        monkeypatch.setattr(llamagen_layers, "serves", lambda x: False)
        expected = norm(x).bfloat16()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)  # the last bit may differ


def test_turn(monkeypatch) -> None:
    x_BHTw = drawn(2, 5, 3, 8).transpose(1, 2)
    angles_BTP = torch.rand(2, 1, 5, 4, dtype=torch.float64)
    turns = angles_BTP.cos(), angles_BTP.sin()
    found = _turn(x_BHTw, turns)
    assert found.is_contiguous()
    monkeypatch.setattr(llamagen_layers, "serves", lambda x: False)
    same(found, _turn(x_BHTw, turns), [x_BHTw])
    half = TurnCPU.apply(x_BHTw.bfloat16(), *(turn.float() for turn in turns))
    torch.testing.assert_close(half.double(), found, rtol=0.02, atol=0.02)


def turned_attention(qkv_BTE: Tensor, turns: tuple[Tensor, Tensor], heads: int) -> Tensor:
    """What TurnedAttentionCPU stands for, from the formulas."""
    parts = qkv_BTE.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    query, key = (_turn(part, turns) for part in parts[:2])
    mixed = F.scaled_dot_product_attention(query, key, parts[2], is_causal=True, scale=0.3)
    return mixed.transpose(1, 2).flatten(2)


def turns_of(rows: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles_BTP = torch.rand(rows, 1, tokens, 4, dtype=dtype)
    return angles_BTP.cos(), angles_BTP.sin()


@pytest.mark.parametrize("tokens", [1, 4, 11])
@pytest.mark.parametrize("rows", [1, 2])  # positions of all rows alike, or of each
def test_turned_attention(tokens: int, rows: int, monkeypatch) -> None:
    monkeypatch.setattr(llamagen_cpu, "QUERIES", 4)
    monkeypatch.setattr(llamagen_layers, "serves", lambda x: False)
    qkv_BTE = drawn(2, tokens, 3 * 3 * 8)
    turns = turns_of(rows, tokens, torch.float64)
    found = TurnedAttentionCPU.apply(qkv_BTE, *(turn[:, 0] for turn in turns), 3, 0.3)
    same(found, turned_attention(qkv_BTE, turns, 3), [qkv_BTE])


def test_turned_attention_keeps_nothing_where_nothing_is_trained() -> None:
    qkv_BTE = drawn(2, 7, 72).detach()
    turns = turns_of(1, 7, torch.float64)
    found = TurnedAttentionCPU.apply(qkv_BTE, *(turn[:, 0] for turn in turns), 3, 0.3)
    torch.testing.assert_close(found, turned_attention(qkv_BTE, turns, 3))
    assert found.grad_fn is None


def test_dropout_drops_what_it_says_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.full((3, 70_001), 2.0, requires_grad=True)
    out = dropout_cpu(x, 0.1)
    kept = out != 0
    assert abs(float(kept.float().mean()) - 0.9) < 0.003
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 2 / 0.9), rtol=1e-4, atol=0)
    (grad,) = torch.autograd.grad(out.sum(), [x])
    torch.testing.assert_close(grad * 2, out)
    torch.manual_seed(0)
    assert torch.equal(dropout_cpu(x, 0.1), out)
    layer = Dropout(0.1)
    assert (layer(x) == 0).any()
    assert torch.equal(layer.eval()(x), x)


def test_attention_in_bfloat16_is_as_near_as_its_rounding() -> None:
    """The error against float32 of weights rounded to bfloat16: 2^-9 of the largest, and some."""
    qkv_BTE = drawn(2, 100, 72, dtype=torch.float32)
    turns = turns_of(1, 100, torch.float32)
    exact = turned_attention(qkv_BTE, turns, 3)
    flat = [turn[:, 0] for turn in turns]
    half = TurnedAttentionCPU.apply(qkv_BTE.bfloat16(), *flat, 3, 0.3)
    assert (half.float() - exact).norm() / exact.norm() < 0.01
