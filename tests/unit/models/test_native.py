"""The C++ of decode steps in bfloat16: exact sums, rounded once, whoever else is in the pass.

Legend: R rows of a cache, T tokens, N rows of a product or pictures, D inputs, E outputs, K codes.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_steps import CODES, COLUMNS, SIDE, begun, far, tiny
from torch import Tensor, nn

from arra.generate.engine import Engine
from arra.generate.request import Request
from arra.generate.settings import Sampling
from arra.models import native
from arra.models.llamagen_decode import DecodeStep, NativeStep
from arra.models.native import NativeLinear
from arra.models.row_cache import RowCache

HALF = 2.0**-8
"""Of the last place of bfloat16, relative: what rounding once may cost."""

needs_library = pytest.mark.skipif(native.library() is None, reason="no such CPU, or no compiler")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- products ------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 1), (30, 24), (48, 32), (64, 97), (514, 40)])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_a_product_is_rounded_once(inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias).bfloat16()
    product, exact = native.packed([layer])[0], layer.double
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 17):
        x_ND = torch.randn(rows, inputs, dtype=torch.bfloat16)
        made_NE = product(x_ND)
        expected_NE = exact()(x_ND.double())
        layer.bfloat16()
        # Beside the rounding: products of inputs cancel, and their sum is of float32.
        bound_NE = HALF * expected_NE.abs() + 1e-5
        assert ((made_NE.double() - expected_NE).abs() <= bound_NE).all()


@needs_library
@torch.no_grad()
def test_a_product_takes_any_shape_and_stride() -> None:
    layer = nn.Linear(48, 24).bfloat16()
    x = torch.randn(3, 48, 7, dtype=torch.bfloat16).transpose(1, 2)
    [product] = native.packed([layer])
    made = product(x)
    assert made.shape == (3, 7, 24)
    assert far(made, layer(x)) < 2e-2
    assert product(x[:0]).shape == (0, 7, 24)


@needs_library
@torch.no_grad()
def test_bits_of_a_row_do_not_depend_on_rows_or_threads(threads: None) -> None:
    [product] = native.packed([nn.Linear(96, 200).bfloat16()])
    x_ND = torch.randn(19, 96, dtype=torch.bfloat16)
    together_NE = product(x_ND)
    for number in (1, 3):
        torch.set_num_threads(number)
        assert torch.equal(product(x_ND), together_NE)
        alone_NE = torch.cat([product(x_ND[n : n + 1]) for n in range(19)])
        assert torch.equal(alone_NE, together_NE)


# ---- steps ---------------------------------------------------------------------------------------


def hidden(cache: RowCache, hide: bool) -> RowCache:
    """Perhaps some columns of some rows that nobody sees."""
    if hide:
        rows = torch.arange(cache.rows)
        cache.hide(rows, (torch.arange(8)[None] + rows[:, None]) % 3 == 0)
    return cache


@needs_library
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("hide", [False, True])
@pytest.mark.parametrize(
    ("key_heads", "head_width"), [(4, 8), (2, 8), (1, 8), (2, 16), (4, 24), (4, 64), (2, 100)]
)
@torch.no_grad()
def test_a_step_is_as_near_to_the_exact_one_as_the_models_own(
    key_heads: int, head_width: int, tokens: int, rows: int, hide: bool
) -> None:
    torch.manual_seed(3)
    ids_RT = torch.randint(0, CODES, (rows, tokens))
    positions_RT = torch.randint(1, 9, (rows, 1)) + torch.arange(tokens)
    backbone, exact = (tiny(torch.bfloat16, key_heads, head_width) for _ in range(2))
    exact.model.double()
    expected, own, made = (hidden(begun(each, rows), hide) for each in (exact, backbone, backbone))
    expected_RTD = exact.step(ids_RT, positions_RT, expected)
    own_RTD = backbone.step(ids_RT, positions_RT, own)
    with backbone.decoding():
        assert isinstance(backbone._decode_step, NativeStep)
        made_RTD = backbone.step(ids_RT, positions_RT, made)
    assert far(made_RTD, expected_RTD) < max(1.2 * far(own_RTD, expected_RTD), 4 * HALF)
    for kept, other in zip(made.layers, own.layers, strict=True):
        for table, like in ((kept.keys, other.keys), (kept.values, other.values)):
            assert far(table[:rows], like[:rows]) < 8 * HALF


@needs_library
@torch.no_grad()
def test_bits_of_a_step_do_not_depend_on_rows_or_threads(threads: None) -> None:
    backbone, rows = tiny(torch.bfloat16), 11
    ids_R1 = torch.randint(0, CODES, (rows, 1))
    positions_R1 = torch.randint(1, COLUMNS, (rows, 1))
    caches = [begun(backbone, rows) for _ in range(3)]
    with backbone.decoding():
        first = backbone.step(ids_R1, positions_R1, caches[0])
        torch.set_num_threads(3)
        assert torch.equal(backbone.step(ids_R1, positions_R1, caches[1]), first)
        few = backbone.new_cache(4, COLUMNS)
        few.begin(torch.arange(4), 8)
        for kept, other in zip(few.layers, caches[2].layers, strict=True):
            kept.update(other.keys[:4, :, :8], other.values[:4, :, :8])
        assert torch.equal(backbone.step(ids_R1[:4], positions_R1[:4], few), first[:4])


@needs_library
@torch.no_grad()
def test_what_is_not_finite_stays_so() -> None:
    backbone = tiny(torch.bfloat16)
    backbone.model.layers[1].attention.wqkv.weight[0, 0] = torch.nan  # type: ignore[union-attr]
    with backbone.decoding():
        made = backbone.step(torch.tensor([[3]]), torch.tensor([[8]]), begun(backbone, 1))
    assert not made.isfinite().all()


# ---- painting ------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@torch.no_grad()
def test_greedy_codes_are_the_likeliest_but_for_the_models_own_rounding(cfg: float) -> None:
    backbone, grid = tiny(torch.bfloat16), (SIDE, SIDE)
    sampling = Sampling(cfg=cfg, temperature=0)
    requests = [Request((CODES + n,), n, grid, sampling) for n in range(3)]
    painted = Engine(backbone, 6).paint(requests)
    ids_NT = torch.stack([codes_hw.flatten() for codes_hw in painted])

    def logits() -> Tensor:
        guided_NTK, unguided_NTK = (
            backbone.head(backbone.last_hidden(torch.cat([first_N1, ids_NT[:, :-1]], dim=1)))
            for first_N1 in (torch.arange(3)[:, None] + CODES, torch.full((3, 1), CODES + 3))
        )
        return unguided_NTK + cfg * (guided_NTK - unguided_NTK).double()

    rounded_NTK = logits()
    backbone.model.double()
    exact_NTK = logits()
    taken_NT = exact_NTK.gather(-1, ids_NT[..., None])[..., 0]
    error = (rounded_NTK - exact_NTK).abs().max()  # of the likeliest code and of the taken one
    assert (exact_NTK.amax(-1) - taken_NT).max() <= 2 * error < exact_NTK.std()


def test_without_a_compiler_it_is_said_and_pytorch_takes_the_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    native.library.cache_clear()
    try:
        backbone = tiny(torch.bfloat16)
        with pytest.warns(UserWarning, match="no-such-compiler"):
            native.library()
        with backbone.decoding():
            assert not isinstance(backbone.model.output.forward, NativeLinear)
            if torch.ops.mkldnn._is_mkldnn_bf16_supported():
                assert isinstance(backbone._decode_step, DecodeStep)
    finally:
        native.library.cache_clear()
