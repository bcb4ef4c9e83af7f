"""Painting several codes per forward pass, through the engine: greedy pictures are the plain ones
in every family, drawn ones are as likely as the model says, and none depends on its neighbours.

Legend: N pictures, S steps, X possible pictures, T tokens, K codes, n tokens of a caption, F width
of its features, h and w codes per side.
"""

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_chameleon import publish
from tiny_painters import emu3_special_tokens, emu3_tokenizer, publish_emu3, publish_janus
from torch import Tensor

from arra.config import ModelConfig
from arra.generate import lane
from arra.generate.engine import Engine
from arra.generate.request import Painted, Request, RowsPainted
from arra.generate.sampling import RowSampling, code_probabilities, guide
from arra.generate.settings import Sampling, Speculation
from arra.layout import Image, Style, Text
from arra.models import load_model
from arra.models.base import Backbone
from arra.models.loading import load_for_training

WIDTH, GRID = 8, (4, 4)
CAPTIONS = ["a red line", "two squares", "", "a large green triangle " * 3]
PUBLISHED: dict[str, Callable[[Path], Path]] = {
    "chameleon as published": publish,
    "janus": publish_janus,
    "emu3": lambda folder: publish_emu3(folder, emu3_tokenizer(emu3_special_tokens())),
}
FRESH = ["grid", "chameleon", "lumina", "classes", "features"]


@cache
def fresh(kind: str, codes: int = 16, grid: tuple[int, int] = GRID) -> Backbone:
    """A fresh painter whose choices matter: a grown language model's style, or LlamaGen."""
    torch.manual_seed(0)
    style: Style = kind if kind in ("grid", "lumina") else "chameleon"  # type: ignore[assignment]
    backbone = load_for_training(
        None,
        ModelConfig(
            layers=2, hidden_size=32, heads=2, mlp_size=64, text_vocabulary=280, layout=style
        ),
        codebook_KC=torch.randn(codes, 4),
        captions=CAPTIONS,
        seed=0,
        grid=grid,
        class_names=["0", "1", "2"] if kind == "classes" else (),
        text_width=WIDTH if kind == "features" else 0,
        text_slots=5,
    )
    with torch.no_grad():
        backbone.output_table.weight.normal_(0, 0.3)
    backbone.model.eval()
    return backbone


def requests_of(
    backbone: Backbone, sampling: Sampling, grid: tuple[int, int] = GRID
) -> list[Request]:
    """One for each caption, class or set of features."""
    found = []
    for number, caption in enumerate(CAPTIONS):
        said, text_nF = caption, None
        if backbone.text_slots:
            said = "" if not caption else "x"
            text_nF = torch.randn(
                number + 1, WIDTH, generator=torch.Generator().manual_seed(number)
            )
        elif backbone.text_tokenizer is None:
            said = str(number) if number < 3 else ""
        prefix = tuple(backbone.condition(said, grid))
        found.append(Request(prefix, 10 + number, grid, sampling, text_nF))
    return found


def paint(
    backbone: Backbone, requests: list[Request], speculation: Speculation, slots: int = 5
) -> list[Tensor]:
    return Engine(backbone, slots, speculation=speculation).paint(requests)


# ---- greedy pictures -----------------------------------------------------------------------------


def check_greedy(backbone: Backbone, grid: tuple[int, int]) -> None:
    backbone.model.double()
    for cfg, interval in ((1.0, (0.0, 1.0)), (3.0, (0.0, 1.0)), (3.0, (0.3, 0.8))):
        sampling = Sampling(cfg=cfg, temperature=0.0, cfg_interval=interval)
        requests = requests_of(backbone, sampling, grid)
        plain = Engine(backbone, 5).paint(requests)
        for speculation in (
            Speculation("sjd", 3),
            Speculation("scd", 6, adaptive=True),
            Speculation("tree", 11),
        ):
            for expected_hw, found_hw in zip(
                plain, paint(backbone, requests, speculation), strict=True
            ):
                assert torch.equal(expected_hw, found_hw)
        assert len({tuple(codes_hw.flatten().tolist()) for codes_hw in plain}) > 1


@pytest.mark.parametrize("kind", FRESH)
def test_greedy_pictures_are_those_of_plain_painting(kind: str) -> None:
    backbone = fresh(kind)
    check_greedy(backbone, GRID)
    backbone.model.float()


