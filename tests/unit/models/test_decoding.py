"""Decode steps of packed products: the model's own numbers, and rows that know nothing of others.

Legend: R rows, T tokens, D model width, E outputs.
"""

import pytest
import torch
from tiny_steps import CODES, COLUMNS, begun, far, tiny
from torch import nn

from arra.models.decoding import PackedLinear

TYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("tokens", [1, 3])
@torch.no_grad()
def test_a_step_is_the_models_own(tokens: int, key_heads: int) -> None:
    backbone = tiny(torch.float32, key_heads)
    ids = torch.randint(0, CODES, (3, tokens))
    positions = torch.tensor([[8], [5], [2]]) + torch.arange(tokens)
    own = backbone.step(ids, positions, begun(backbone, 3))
    with backbone.decoding():
        assert backbone._decode_step is not None
        made = backbone.step(ids, positions, begun(backbone, 3))
    assert backbone._decode_step is None
    assert (made - own).abs().max() < 1e-5 * own.abs().max()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [2, 4, 8])
@torch.no_grad()
def test_a_row_does_not_depend_on_the_others_nor_on_its_number(
    rows: int, dtype: torch.dtype
) -> None:
    backbone = tiny(dtype)
    seen = []
    for number in range(rows):
        torch.manual_seed(number)
        ids, positions = torch.randint(0, CODES, (rows, 1)), torch.randint(1, 15, (rows, 1))
        ids[number], positions[number] = 7, 1
        cache = backbone.new_cache(rows, COLUMNS)
        first = torch.randint(CODES, CODES + 3, (rows, 1))
        first[number] = CODES + 1
        with backbone.decoding():
            backbone.prefill(first, cache, torch.arange(rows))
            hidden_RTD = backbone.step(ids, positions, cache)
            seen.append((hidden_RTD[number], backbone.head(hidden_RTD[:, 0])[number]))
    assert all(torch.equal(a, b) for each in seen for a, b in zip(each, seen[0], strict=True))


@pytest.mark.parametrize("dtype", TYPES)
@torch.no_grad()
def test_packed_products(dtype: torch.dtype) -> None:
    layer = nn.Linear(48, 24).to(dtype)
    packed, bound = PackedLinear(layer), 1e-5 if dtype == torch.float32 else 1e-2
    for shape in ((1, 48), (2, 1, 48), (5, 48), (3, 7, 48)):
        x = torch.randn(shape, dtype=dtype)
        assert far(packed(x), layer.double()(x.double())) < bound
        layer.to(dtype)
    x_RD, other_RE = torch.randn(6, 48, dtype=dtype), torch.randn(6, 24, dtype=dtype)
    plain_RE = layer.double()(x_RD.double())
    assert far(packed.of_rows(x_RD, "swish"), nn.functional.silu(plain_RE)) < bound
    assert far(packed.joined(x_RD, other_RE, "add"), other_RE + plain_RE) < bound
    assert far(packed.joined(x_RD, other_RE, "mul"), other_RE * plain_RE) < bound


@torch.no_grad()
def test_changed_weights_are_packed_anew_and_nothing_stays_outside() -> None:
    backbone = tiny(torch.float32)
    decoding, ids, at = backbone.decoding(), torch.tensor([[3]]), torch.tensor([[8]])
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    with decoding:
        first = backbone.step(ids, at, begun(backbone, 1))
    assert all(torch.equal(before[name], v) for name, v in backbone.model.state_dict().items())
    assert not any("forward" in vars(module) for module in backbone.model.modules())
    for weight in backbone.model.parameters():
        weight.add_(0.01)
    own = backbone.step(ids, at, begun(backbone, 1))
    with decoding:
        again = backbone.step(ids, at, begun(backbone, 1))
    assert far(again, own) < 1e-5 < far(first, own)
