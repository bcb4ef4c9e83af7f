"""Draws in C++: the exact inverse CDF of bfloat16 logits, and the same bookkeeping as in PyTorch.

Legend: R rows, S steps, V logits of a row, K codes.
"""

import math

import pytest
import torch
from tiny_steps import SIDE, tiny
from torch import Tensor

from arra.generate.engine import Engine
from arra.generate.native_draw import NativeDraw
from arra.generate.request import Request
from arra.generate.sampling import RowSampling, guide, is_plain
from arra.generate.settings import Sampling
from arra.generate.state import State
from arra.models import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no such CPU, or no compiler")

FIRST = 3
"""The first legal code's column; as many columns follow the last."""


def begun(rows: int, steps: int = 4) -> State:
    """Rows that sit and draw codes without guidance."""
    state = State.idle(rows, steps, torch.device("cpu"))
    state.active_R.fill_(1)
    state.forced_RS.fill_(-1)
    return state


def drawing(state: State, codes: int) -> NativeDraw:
    return NativeDraw(state, torch.arange(FIRST, FIRST + codes))


def logits(rows: int, codes: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(rows, FIRST + codes + FIRST, generator=generator)).bfloat16()


def cumulative(logits_RK: Tensor) -> Tensor:
    """Exact, in float64, ending at 1."""
    cdf_RK = logits_RK.double().softmax(-1).cumsum(-1)
    return cdf_RK / cdf_RK[:, -1:]