@pytest.mark.parametrize("kind", PUBLISHED)
def test_greedy_pictures_of_published_families(kind: str, tmp_path: Path) -> None:
    check_greedy(load_model(PUBLISHED[kind](tmp_path / "model")), (3, 3))


# ---- drawn pictures ------------------------------------------------------------------------------


def law(backbone: Backbone, request: Request) -> tuple[Tensor, Tensor]:
    """All pictures (X, P), and how likely each is by full forward passes over each."""
    codes, cells = len(backbone.layout.code_ids), request.grid[0] * request.grid[1]
    codes_XP = torch.tensor(list(itertools.product(range(codes), repeat=cells)))
    both = []
    unguided = tuple(backbone.without_prompt(request.prefix, request.grid))
    for prefix in (request.prefix, unguided):
        ids = [
            backbone.layout.sample([Text(prefix), Image(tuple(each), *request.grid)]).ids
            for each in codes_XP.tolist()
        ]
        image = set(backbone.layout.code_ids)
        before = [t for t in range(len(ids[0]) - 1) if ids[0][t + 1] in image]
        hidden_XTD = backbone.last_hidden(torch.tensor(ids))[:, before]
        logits_XPV = backbone.head(hidden_XTD.flatten(0, 1)).unflatten(0, (-1, cells))
        both.append(logits_XPV[..., list(backbone.layout.code_ids)])
    logits_YK = guide(*both, request.sampling.cfg).flatten(0, 1)
    rows = RowSampling.of([request.sampling] * len(logits_YK))
    weights_YK = code_probabilities(logits_YK, rows).double()
    p_XPK = (weights_YK / weights_YK.sum(-1, keepdim=True)).unflatten(0, (-1, cells))
    return codes_XP, p_XPK.gather(2, codes_XP[..., None])[..., 0].prod(1)


