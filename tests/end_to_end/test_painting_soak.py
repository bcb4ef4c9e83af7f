"""Continuous batching under mixed load: pictures join and leave, are cancelled and streamed, and
each is the one that is painted alone, to the last bit, and so are the logits it was drawn from.

Legend: K codes, n tokens of a caption, F width of its features, h and w codes per side.
"""

import random
from functools import cache

import pytest
import torch
from painted_logits import recorded
from torch import Tensor

from arra.config import ModelConfig
from arra.generate.engine import Engine
from arra.generate.request import Painted, Request, Steps
from arra.generate.settings import Sampling
from arra.models.base import Backbone
from arra.models.folders import cast_weights
from arra.models.loading import load_for_training

CODES, WIDTH, SLOTS = 16, 8, 6
CAPTIONS = ["a red line", "two squares", "", "a large green triangle " * 3, "a blue dot " * 8]
FAMILIES = ("captions", "classes", "features")
GRIDS = {"captions": [(2, 4), (3, 3), (4, 2), (8, 7)], "classes": [(4, 4)], "features": [(4, 4)]}
"""Of captions, the last fills more columns than the others, with a long caption also the first."""


@cache
def painter(family: str, dtype: torch.dtype = torch.float32) -> Backbone:
    """With logits in which every bit matters. In float32 rounding depends on shapes; in bfloat16 a
    CPU may have products of our own."""
    torch.manual_seed(0)
    sizes = {"layers": 2, "hidden_size": 64, "heads": 4, "mlp_size": 96}
    words = family == "captions"
    backbone = load_for_training(
        None,
        ModelConfig(**sizes, text_vocabulary=280, layout="lumina" if words else "chameleon"),
        codebook_KC=torch.randn(CODES, 4),
        captions=CAPTIONS,
        seed=1,
        grid=(4, 4),
        class_names=["0", "1", "2"] if family == "classes" else (),
        text_width=WIDTH if family == "features" else 0,
        text_slots=5,
    )
    with torch.no_grad():
        backbone.output_table.weight.normal_(0, 0.5)
    cast_weights(backbone.model, dtype)
    backbone.model.eval()
    return backbone


def any_request(family: str, chance: random.Random) -> Request:
    """A prompt, a seed, a grid and settings by chance, also of the rarer kinds."""
    backbone, grid = painter(family), chance.choice(GRIDS[family])
    sampling = Sampling(
        cfg=chance.choice([0.0, 1.0, 1.0, 1.5, 3.0, 7.5]),
        temperature=chance.choice([0.0, 0.7, 1.0, 1.0, 1.3]),
        top_k=chance.choice([0, 0, 0, 1, 5]),
        top_p=chance.choice([1.0, 1.0, 1.0, 0.5, 0.9]),
        cfg_interval=chance.choice([(0.0, 1.0), (0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (0.9, 1.0)]),
    )
    prompt, text_nF = chance.choice(CAPTIONS), None
    if family == "classes":
        prompt = chance.choice(["", "0", "1", "2"])
    elif family == "features":
        prompt, tokens = "", chance.randint(0, 7)  # one more than there are slots is cut
        drawn = torch.Generator().manual_seed(chance.randrange(2**32))
        text_nF = torch.randn(tokens, WIDTH, generator=drawn) if tokens else None
    prefix = tuple(backbone.condition(prompt, grid))
    streamed = chance.random() < 0.3
    return Request(prefix, chance.randrange(2**63), grid, sampling, text_nF, streamed)


def soak(
    family: str,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype = torch.float32,
) -> None:
    chance = random.Random(family)
    engine = Engine(painter(family, dtype), SLOTS)
    requests: dict[int, Request] = {}
    painted: dict[int, Tensor] = {}
    cancelled: set[int] = set()

    def some_join() -> None:
        for _ in range(min(chance.choice([0, 0, 1, 2, 5]), count - len(requests))):
            request = any_request(family, chance)
            requests[engine.submit(request)] = request

    def one_leaves() -> None:
        ticket = chance.choice(list(requests))
        there = ticket not in painted and ticket not in cancelled
        assert engine.cancel(ticket) == there
        if there:
            cancelled.add(ticket)

    with recorded(monkeypatch) as logits_of:
        while len(requests) < count or engine.busy:
            some_join()
            for events in engine.events():
                for event in events:
                    assert event.ticket not in cancelled | painted.keys()
                    assert isinstance(event, Painted) or requests[event.ticket].streamed
                    if isinstance(event, Painted):
                        painted[event.ticket] = event.codes_hw
                some_join()
                if chance.random() < 0.08:
                    one_leaves()
    assert painted.keys() | cancelled == requests.keys()
    assert 0 < len(cancelled) < count / 2
    for ticket, codes_hw in painted.items():
        with recorded(monkeypatch) as alone:
            alone_hw = Engine(painter(family, dtype), SLOTS).paint([requests[ticket]])[0]
        assert torch.equal(codes_hw, alone_hw), (ticket, requests[ticket])
        assert torch.equal(torch.stack(logits_of[ticket]), torch.stack(alone[0])), ticket
    assert len({tuple(codes_hw.flatten().tolist()) for codes_hw in painted.values()}) > count / 3


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in FAMILIES), ("features", torch.bfloat16)],
)
def test_each_picture_is_the_one_painted_alone(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    soak(family, 40, monkeypatch, dtype)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_500_mixed_requests(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    soak(family, 500, monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cancelled_request_frees_its_rows_at_once(family: str) -> None:
    """The next one that waits begins in the very next step, in the rows that were given up."""
    backbone, grid = painter(family), GRIDS[family][0]
    prefix = tuple(backbone.condition("", grid))
    steps = len(Steps.of(backbone.layout, grid).forced)
    given = [Request(prefix, seed, grid, Sampling(), streamed=True) for seed in range(4)]
    engine = Engine(backbone, 4)
    first, second, third, fourth = map(engine.submit, given)
    events = engine.events()
    assert {event.ticket for event in next(events)} == {first, second}, "two have all rows"
    begun = engine.forwards
    assert engine.cancel(third), "while it waits"
    assert engine.cancel(first), "while it is painted"
    assert not engine.cancel(first), "only once"
    finished = {}
    for told in events:
        for event in told:
            assert event.ticket in (second, fourth)
            if isinstance(event, Painted):
                finished[event.ticket] = engine.forwards
                alone_hw = Engine(backbone, 4).paint([given[event.ticket]])[0]
                assert torch.equal(event.codes_hw, alone_hw)
    alone = Engine(backbone, 4)
    alone.paint([given[3]])
    assert alone.forwards <= steps
    assert finished[fourth] == begun + alone.forwards, "it lost no step"
