"""Painting: the cached loop equals full forwards, and a picture is its prompt's and seed's alone.

Legend: N images, B rows, T tokens, D width, V vocabulary, K codes, P cells, h and w codes per side.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from painted_logits import fed, logits_of
from torch import Tensor

from arra.config import ModelConfig
from arra.generate.engine import Engine
from arra.generate.request import Request
from arra.generate.sampling import RowSampling, sample, uniforms
from arra.generate.settings import Sampling
from arra.layout import Image, Style, Text
from arra.models.base import Backbone
from arra.models.loading import load_for_training

CODES = 16
GRID = (2, 4)
CAPTIONS = ["a red line", "two squares", "", "a large green triangle " * 3]
STYLES: list[tuple[Style, bool]] = [
    ("grid", False),
    ("chameleon", False),
    ("chameleon", True),
    ("lumina", False),
]
GUIDED = Sampling(cfg=3.0)


@cache
def tiny(style: Style = "chameleon", rep: bool = False, max_length: int = 128) -> Backbone:
    """A fresh model in float64 whose logits are large enough that every choice matters."""
    config = ModelConfig(
        layers=2,
        hidden_size=32,
        heads=2,
        mlp_size=64,
        max_length=max_length,
        text_vocabulary=280,
        layout=style,
        rep=rep,
    )
    backbone = load_for_training(
        None, config, codebook_KC=torch.randn(CODES, 4), captions=CAPTIONS, seed=0
    )
    with torch.no_grad():
        backbone.model.get_output_embeddings().weight.mul_(40)
    backbone.model.double().eval()
    return backbone


@cache
def tiny32() -> Backbone:
    """In float32, where rounding depends on shapes."""
    backbone = load_for_training(
        None,
        ModelConfig(layers=2, hidden_size=64, heads=4, mlp_size=96, text_vocabulary=280),
        codebook_KC=torch.randn(CODES, 4),
        captions=CAPTIONS,
        seed=1,
    )
    with torch.no_grad():
        backbone.model.get_output_embeddings().weight.mul_(20)
    return backbone


def requests_of(
    backbone: Backbone, captions: list[str] = CAPTIONS, sampling: Sampling = GUIDED
) -> list[Request]:
    prefixes = [tuple(backbone.condition(caption, GRID)) for caption in captions]
    return [Request(prefix, 10 + i, GRID, sampling) for i, prefix in enumerate(prefixes)]


def painted(backbone: Backbone, requests: list[Request], slots: int = 6) -> Tensor:
    """Codes (N, h, w) in the order of the requests."""
    return torch.stack(Engine(backbone, slots).paint(requests))


def drawn_by(logits_RK: Tensor, uniform_R: Tensor, sampling: Sampling) -> Tensor:
    return sample(logits_RK, uniform_R, RowSampling.of([sampling] * len(logits_RK)))


def sequence(backbone: Backbone, prefix: tuple[int, ...], codes_hw: Tensor) -> list[int]:
    """Prompt and image as training lays them out."""
    image = Image(tuple(codes_hw.flatten().tolist()), *codes_hw.shape)
    return backbone.layout.sample([Text(prefix), image], max_length=backbone.max_length).ids


@torch.no_grad()
def full_logits(backbone: Backbone, prefix: tuple[int, ...], codes_hw: Tensor) -> Tensor:
    """Logits of the codes (P, K), from one full forward over the finished sequence."""
    ids = sequence(backbone, prefix, codes_hw)
    hidden_TD = backbone.last_hidden(torch.tensor([ids]))[0]
    codes = set(backbone.layout.code_ids)
    before = [t for t in range(len(ids) - 1) if ids[t + 1] in codes]
    return backbone.head(hidden_TD[before])[:, list(backbone.layout.code_ids)]


@torch.no_grad()
def naive(backbone: Backbone, request: Request) -> Tensor:
    """Paints one image with a full forward per token and both guidance rows apart: codes (P,)."""
    layout, plan, sampling = backbone.layout, backbone.layout.plan(*GRID), request.sampling
    uniform_P = uniforms([request.seed], GRID[0] * GRID[1])[0]
    rows = [list(request.prefix), list(backbone.null_condition(GRID))]
    drawn = []
    for step, forced in enumerate(plan.forced_S.tolist()):
        token = forced
        if forced < 0:
            guided_K, unguided_K = (
                backbone.head(backbone.last_hidden(torch.tensor([row]))[0, -1:])[0][
                    list(layout.code_ids)
                ]
                for row in rows
            )
            logits_1K = (unguided_K + sampling.cfg * (guided_K - unguided_K))[None]
            drawn.append(int(drawn_by(logits_1K, uniform_P[plan.cell_S[step]][None], sampling)))
            token = layout.code_ids[drawn[-1]]
        for row in rows:
            row.append(token)
    return torch.tensor(drawn)


# ---- cached decoding is the model ----------------------------------------------------------------


@pytest.mark.parametrize(("style", "rep"), STYLES)
def test_cached_decoding_equals_the_full_forward(
    style: Style, rep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny(style, rep)
    requests = requests_of(backbone)
    codes, drawn = logits_of(backbone, requests, 6, monkeypatch)
    null = tuple(backbone.null_condition(GRID))
    for request, codes_hw, drawn_PK in zip(requests, codes, drawn, strict=True):
        guided_PK = full_logits(backbone, request.prefix, codes_hw)
        unguided_PK = full_logits(backbone, null, codes_hw)
        expected_PK = unguided_PK + 3.0 * (guided_PK - unguided_PK)
        assert (drawn_PK - expected_PK).abs().max() < 1e-12 * expected_PK.abs().max()


@pytest.mark.parametrize(("style", "rep"), STYLES)
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(cfg=3.0, temperature=0.0),
        Sampling(cfg=1.0, temperature=0.0),
        Sampling(cfg=2.0, temperature=0.8, top_k=9, top_p=0.9),
    ],
    ids=["greedy", "greedy, no guidance", "sampled"],
)
def test_the_loop_equals_a_naive_one(style: Style, rep: bool, sampling: Sampling) -> None:
    backbone = tiny(style, rep)
    requests = requests_of(backbone, sampling=sampling)
    for codes_hw, request in zip(painted(backbone, requests), requests, strict=True):
        assert torch.equal(codes_hw.flatten(), naive(backbone, request))


def test_guidance_1_equals_no_guidance_and_takes_one_row() -> None:
    backbone, plain = tiny(), Sampling(cfg=1.0)
    requests = requests_of(backbone, sampling=plain)
    engine = Engine(backbone, slots=4)
    for codes_hw, request in zip(engine.paint(requests), requests, strict=True):
        conditional_PK = full_logits(backbone, request.prefix, codes_hw)
        uniform_P = uniforms([request.seed], codes_hw.numel())[0]
        assert torch.equal(codes_hw.flatten(), drawn_by(conditional_PK, uniform_P, plain))
    steps = GRID[0] * GRID[1] - 1
    assert engine.forwards == steps, "four pictures side by side"
    engine.paint(requests_of(backbone))
    assert engine.forwards == 3 * steps, "two and two, with guidance"


def test_guidance_0_ignores_the_prompt() -> None:
    backbone = tiny()
    prefixes = [request.prefix for request in requests_of(backbone)]
    without, guided = (
        painted(backbone, [Request(prefix, 5, GRID, Sampling(cfg=cfg)) for prefix in prefixes])
        for cfg in (0.0, 3.0)
    )
    assert (without == without[0]).all()
    assert not (guided == without).all(), "the prompt should matter"


# ---- the sequence is the one of training ---------------------------------------------------------


@pytest.mark.parametrize(("style", "rep"), STYLES)
def test_what_is_fed_is_the_sequence_of_training(
    style: Style, rep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt, separators, codes and positions, guided and unguided; no forward too many."""
    backbone = tiny(style, rep)
    requests, engine = requests_of(backbone)[:2], Engine(backbone, slots=4)
    with fed(backbone, monkeypatch) as rows:
        codes = engine.paint(requests)
    row_ends = GRID[0] - 1 if style == "lumina" else 0
    assert engine.forwards == GRID[0] * GRID[1] + row_ends - 1
    null = tuple(backbone.null_condition(GRID))
    for picture, (request, codes_hw) in enumerate(zip(requests, codes, strict=True)):
        for row, prefix in ((2 * picture, request.prefix), (2 * picture + 1, null)):
            expected = sequence(backbone, prefix, codes_hw)
            length = len(rows[row])
            assert rows[row] == expected[:length]
            trailing = expected[length:]
            assert trailing[0] == backbone.layout.code_ids[codes_hw.flatten()[-1]]
            assert not set(trailing[1:]) & set(backbone.layout.code_ids)