def p_value(found_X: Tensor, expected_X: Tensor) -> float:
    """Of a chi-square test; what is expected fewer than 5 times counts as one."""
    rare_X = expected_X < 5
    found = torch.cat([found_X[~rare_X], found_X[rare_X].sum()[None]])
    expected = torch.cat([expected_X[~rare_X], expected_X[rare_X].sum()[None]])
    found, expected = found[expected > 0], expected[expected > 0]
    statistic = ((found - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


@torch.no_grad()
def check_law(sampling: Sampling, speculation: Speculation, n: int) -> None:
    """Over n pictures of 2 x 2 codes of 3 kinds, of one prompt."""
    backbone, grid = fresh("lumina", codes=3, grid=(2, 2)), (2, 2)
    prefix = tuple(backbone.condition("a red line", grid))
    asked = [Request(prefix, seed, grid, sampling) for seed in range(n)]
    codes_XP, chance_X = law(backbone, asked[0])
    powers_P = 3 ** torch.arange(4)
    slots = min(n, 1024) * asked[0].rows
    painted_NP = torch.stack(paint(backbone, asked, speculation, slots)).flatten(1)
    counts = torch.bincount((painted_NP * powers_P).sum(1), minlength=len(codes_XP))
    found_X = counts[(codes_XP * powers_P).sum(1)].double()
    assert p_value(found_X, chance_X * n) > 1e-3
    another = Request(prefix, 0, grid, Sampling(cfg=sampling.cfg + 1))
    assert p_value(found_X, law(backbone, another)[1] * n) < 1e-6, "the test can fail"


DRAWN = [
    (Sampling(cfg=1.0), Speculation("sjd", 3)),
    (Sampling(cfg=2.0), Speculation("scd", 4)),
    (Sampling(cfg=2.0), Speculation("tree", 7)),
    (Sampling(cfg=2.0, top_k=2), Speculation("sjd", 4, adaptive=True)),
    (Sampling(cfg=2.0, top_p=0.9), Speculation("scd", 6, adaptive=True)),
    (Sampling(cfg=2.0, top_k=2), Speculation("tree", 12)),
]


@pytest.mark.parametrize(("sampling", "speculation"), DRAWN[:3])
def test_pictures_are_as_likely_as_the_model_says(
    sampling: Sampling, speculation: Speculation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "PREFILL_ROWS", 256)  # so many begin at once
    check_law(sampling, speculation, 2_000)


@pytest.mark.long
@pytest.mark.parametrize(("sampling", "speculation"), DRAWN)
def test_a_hundred_thousand_pictures_are(
    sampling: Sampling, speculation: Speculation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "PREFILL_ROWS", 256)
    check_law(sampling, speculation, 100_000)


# ---- who else is being painted -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lumina", "classes"])
@pytest.mark.parametrize(
    "speculation",
    [Speculation("sjd", 4), Speculation("scd", 8, adaptive=True), Speculation("tree", 16)],
    ids=["sjd", "scd", "tree"],
)
def test_a_picture_does_not_depend_on_its_neighbours(kind: str, speculation: Speculation) -> None:
    """float32, bit for bit: alone, among others of all settings, one of them cancelled."""
    backbone = fresh(kind)
    requests = [
        request
        for sampling in (
            Sampling(cfg=3.0, temperature=0.7),
            Sampling(cfg=1.0),
            Sampling(cfg=1.5, top_k=3, top_p=0.9),
        )
        for request in requests_of(backbone, sampling)
    ]
    engine = Engine(backbone, 5, speculation=speculation)
    number_of = {engine.submit(request): number for number, request in enumerate(requests)}
    cancelled = engine.submit(requests[0])
    together: dict[int, Painted] = {}
    for events in engine.events():
        engine.cancel(cancelled)
        for event in events:
            assert isinstance(event, Painted)
            together[number_of[event.ticket]] = event
    assert sorted(together) == list(range(len(requests)))
    for number in (0, 3, 5, 8, 11):
        alone = Engine(backbone, 5, speculation=speculation)
        alone.submit(requests[number])
        [[event]] = list(alone.events())
        assert isinstance(event, Painted)
        assert torch.equal(event.codes_hw, together[number].codes_hw)
        assert (event.forwards, event.kept) == (together[number].forwards, together[number].kept)
        assert event.forwards == alone.forwards
        assert event.kept + event.forwards >= len(event.codes_hw.flatten()) - 1


@pytest.mark.parametrize("speculation", [Speculation("scd", 8), Speculation("tree", 24)])
def test_rows_of_a_streamed_picture_are_told_as_they_are_final(speculation: Speculation) -> None:
    backbone = fresh("lumina")
    [request, *_] = requests_of(backbone, Sampling(cfg=3.0, temperature=0.5))
    streamed = Request(request.prefix, 3, GRID, request.sampling, streamed=True)
    engine = Engine(backbone, 4, speculation=speculation)
    engine.submit(streamed)
    *parts, last = [event for events in engine.events() for event in events]
    assert isinstance(last, Painted)
    assert last.forwards < last.codes_hw.numel() - 1, "some drafts stayed"
    heights = [len(part.codes_hw) for part in parts]
    assert heights == sorted(set(heights))
    for part in parts:
        assert isinstance(part, RowsPainted)
        assert torch.equal(part.codes_hw, last.codes_hw[: len(part.codes_hw)])


def test_a_model_that_diverged_is_named() -> None:
    backbone = fresh("grid", codes=5)
    with torch.no_grad():
        backbone.output_table.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        paint(backbone, requests_of(backbone, Sampling(cfg=1.0)), Speculation("sjd", 4))


@pytest.mark.parametrize("kind", FRESH)
def test_the_size_of_the_tree_changes_no_picture(kind: str) -> None:
    backbone = fresh(kind)
    backbone.model.double()
    requests = requests_of(backbone, Sampling(cfg=3.0, temperature=0.8, top_p=0.95))
    chain = paint(backbone, requests, Speculation("tree", 2))
    for nodes in (12, 40):
        for expected_hw, found_hw in zip(
            chain, paint(backbone, requests, Speculation("tree", nodes)), strict=True
        ):
            assert torch.equal(expected_hw, found_hw)
    backbone.model.float()


def test_a_tree_has_one_size() -> None:
    with pytest.raises(ValueError, match="--adaptive-window is for sjd and scd"):
        Speculation("tree", adaptive=True)


def test_a_window_has_two_codes_at_least() -> None:
    with pytest.raises(ValueError, match="--window must be at least 2, got 1"):
        Speculation("sjd", 1)