@pytest.mark.parametrize("codes", [1, 2, 15, 16, 17, 50, 1000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_a_code_is_where_the_cumulative_probability_passes_the_number(
    codes: int, temperature: float
) -> None:
    rows = 200
    state, head_RV = begun(rows), logits(rows, codes)
    state.temperature_R.fill_(temperature)
    state.uniform_RS.copy_(torch.rand(rows, 4, generator=torch.Generator().manual_seed(1)))
    state.uniform_RS[0], state.uniform_RS[1] = 0.0, math.nextafter(1.0, 0.0)
    drawing(state, codes)(head_RV)
    drawn_R1, uniform_R1 = state.drawn_RS[:, :1], state.uniform_RS[:, :1]
    cdf_RK = cumulative(head_RV[:, FIRST : FIRST + codes].double() / temperature)
    below_R1 = torch.nn.functional.pad(cdf_RK, (1, 0)).gather(1, drawn_R1)
    near = 2e-6  # the weights are float32
    assert (below_R1 <= uniform_R1 + near).all()
    assert (uniform_R1 <= cdf_RK.gather(1, drawn_R1) + near).all()
    assert state.finite_R.all()
    assert state.step_R.tolist() == [1] * rows
    assert torch.equal(state.token_R, state.drawn_RS[:, 0] + FIRST)


@pytest.mark.parametrize("scale", [0.0, 0.25, 1.0, 4.0])
def test_guidance_is_that_of_pytorch_and_both_rows_go_on_alike(scale: float) -> None:
    pictures, codes = 60, 40
    state, head_RV = begun(2 * pictures), logits(2 * pictures, codes)
    leader_R = torch.arange(2 * pictures) // 2 * 2
    state.leader_R.copy_(leader_R)
    state.partner_R.copy_(leader_R + 1)
    state.scale_RS.fill_(scale)
    uniform_N = torch.rand(pictures, generator=torch.Generator().manual_seed(1)).double()
    state.uniform_RS.copy_(uniform_N.repeat_interleave(2)[:, None].expand(-1, 4))
    drawing(state, codes)(head_RV)
    legal_RK = head_RV[:, FIRST : FIRST + codes].float()
    cdf_NK = cumulative(guide(legal_RK[0::2], legal_RK[1::2], scale))
    drawn_N1 = state.drawn_RS[0::2, :1]
    below_N1 = torch.nn.functional.pad(cdf_NK, (1, 0)).gather(1, drawn_N1)
    assert (below_N1 <= uniform_N[:, None] + 2e-6).all()
    assert (uniform_N[:, None] <= cdf_NK.gather(1, drawn_N1) + 2e-6).all()
    assert torch.equal(state.token_R[0::2], state.token_R[1::2])


def test_what_has_no_weight_is_not_drawn() -> None:
    """Whatever the number, and if it is 0 or next to 1."""
    codes = 40
    for uniform in (0.0, 0.5, math.nextafter(1.0, 0.0)):
        state, head_RV = begun(1), logits(1, codes)
        head_RV[:, FIRST : FIRST + codes] = -torch.inf
        head_RV[:, FIRST + 21] = -5.0
        head_RV[:, FIRST + 30] = -300.0  # too far below
        state.uniform_RS.fill_(uniform)
        drawing(state, codes)(head_RV)
        assert state.drawn_RS[0, 0] == 21
        assert state.finite_R.all()


@pytest.mark.parametrize("damage", [math.nan, math.inf, -math.nan])
@pytest.mark.parametrize("at", [0, 15, 39])
def test_damage_is_noticed_in_its_row(damage: float, at: int) -> None:
    state, head_RV = begun(3), logits(3, 40)
    head_RV[1, FIRST + at] = damage
    drawing(state, 40)(head_RV)
    assert state.finite_R.tolist() == [True, False, True]
    assert ((state.drawn_RS >= 0) & (state.drawn_RS < 40)).all()


def test_all_infinitely_unlikely_is_damage() -> None:
    state = begun(1)
    drawing(state, 40)(torch.full((1, FIRST + 40), -torch.inf, dtype=torch.bfloat16))
    assert not state.finite_R.any()


def test_forced_tokens_given_codes_and_idle_rows() -> None:
    state, head_RV = begun(4), logits(4, 20)
    state.forced_RS[0, 0] = 777
    state.active_R[2] = 0
    before = state.token_R[2].item(), state.drawn_RS[2].tolist()
    drawing(state, 20)(head_RV, torch.tensor([-1, 11, -1, -1]))
    assert state.token_R[:2].tolist() == [777, FIRST + 11]
    assert (state.token_R[2].item(), state.drawn_RS[2].tolist()) == before
    assert state.step_R.tolist() == [1, 1, 0, 1]
    assert state.drawn_RS[1, 0] == 11


def test_bits_do_not_depend_on_threads_or_rows() -> None:
    rows, codes = 9, 500
    head_RV = logits(rows, codes)
    uniform_RS = torch.rand(rows, 4, generator=torch.Generator().manual_seed(1)).double()
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            state = begun(rows)
            state.uniform_RS.copy_(uniform_RS)
            drawing(state, codes)(head_RV)
            found.append(state.drawn_RS[:, 0].tolist())
    finally:
        torch.set_num_threads(before)
    alone = []
    for row in range(rows):
        state = begun(1)
        state.uniform_RS.copy_(uniform_RS[row])
        drawing(state, codes)(head_RV[row : row + 1])
        alone.append(int(state.drawn_RS[0, 0]))
    assert found == [alone] * 3


def test_neighbours_who_leave_codes_out_change_no_bit() -> None:
    """They are drawn by PyTorch; who is not as they are still is drawn here."""
    backbone = tiny(torch.bfloat16)
    kinds = [Sampling(cfg=2.0), Sampling(cfg=2.0, top_k=3), Sampling(cfg=2.0, temperature=0.0)]
    plain, *others = [
        Request(tuple(backbone.condition("1", (SIDE, SIDE))), seed, (SIDE, SIDE), sampling)
        for seed, sampling in enumerate(kinds)
    ]
    alone = Engine(backbone, 6).paint([plain])[0]
    together = Engine(backbone, 6).paint([plain, *others])
    assert torch.equal(together[0], alone)
    for request, codes in zip(others, together[1:], strict=True):
        assert torch.equal(Engine(backbone, 6).paint([request])[0], codes)


def test_which_rows_are_plain() -> None:
    kinds = [Sampling(), Sampling(top_k=2), Sampling(top_p=0.5), Sampling(temperature=0.0)]
    assert is_plain(RowSampling.of(kinds)).tolist() == [True, False, False, False]
