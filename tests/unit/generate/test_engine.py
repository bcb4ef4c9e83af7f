"""The loop on other architectures, its fixed shapes, and what it refuses.

Legend: N images, T tokens, D width, K codes, P cells, h and w codes per side.
"""

import warnings
from collections import Counter

import pytest
import torch
from grown_painter import GRID, grown
from painted_logits import logits_of
from torch import Tensor

from arra.generate.engine import Engine
from arra.generate.lane import PREFILL_ROWS, PROMPT_STEP
from arra.generate.request import Painted, Request, RowsPainted
from arra.generate.settings import Sampling
from arra.layout import Image, Text
from arra.models.base import Backbone


def off_by(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> float:
    """Largest relative difference between painting's logits and full forwards."""
    asked = [tuple(backbone.condition(c, GRID)) for c in ("a circle", "hello world", "a")]
    asked.append((1, *range(3, 40)))  # in a wider cache
    requests = [Request(prefix, 3 + i, GRID, Sampling(cfg=2.0)) for i, prefix in enumerate(asked)]
    null = tuple(backbone.null_condition(GRID))
    codes, drawn = logits_of(backbone, requests, 4, monkeypatch)
    worst = 0.0
    for prefix, codes_hw, drawn_PK in zip(asked, codes, drawn, strict=True):
        guided_PK, unguided_PK = (full(backbone, each, codes_hw) for each in (prefix, null))
        expected_PK = unguided_PK + 2.0 * (guided_PK - unguided_PK)
        difference = (drawn_PK - expected_PK).abs().max() / expected_PK.abs().max()
        worst = max(worst, float(difference))
    return worst


@torch.no_grad()
def full(backbone: Backbone, prefix: tuple[int, ...], codes_hw: Tensor) -> Tensor:
    image = Image(tuple(codes_hw.flatten().tolist()), *codes_hw.shape)
    ids = backbone.layout.sample([Text(prefix), image]).ids
    codes = set(backbone.layout.code_ids)
    before = [t for t in range(len(ids) - 1) if ids[t + 1] in codes]
    hidden_TD = backbone.last_hidden(torch.tensor([ids]))[0]
    return backbone.head(hidden_TD[before])[:, list(backbone.layout.code_ids)]


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        ("llama", {}),  # key and value heads shared
        ("gpt2", {}),  # learned positions
        ("phi", {}),  # half-rotary, a bias on the head
        ("mistral", {"sliding_window": 10}),  # a window shorter than the sequence
        ("gemma2", {"head_dim": 16, "sliding_window": 10, "final_logit_softcapping": 5.0}),
        ("qwen3", {"head_dim": 16, "tie_word_embeddings": False}),  # norms of queries and keys
    ],
)
def test_other_architectures_paint_what_they_predict(
    architecture: str, extra: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert off_by(grown(architecture, **extra), monkeypatch) < 1e-5


def test_plain_attention_is_exact_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding on a CPU uses it; GPT-2's keeps float64 throughout."""
    backbone = grown("gpt2")
    backbone.model.double()
    backbone.model.set_attn_implementation("eager")
    assert off_by(backbone, monkeypatch) < 1e-12


def request(prompt: int, seed: int = 0, cfg: float = 3.0, grid: tuple[int, int] = GRID) -> Request:
    return Request((1,) * prompt, seed, grid, Sampling(cfg=cfg))


def test_shapes_follow_from_slots_and_the_own_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = grown("llama")
    steps, prefills = Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
    step, prefill = backbone.step, backbone.prefill

    def stepping(ids_BT: Tensor, *rest: object) -> Tensor:
        steps[tuple(ids_BT.shape)] += 1
        return step(ids_BT, *rest)

    def beginning(ids_BT: Tensor, *rest: object) -> Tensor:
        prefills[tuple(ids_BT.shape)] += 1
        return prefill(ids_BT, *rest)

    monkeypatch.setattr(backbone, "step", stepping)
    monkeypatch.setattr(backbone, "prefill", beginning)
    lengths = [1, 10, 14, 29, 10, 2, 14]  # of the prompt; begin and two sizes come with it
    engine = Engine(backbone, slots=10)
    engine.paint([request(n, i) for i, n in enumerate(lengths)])
    assert set(steps) == {(10, 1)}
    # For the first five pictures, three rows with their prompts and five without in 16 columns, two
    # with in 32; then for two pictures.
    assert prefills == {(PREFILL_ROWS, PROMPT_STEP): 1 + 1, (PREFILL_ROWS, 2 * PROMPT_STEP): 1 + 1}
    # The last row's end and the image's end are known and change nothing: they are not computed,
    # and neither is what follows from the last code.
    assert engine.forwards == sum(steps.values()) == 2 * (GRID[0] * (GRID[1] + 1) - 2)


def test_a_used_cache_changes_nothing() -> None:
    """A picture where another one was equals one in a fresh cache, bit for bit."""
    backbone, requests = grown("llama"), [request(3, 1), request(2, 2)]
    engine = Engine(backbone, slots=2)
    both = engine.paint(requests)
    assert torch.equal(both[1], Engine(backbone, slots=2).paint(requests[1:])[0])
    assert torch.equal(engine.paint(requests)[0], both[0])


def test_pictures_of_many_kinds_side_by_side() -> None:
    """Sizes, guidance, filters and moments of their own; each as it is alone, bit for bit."""
    backbone = grown("llama")
    kinds = [
        Sampling(cfg=3.0),
        Sampling(cfg=1.0, top_k=3),
        Sampling(cfg=2.0, temperature=0.0),
        Sampling(cfg=0.0, top_p=0.6),
        Sampling(cfg=4.0, cfg_interval=(0.3, 0.7)),
    ]
    grids = [(3, 3), (2, 4), (1, 2)]
    requests = [Request((1,) * (1 + 7 * i % 20), i, grids[i % 3], kinds[i % 5]) for i in range(20)]
    engine = Engine(backbone, slots=6)
    together: dict[int, Tensor] = {}
    waiting = list(requests)
    for _ in range(2):
        engine.submit(waiting.pop(0))
    for events in engine.events():
        for event in events:
            assert isinstance(event, Painted)
            together[event.ticket] = event.codes_hw
        for one in waiting[:2]:
            engine.submit(one)
        del waiting[:2]
    assert sorted(together) == list(range(20))
    for ticket, one in enumerate(requests):
        (alone,) = Engine(backbone, slots=6).paint([one])
        assert alone.shape == one.grid
        assert torch.equal(alone, together[ticket])


def test_guidance_only_in_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = grown("llama")
    null, prefix = tuple(backbone.null_condition(GRID)), (1, 5, 9)
    sampling = Sampling(cfg=3.0, cfg_interval=(1 / 3, 2 / 3))
    one = Request(prefix, 0, GRID, sampling)
    (codes_hw,), (drawn_PK,) = logits_of(backbone, [one], 2, monkeypatch)
    guided_PK, unguided_PK = (full(backbone, each, codes_hw) for each in (prefix, null))
    scale_P1 = torch.tensor([1.0] * 3 + [3.0] * 3 + [1.0] * 3)[:, None]
    expected_PK = unguided_PK + scale_P1 * (guided_PK - unguided_PK)
    assert (drawn_PK - expected_PK).abs().max() < 1e-5 * expected_PK.abs().max()


def test_rows_are_told_as_they_are_painted() -> None:
    backbone = grown("llama")
    streamed = Request((1,), 0, GRID, Sampling(cfg=2.0), streamed=True)
    engine = Engine(backbone, slots=4)
    engine.submit(streamed)
    engine.submit(request(2))
    told = [event for events in engine.events() for event in events]
    rows = [event.codes_hw for event in told if isinstance(event, RowsPainted)]
    (whole,) = [e.codes_hw for e in told if isinstance(e, Painted) and e.ticket == 0]
    assert [len(codes) for codes in rows] == [1, 2]
    assert all(torch.equal(codes, whole[: len(codes)]) for codes in rows)


def test_a_cancelled_request_frees_its_rows_at_once() -> None:
    backbone = grown("llama")
    engine = Engine(backbone, slots=2)
    streamed = Request((1,), 0, GRID, Sampling(cfg=2.0), streamed=True)
    first, second, third = (
        engine.submit(streamed),
        engine.submit(request(2)),
        engine.submit(request(3)),
    )
    events = engine.events()
    next(events)  # one row of the first is there
    before = engine.forwards
    assert engine.cancel(first)
    assert engine.cancel(third), "one that waits can be cancelled too"
    assert not engine.cancel(first)
    [[painted]] = list(events)
    assert isinstance(painted, Painted)
    assert painted.ticket == second
    assert engine.forwards - before == GRID[0] * (GRID[1] + 1) - 2, (
        "the second began in the next step"
    )
    assert torch.equal(painted.codes_hw, Engine(backbone, slots=2).paint([request(2)])[0])
    assert not engine.cancel(second)


@pytest.mark.parametrize("words", ["", "DefaultCPUAllocator: can't allocate memory"])
def test_where_memory_runs_out_fewer_are_painted_at_a_time(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = grown("llama")
    requests = [request(2 + i, i) for i in range(5)]
    step, most = backbone.step, [4]

    def short(ids_BT: Tensor, *rest: object) -> Tensor:
        if len(ids_BT) > most[0]:
            raise RuntimeError(words) if words else torch.OutOfMemoryError("CUDA out of memory")
        return step(ids_BT, *rest)

    monkeypatch.setattr(backbone, "step", short)
    engine = Engine(backbone, slots=16)
    with pytest.warns(UserWarning, match="memory ran out: painting goes on with --slots 4"):
        codes = engine.paint(requests)
    assert engine.slots == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = Engine(backbone, slots=4).paint(requests)
    assert all(map(torch.equal, codes, expected))
    most[0] = 1
    with (
        pytest.warns(UserWarning, match="memory ran out"),
        pytest.raises(ValueError, match="memory does not suffice to paint one picture"),
    ):
        Engine(backbone, slots=4).paint(requests)


def test_other_mistakes_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = grown("llama")

    def broken(*_: object) -> Tensor:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(backbone, "step", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        Engine(backbone, slots=2).paint([request(1)])


def test_nothing_to_paint() -> None:
    assert Engine(grown("llama"), slots=2).paint([]) == []


def test_what_cannot_be_painted_is_refused() -> None:
    backbone = grown("llama")
    # 9 x 9 codes, 9 row ends, begin, end and two sizes leave 2 of 96 tokens
    assert Engine(backbone, 2).paint([request(1, grid=(9, 9))])[0].shape == (9, 9)
    with pytest.raises(ValueError, match=r"needs 104 tokens besides the prompt.* takes 96 in all"):
        Engine(backbone, 2).submit(request(1, grid=(10, 9)))
    with pytest.raises(
        ValueError, match=r"the prompt has 3 tokens, but beside the image .* takes 2"
    ):
        Engine(backbone, 2).submit(request(3, grid=(9, 9)))
    with pytest.raises(ValueError, match="--slots must be at least 1"):
        Engine(backbone, 0)
    with pytest.raises(ValueError, match="takes two rows of a forward pass, but --slots is 1"):
        Engine(backbone, 1).submit(request(1))
    assert Engine(backbone, 1).paint([request(1, cfg=1.0)])[0].shape == GRID


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_weights_are_named(temperature: float) -> None:
    backbone = grown("llama")
    with torch.no_grad():
        backbone.blocks[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        Engine(backbone, 2).paint([Request((1,), 0, GRID, Sampling(3.0, temperature))])
