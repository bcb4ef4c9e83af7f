"""Painting: the cached loop equals full forwards, and a picture is its prompt's and seed's alone.

Legend: N images, B rows, T tokens, D width, V vocabulary, K codes, P cells, h and w codes per side.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arra.config import ModelConfig
from arra.generate import engine
from arra.generate.engine import Request, paint
from arra.generate.sampling import sample, uniforms
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


def requests_of(backbone: Backbone, captions: list[str] = CAPTIONS) -> list[Request]:
    return [Request(tuple(backbone.condition(c, GRID)), 10 + i) for i, c in enumerate(captions)]


def painted(
    backbone: Backbone,
    requests: list[Request],
    sampling: Sampling = GUIDED,
    slots: int = 3,
    grid: tuple[int, int] = GRID,
) -> Tensor:
    """Codes (N, h, w) in the order of the requests."""
    codes_Nhw = torch.full((len(requests), *grid), -1)
    for batch in paint(backbone, requests, grid, sampling, slots):
        codes_Nhw[batch.indices] = batch.codes_Nhw
    return codes_Nhw


@contextmanager
def logits_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What the engine samples from, step by step, (N, K) each, guidance applied."""
    seen: list[Tensor] = []

    def spy(logits_NK: Tensor, uniform_N: Tensor, sampling: Sampling) -> Tensor:
        seen.append(logits_NK.clone())
        return sample(logits_NK, uniform_N, sampling)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "sample", spy)
        yield seen


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
def naive(backbone: Backbone, request: Request, sampling: Sampling) -> Tensor:
    """Paints one image with a full forward per token and both guidance rows apart: codes (P,)."""
    layout, plan = backbone.layout, backbone.layout.plan(*GRID)
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
            drawn.append(int(sample(logits_1K, uniform_P[plan.cell_S[step]][None], sampling)))
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
    requests = requests_of(backbone)[:3]
    with logits_seen(monkeypatch) as seen:
        codes_Nhw = painted(backbone, requests)
    assert len(seen) == GRID[0] * GRID[1], "the three prompts share one batch"
    for row, request in enumerate(requests):
        guided_PK = full_logits(backbone, request.prefix, codes_Nhw[row])
        null = tuple(backbone.null_condition(GRID))
        unguided_PK = full_logits(backbone, null, codes_Nhw[row])
        expected_PK = unguided_PK + 3.0 * (guided_PK - unguided_PK)
        found_PK = torch.stack(seen)[:, row]
        assert (found_PK - expected_PK).abs().max() < 1e-12 * expected_PK.abs().max()


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
    requests = requests_of(backbone)
    found_Nhw = painted(backbone, requests, sampling)
    for codes_hw, request in zip(found_Nhw, requests, strict=True):
        assert torch.equal(codes_hw.flatten(), naive(backbone, request, sampling))


def test_guidance_1_equals_no_guidance_and_computes_no_unguided_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone, rows = tiny(), []
    step = backbone.step

    def counting(
        ids_BT: Tensor, positions_BT: Tensor, mask_BC: Tensor, cache: object, text: None = None
    ) -> Tensor:
        rows.append(len(ids_BT))
        return step(ids_BT, positions_BT, mask_BC, cache)

    monkeypatch.setattr(backbone, "step", counting)
    requests = requests_of(backbone)
    plain = Sampling(cfg=1.0)
    found_Nhw = painted(backbone, requests, plain, slots=4)
    assert set(rows) == {4}
    for codes_hw, request in zip(found_Nhw, requests, strict=True):
        conditional_PK = full_logits(backbone, request.prefix, codes_hw)
        uniform_P = uniforms([request.seed], codes_hw.numel())[0]
        assert torch.equal(codes_hw.flatten(), sample(conditional_PK, uniform_P, plain))
    rows.clear()
    painted(backbone, requests, Sampling(cfg=1.5), slots=4)
    assert set(rows) == {8}


def test_guidance_0_ignores_the_prompt() -> None:
    backbone = tiny()
    requests = [Request(r.prefix, 5) for r in requests_of(backbone)]
    codes_Nhw = painted(backbone, requests, Sampling(cfg=0.0))
    assert (codes_Nhw == codes_Nhw[0]).all()
    assert not (painted(backbone, requests) == codes_Nhw).all(), "the prompt should matter"


# ---- the sequence is the one of training ---------------------------------------------------------


