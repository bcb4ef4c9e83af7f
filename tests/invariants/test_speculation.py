"""Speculative decoding draws from the model's own distribution: counted on a toy that can be
enumerated, through the very `Drafts` and `Branches` that the painter uses.

Legend: N pictures, W steps of a window, T nodes of a tree, S steps of a picture, K codes,
X possible pictures.
"""

import itertools

import pytest
import torch
from torch import Tensor

from arra.generate import speculative
from arra.generate.sampling import RowSampling, code_probabilities, filters, guide
from arra.generate.settings import Sampling
from arra.generate.speculative import Drafts
from arra.generate.tree import Branches, gumbel

CODES, STEPS, FORCED = 3, 5, 3
"""Codes, steps, and the step that the format dictates."""


class Toy:
    """A random table for each step: the logits given all steps before, with and without prompt."""

    def __init__(self, sampling: Sampling, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.tables = []
        for step in range(STEPS):
            shape = (CODES**step, CODES)
            guided, unguided = (0.8 * torch.randn(shape, generator=draw) for _ in range(2))
            logits = guide(guided, unguided, sampling.cfg).double()
            self.tables.append(_distribution(logits, sampling))

    def chances(self, step: int, codes_NS: Tensor) -> Tensor:
        """The distribution of a step given the codes before it, (N, K)."""
        powers_S = CODES ** torch.arange(step)
        return self.tables[step][(codes_NS[:, :step] * powers_S).sum(1)]

    def law(self) -> tuple[Tensor, Tensor]:
        """All pictures (X, S), and how likely each is."""
        free = [range(1) if step == FORCED else range(CODES) for step in range(STEPS)]
        codes_XS = torch.tensor(list(itertools.product(*free)))
        chance_X = torch.ones(len(codes_XS), dtype=torch.float64)
        for step in set(range(STEPS)) - {FORCED}:
            own_X1 = codes_XS[:, step, None]
            chance_X *= self.chances(step, codes_XS).gather(1, own_X1)[:, 0]
        return codes_XS, chance_X


def _distribution(logits_NK: Tensor, sampling: Sampling) -> Tensor:
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits_NK.argmax(-1), CODES).double()
    one = RowSampling.of([sampling] * len(logits_NK))
    weights_NK = code_probabilities(logits_NK, one)
    assert one.filtered == filters(sampling)
    return weights_NK / weights_NK.sum(-1, keepdim=True)


def paint_toy(toy: Toy, pictures: int, window: int, *, coupled: bool, adaptive: bool) -> Tensor:
    """Codes (N, S); a cache stands between what is fed and what is drawn from, as in a model."""
    drafts = Drafts(
        pictures,
        STEPS,
        window,
        CODES,
        coupled=coupled,
        adaptive=adaptive,
        dtype=torch.float64,
    )
    draw = torch.Generator().manual_seed(1)
    start_NS = torch.randint(CODES, (pictures, STEPS), generator=draw)
    first_NK = toy.chances(0, start_NS)
    start_NS[:, 0] = torch.multinomial(first_NK, 1, replacement=True, generator=draw)[:, 0]
    forced_S = torch.arange(STEPS) == FORCED
    source_S = torch.tensor([0, 0, 0, 2, 1])
    uniform_NSW = torch.rand(pictures, STEPS, window, generator=draw, dtype=torch.float64)
    drafts.begin(
        range(pictures),
        start_NS,
        forced_S.expand(pictures, -1),
        source_S.expand(pictures, -1),
        uniform_NSW,
    )
    cache_NS = torch.full((pictures, STEPS + window), -1)
    while (drafts.final_N < STEPS).any():
        for width in drafts.widths:
            step_NW = drafts.propose(width)
            fed_NW = drafts.code_NS.gather(1, step_NW - 1)
            forced_NW = drafts.forced_NS.gather(1, step_NW - 1)
            cache_NS.scatter_(1, step_NW - 1, fed_NW.masked_fill(forced_NW, 0))
            drafts.judge(_look(toy, step_NW, cache_NS))
    assert (drafts.passes_N <= STEPS).all()
    return drafts.code_NS[:, :STEPS].masked_fill(forced_S, 0)