@pytest.mark.parametrize(("style", "rep"), STYLES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_emitted_code_is_legal(style: Style, rep: bool, temperature: float) -> None:
    """Even where the model prefers other tokens by far."""
    backbone = tiny(style, rep)
    illegal = torch.ones(backbone.vocab_size, dtype=torch.bool)
    illegal[list(backbone.layout.code_ids)] = False
    head = backbone.head
    backbone.head = lambda hidden_ND: head(hidden_ND) + illegal * 1e4
    try:
        sampling = Sampling(cfg=2.0, temperature=temperature)
        codes_Nhw = painted(backbone, requests_of(backbone, sampling=sampling))
    finally:
        backbone.head = head
    assert int(codes_Nhw.min()) >= 0
    assert int(codes_Nhw.max()) < CODES
    plan = backbone.layout.plan(*GRID)
    for codes_hw in codes_Nhw:
        ids = sequence(backbone, (1,), codes_hw)[1:]
        for step, token in enumerate(ids):
            assert token in backbone.layout.legal_ids(step, plan)


def test_a_long_prompt_is_cut_where_training_cuts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny("lumina", max_length=40)
    prefix = tuple(backbone.condition("a red circle left of " * 20, GRID))
    request = Request(prefix, 0, GRID, GUIDED)
    (codes_hw,), (drawn_PK,) = logits_of(backbone, [request], 2, monkeypatch)
    assert len(sequence(backbone, prefix, codes_hw)) == 40
    guided_PK = full_logits(backbone, prefix, codes_hw)
    unguided_PK = full_logits(backbone, tuple(backbone.null_condition(GRID)), codes_hw)
    expected_PK = unguided_PK + 3.0 * (guided_PK - unguided_PK)
    assert (drawn_PK - expected_PK).abs().max() < 1e-12 * expected_PK.abs().max()


def test_null_condition_is_the_same_in_training_and_painting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dropped prompt's row in training starts like the unguided row in painting."""
    import pyarrow as pa

    from arra.data.loader import Loader
    from arra.data.manifest import Manifest, SplitInfo, TokenizerInfo
    from arra.data.shards import Dataset

    backbone = tiny()
    manifest = Manifest(
        splits={"train": SplitInfo(1, [])},
        tokenizer=TokenizerInfo("", "", len(backbone.layout.code_ids), 1),
        features={},
        size=2,
        crop="none",
    )
    side = pa.array([0], pa.int16())
    table = pa.table(
        {
            "id": ["one"],
            "sample": ["one"],
            "text": ["a red circle"],
            "image_index": side,
            "grid_height": pa.array([GRID[0]], pa.int16()),
            "grid_width": pa.array([GRID[1]], pa.int16()),
            "image_ids": pa.array([list(range(GRID[0] * GRID[1]))], pa.list_(pa.int32())),
        }
    )
    dataset = Dataset(Path(), "train", manifest, table)
    loader = Loader(dataset, backbone, batch_size=1, seed=0, prompt_dropout=1.0)
    trained = loader.step(0)[0].batch.ids_BT[0].tolist()
    with fed(backbone, monkeypatch) as rows:
        painted(backbone, requests_of(backbone)[:1], slots=2)
    begin = rows[1].index(backbone.layout.begin) + 1
    unguided = rows[1][:begin]
    assert unguided == trained[: len(unguided)]
    assert trained[len(unguided)] in backbone.layout.code_ids
    assert backbone.condition("", GRID) == backbone.null_condition(GRID)


# ---- a picture is its prompt's and seed's alone --------------------------------------------------


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_picture_does_not_depend_on_its_neighbours(
    cfg: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32, bit for bit: alone, among others, in another order; what is drawn from as well."""
    backbone, slots = tiny32(), 4
    captions = [*CAPTIONS, "six small white stars", "a line", "a red line"]
    requests = requests_of(backbone, captions, Sampling(cfg=cfg))
    codes, drawn = logits_of(backbone, requests, slots, monkeypatch)
    for request, codes_hw, drawn_PK in zip(requests, codes, drawn, strict=True):
        (alone_hw,), (alone_PK,) = logits_of(backbone, [request], slots, monkeypatch)
        assert torch.equal(alone_hw, codes_hw)
        assert torch.equal(alone_PK, drawn_PK)
    order = torch.randperm(len(requests)).tolist()
    shuffled = Engine(backbone, slots).paint([requests[i] for i in order])
    assert all(torch.equal(found, codes[i]) for found, i in zip(shuffled, order, strict=True))


def test_seeds_matter_and_repeat() -> None:
    backbone = tiny32()
    prefix = tuple(backbone.condition("a red circle", GRID))
    codes_Nhw = painted(backbone, [Request(prefix, seed, GRID, GUIDED) for seed in (1, 2, 1)])
    assert torch.equal(codes_Nhw[0], codes_Nhw[2])
    assert not torch.equal(codes_Nhw[0], codes_Nhw[1])


def test_painting_leaves_no_trace() -> None:
    """Neither in the training mode, nor in the attention used, nor in torch's own randomness."""
    backbone = tiny32()
    backbone.model.train()
    before = torch.get_rng_state()
    painted(backbone, requests_of(backbone)[:1])
    assert backbone.model.training
    assert torch.equal(before, torch.get_rng_state())
    assert backbone.model.config._attn_implementation == "sdpa"
    backbone.model.eval()