@pytest.mark.parametrize(("style", "rep"), STYLES)
def test_what_is_fed_is_the_sequence_of_training(
    style: Style, rep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt, separators, codes and positions, guided and unguided; no forward too many."""
    backbone = tiny(style, rep)
    step = backbone.step
    fed: list[tuple[Tensor, Tensor, Tensor]] = []

    def recording(
        ids_BT: Tensor, positions_BT: Tensor, mask_BC: Tensor, cache: object, text: None = None
    ) -> Tensor:
        columns = slice(sum(ids.shape[1] for ids, _, _ in fed), None)
        real_BT = mask_BC[:, columns][:, : ids_BT.shape[1]]
        assert not mask_BC[:, columns][:, ids_BT.shape[1] :].any(), "the future is masked"
        fed.append((ids_BT, positions_BT, real_BT.clone()))
        return step(ids_BT, positions_BT, mask_BC, cache)

    monkeypatch.setattr(backbone, "step", recording)
    requests = requests_of(backbone)[:2]
    codes_Nhw = painted(backbone, requests)
    row_ends = GRID[0] - 1 if style == "lumina" else 0
    assert len(fed) == GRID[0] * GRID[1] + row_ends
    ids_BT, positions_BT, real_BT = (torch.cat(parts, 1) for parts in zip(*fed, strict=True))
    null = tuple(backbone.null_condition(GRID))
    prefixes = {0: requests[0].prefix, 1: requests[1].prefix, 3: null, 4: null}
    for row, prefix in prefixes.items():
        expected = sequence(backbone, prefix, codes_Nhw[row % 3])
        length = int(real_BT[row].sum())
        assert ids_BT[row][real_BT[row]].tolist() == expected[:length]
        assert positions_BT[row][real_BT[row]].tolist() == list(range(length))
        trailing = expected[length:]
        assert trailing[0] == backbone.layout.code_ids[codes_Nhw[row % 3].flatten()[-1]]
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
        codes_Nhw = painted(
            backbone, requests_of(backbone), Sampling(cfg=2.0, temperature=temperature)
        )
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
    request = Request(tuple(backbone.condition("a red circle left of " * 20, GRID)), 0)
    with logits_seen(monkeypatch) as seen:
        codes_1hw = painted(backbone, [request], slots=1)
    assert len(sequence(backbone, request.prefix, codes_1hw[0])) == 40
    guided_PK = full_logits(backbone, request.prefix, codes_1hw[0])
    unguided_PK = full_logits(backbone, tuple(backbone.null_condition(GRID)), codes_1hw[0])
    expected_PK = unguided_PK + 3.0 * (guided_PK - unguided_PK)
    found_PK = torch.cat(seen)
    assert (found_PK - expected_PK).abs().max() < 1e-12 * expected_PK.abs().max()


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
    first: list[Tensor] = []
    step = backbone.step

    def recording(
        ids_BT: Tensor, positions_BT: Tensor, mask_BC: Tensor, cache: object, text: None = None
    ) -> Tensor:
        if not first:
            first.append(ids_BT[1][mask_BC[1, : ids_BT.shape[1]]])
        return step(ids_BT, positions_BT, mask_BC, cache)

    monkeypatch.setattr(backbone, "step", recording)
    painted(backbone, requests_of(backbone)[:1], slots=1)
    unguided = first[0].tolist()
    assert unguided == trained[: len(unguided)]
    assert trained[len(unguided)] in backbone.layout.code_ids
    assert backbone.condition("", GRID) == backbone.null_condition(GRID)


# ---- a picture is its prompt's and seed's alone --------------------------------------------------


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_picture_does_not_depend_on_its_neighbours(
    cfg: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32, bit for bit: alone, among others, in another order; what is drawn from as well."""
    backbone, sampling, slots = tiny32(), Sampling(cfg=cfg), 4
    requests = requests_of(backbone, [*CAPTIONS, "six small white stars", "a line", "a red line"])
    with logits_seen(monkeypatch) as seen:
        together_Nhw = painted(backbone, requests, sampling, slots)
        batches = torch.stack(seen).unflatten(0, (-1, GRID[0] * GRID[1])).transpose(1, 2)
    known = {tuple(logits.flatten().tolist()) for batch in batches for logits in batch}
    for index, request in enumerate(requests):
        with logits_seen(monkeypatch) as seen:
            alone_1hw = painted(backbone, [request], sampling, slots)
        assert torch.equal(alone_1hw[0], together_Nhw[index])
        assert tuple(torch.stack(seen)[:, 0].flatten().tolist()) in known
    order = torch.randperm(len(requests)).tolist()
    shuffled_Nhw = painted(backbone, [requests[i] for i in order], sampling, slots)
    assert torch.equal(shuffled_Nhw, together_Nhw[order])


def test_seeds_matter_and_repeat() -> None:
    backbone = tiny32()
    prefix = tuple(backbone.condition("a red circle", GRID))
    codes_Nhw = painted(backbone, [Request(prefix, seed) for seed in (1, 2, 1)])
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