def _look(toy: Toy, step_NW: Tensor, cache_NS: Tensor) -> Tensor:
    """What a forward pass over the windows gives, (N, W, K); beyond the picture, anything."""
    p_NWK = torch.full((*step_NW.shape, CODES), 1 / CODES, dtype=torch.float64)
    for step in range(1, STEPS):
        at_NW = step_NW == step
        rows = at_NW.any(1)
        p_NWK[at_NW] = toy.chances(step, cache_NS[rows])
    return p_NWK


def p_value(found_NS: Tensor, codes_XS: Tensor, chance_X: Tensor) -> float:
    """Of a chi-square test; pictures expected fewer than 5 times count as one."""
    powers_S = CODES ** torch.arange(STEPS)
    place = {int(key): x for x, key in enumerate((codes_XS * powers_S).sum(1))}
    keys, counts = (found_NS * powers_S).sum(1).unique(return_counts=True)
    found_X = torch.zeros(len(codes_XS), dtype=torch.float64)
    found_X[[place[int(key)] for key in keys]] = counts.double()
    expected_X = chance_X * len(found_NS)
    assert not found_X[expected_X == 0].any(), "an impossible picture"
    rare_X = expected_X < 5
    found = torch.cat([found_X[~rare_X], found_X[rare_X].sum()[None]])
    expected = torch.cat([expected_X[~rare_X], expected_X[rare_X].sum()[None]])
    kept = expected > 0
    statistic = ((found - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = torch.tensor((int(kept.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


CASES = [
    pytest.param(Sampling(cfg=1.0), 2, False, id="window 2"),
    pytest.param(Sampling(cfg=1.0), 3, False, id="window 3"),
    pytest.param(Sampling(cfg=3.0), 4, False, id="guided"),
    pytest.param(Sampling(cfg=3.0, temperature=1.4), 4, True, id="guided, adaptive"),
    pytest.param(Sampling(cfg=2.0, top_k=2), 5, False, id="guided, top-k"),
    pytest.param(Sampling(cfg=1.5, top_p=0.85, temperature=0.9), 5, True, id="top-p, adaptive"),
]


@pytest.mark.parametrize("coupled", [False, True], ids=["sjd", "scd"])
@pytest.mark.parametrize(("sampling", "window", "adaptive"), CASES)
def test_pictures_are_as_likely_as_the_model_says(
    sampling: Sampling, window: int, adaptive: bool, coupled: bool
) -> None:
    toy = Toy(sampling)
    found_NS = paint_toy(toy, 100_000, window, coupled=coupled, adaptive=adaptive)
    assert p_value(found_NS, *toy.law()) > 1e-3


def no_correction(
    p_NWK: Tensor, q_NWK: Tensor, draft_NW1: Tensor, chance_NW: Tensor, free_NW: Tensor
) -> Tensor:
    """What takes a draft's place is drawn from p, as if the draft had not been asked."""
    return p_NWK.clone()


def unmoved(self: Drafts, p_NWK: Tensor, ended_N: Tensor, live_N: Tensor, mine_N: Tensor) -> None:
    """The distributions stay where they are while the window moves on."""
    self.q_NWK[:, : p_NWK.shape[1]] = p_NWK
    self.seen_N.copy_(torch.where(mine_N, self.final_N + live_N, self.seen_N))
    self.final_N.add_(ended_N)
    self.passes_N.add_(mine_N)


def all_final(found_NW: Tensor) -> Tensor:
    """Everything in the window is final after one look."""
    return torch.zeros_like(found_NW)


@pytest.mark.parametrize(
    ("target", "wrong"),
    [
        ("leftover", no_correction),
        ("Drafts._move", unmoved),
        ("_behind_first", all_final),
    ],
    ids=["no correction", "another step's q", "too much is final"],
)
def test_a_wrong_rule_is_found_out(
    target: str, wrong: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail."""
    monkeypatch.setattr(f"{speculative.__name__}.{target}", wrong)
    toy = Toy(Sampling(cfg=3.0))
    found_NS = paint_toy(toy, 100_000, 4, coupled=True, adaptive=False)
    assert p_value(found_NS, *toy.law()) < 1e-9


@pytest.mark.parametrize("coupled", [False, True], ids=["sjd", "scd"])
def test_greedy_pictures_are_the_greedy_ones(coupled: bool) -> None:
    toy = Toy(Sampling(cfg=3.0, temperature=0.0))
    codes_XS, chance_X = toy.law()
    found_NS = paint_toy(toy, 100, 4, coupled=coupled, adaptive=True)
    assert (found_NS == codes_XS[chance_X.argmax()]).all()


# ---- a tree of drafts ----------------------------------------------------------------------------


def begun_tree(toy: Toy, pictures: int, nodes: int) -> Branches:
    branches = Branches(pictures, STEPS, nodes, CODES, dtype=torch.float64)
    draw = torch.Generator().manual_seed(1)
    start_NS = torch.zeros(pictures, STEPS, dtype=torch.long)
    first_NK = toy.chances(0, start_NS)
    start_NS[:, 0] = torch.multinomial(first_NK, 1, replacement=True, generator=draw)[:, 0]
    forced_NS = (torch.arange(STEPS) == FORCED).expand(pictures, -1)
    noise_NSK = gumbel(draw, pictures, STEPS, CODES)
    branches.begin(range(pictures), start_NS, forced_NS, first_NK, noise_NSK)
    return branches


def paint_tree(toy: Toy, pictures: int, nodes: int) -> tuple[Tensor, Tensor]:
    """Codes (N, S) and passes (N,); each node is asked about with the codes on its own way."""
    branches = begun_tree(toy, pictures, nodes)
    above_TT, level_T = branches.tree.above_TT, branches.level_T
    while (branches.final_N < STEPS).any():
        step_NT = branches.propose(nodes)
        p_NTK = torch.full((*step_NT.shape, CODES), 1 / CODES, dtype=torch.float64)
        for node in range(nodes):
            codes_NS = branches.code_NS.clone()
            for other in above_TT[node].nonzero()[1:, 0]:
                place_N1 = (branches.final_N + level_T[other] - 1)[:, None]
                codes_NS.scatter_(1, place_N1, branches.draft_NT[:, other, None])
            for step in range(1, STEPS):
                rows = step_NT[:, node] == step
                p_NTK[rows, node] = toy.chances(step, codes_NS[rows])
        branches.judge(p_NTK)
    return branches.code_NS[:, :STEPS], branches.passes_N


TREES = [
    pytest.param(Sampling(cfg=1.0), 2, id="2 nodes"),
    pytest.param(Sampling(cfg=3.0), 9, id="guided"),
    pytest.param(Sampling(cfg=3.0, temperature=1.4), 16, id="guided, warm"),
    pytest.param(Sampling(cfg=2.0, top_k=2), 5, id="guided, top-k"),
    pytest.param(Sampling(cfg=1.5, top_p=0.85, temperature=0.9), 8, id="top-p"),
]


def check_trees(sampling: Sampling, nodes: int, n: int) -> None:
    toy = Toy(sampling)
    found_NS, passes_N = paint_tree(toy, n, nodes)
    assert p_value(found_NS, *toy.law()) > 1e-3
    assert passes_N.double().mean() < STEPS, "some drafts stayed"


@pytest.mark.parametrize(("sampling", "nodes"), TREES)
def test_pictures_of_trees_are_as_likely_as_the_model_says(sampling: Sampling, nodes: int) -> None:
    check_trees(sampling, nodes, 10_000)


@pytest.mark.long
@pytest.mark.parametrize(("sampling", "nodes"), TREES)
def test_a_hundred_thousand_pictures_of_trees_are(sampling: Sampling, nodes: int) -> None:
    check_trees(sampling, nodes, 100_000)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("nodes", [2, 7, 16])
def test_a_tree_changes_nothing_but_the_number_of_passes(nodes: int, temperature: float) -> None:
    """The picture is the one that the same noise gives step by step."""
    toy = Toy(Sampling(cfg=3.0, temperature=temperature))
    begun = begun_tree(toy, 1_000, nodes)
    expected_NS = begun.code_NS[:, :STEPS].clone()
    for step in set(range(1, STEPS)) - {FORCED}:
        log_p_NK = toy.chances(step, expected_NS).log()
        expected_NS[:, step] = (log_p_NK + begun.noise_NSK[:, step]).argmax(-1)
    assert torch.equal(paint_tree(toy, 1_000, nodes)[0], expected_NS)


def test_a_wrong_noise_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def normal(generator: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    monkeypatch.setitem(globals(), "gumbel", normal)
    toy = Toy(Sampling(cfg=3.0))
    assert p_value(paint_tree(toy, 10_000, 9)[0], *toy.law()) < 1e-9
