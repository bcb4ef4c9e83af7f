"""Condition contrastive alignment against the paper's formula written naively, in float64."""

import math

import pytest
import torch
from torch import Tensor, nn

from arra.batch import Batch
from arra.contrastive import Contrast, Contrastive, partners
from arra.cross_entropy import position_losses
from arra.layout import Image, Layout, Text

D, V, BETA, WEIGHT = 12, 40, 0.3, 5.0
LAYOUT = Layout("chameleon", tuple(range(20, 36)), pad=0, begin=1, end=2)
TIMES, PAIRS = [1, 2, 1], [2, 0]  # the second image has no prompt: it is not repeated


def make_batch() -> Batch:
    """Three images behind prompts of their own, then the third and the first behind others'."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (3, 6), generator=generator).tolist()
    prompts = [(3, 4), (5,), (6, 7, 8), (3, 4), (9, 9)]
    images = [codes[i] for i in (0, 1, 2, *PAIRS)]
    return LAYOUT.collate(
        [
            LAYOUT.sample([Text(prompt), Image(tuple(image), 2, 3)])
            for prompt, image in zip(prompts, images, strict=True)
        ]
    )


def contrast() -> Contrast:
    return Contrast(torch.tensor(TIMES), torch.tensor(PAIRS))


def hidden(batch: Batch, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (*batch.ids_BT.shape, D)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def head(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(D, V, dtype=torch.float64)


def naive_log_p(batch: Batch, last_BTD: Tensor, table: nn.Linear, ids: list[int]) -> list[Tensor]:
    """Of each sequence's image: all logits, and one code after the other."""
    found = []
    for row, tokens in enumerate(batch.ids_BT.tolist()):
        total = torch.zeros((), dtype=torch.float64)
        for t in range(1, len(tokens)):
            if tokens[t] in LAYOUT.code_ids:
                logits_V = table(last_BTD[row, t - 1])[ids]
                total = total + logits_V.log_softmax(0)[ids.index(tokens[t])]
        found.append(total)
    return found


def naive_loss(log_p: list[Tensor], start: list[Tensor]) -> Tensor:
    r = [a - b for a, b in zip(log_p, start, strict=True)]
    total = torch.zeros((), dtype=torch.float64)
    for image, times in enumerate(TIMES):
        total = total - times * torch.log(torch.sigmoid(BETA * r[image]))
    for k in range(len(PAIRS)):
        total = total - WEIGHT * torch.log(torch.sigmoid(-BETA * r[len(TIMES) + k]))
    return total / len(TIMES) / max(WEIGHT, 1)


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("restricted", [False, True])
def test_the_loss_and_its_gradients_are_the_formulas(chunk: int, restricted: bool) -> None:
    batch, last_BTD, table = make_batch(), hidden(make_batch(), 1), head(4)
    frozen_BTD, frozen = hidden(batch, 2).detach(), head(5).requires_grad_(False)
    vocabulary = [1, 2, *LAYOUT.code_ids] if restricted else None
    objective = Contrastive(beta=BETA, weight=WEIGHT, vocabulary=vocabulary, chunk=chunk)
    with torch.no_grad():
        start_S = objective.log_likelihood(frozen_BTD, frozen, batch)
    terms = objective(last_BTD, table, batch, contrast(), start_S)
    ids = vocabulary or list(range(V))
    start = naive_log_p(batch, frozen_BTD, frozen, ids)
    expected = naive_loss(naive_log_p(batch, last_BTD, table, ids), start)
    torch.testing.assert_close(terms.total(), expected, rtol=1e-10, atol=0)
    inputs = [last_BTD, *table.parameters()]
    found = torch.autograd.grad(terms.total(), inputs)
    for a, b in zip(found, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("weight", [0.5, 300.0])
def test_at_the_start_every_term_is_log_2(weight: float) -> None:
    batch, last_BTD, table = make_batch(), hidden(make_batch(), 1), head(4)
    objective = Contrastive(beta=BETA, weight=weight, chunk=4)
    start_S = objective.log_likelihood(last_BTD, table, batch).detach()
    terms = objective(last_BTD, table, batch, contrast(), start_S)
    closed = math.log(2) * (sum(TIMES) + weight * len(PAIRS)) / len(TIMES) / max(weight, 1)
    assert terms.total().item() == pytest.approx(closed, rel=1e-12)
    assert [float(total) for total, _ in terms.metrics.values()] == [0, 0, 0]


def test_what_is_logged() -> None:
    batch, last_BTD, table = make_batch(), hidden(make_batch(), 1), head(4)
    objective = Contrastive(beta=BETA, weight=WEIGHT)
    log_p = objective.log_likelihood(last_BTD, table, batch).detach()
    start_S = log_p - torch.tensor([1.0, 2.0, 3.0, 5.0, -4.0])
    metrics = objective(last_BTD, table, batch, contrast(), start_S).metrics
    found = {name: (float(total), count) for name, (total, count) in metrics.items()}
    # Image 2 against sequence 3: 3 < 5; image 0 against sequence 4: 1 > -4.
    assert found["reward_own"] == (pytest.approx(BETA * (3 + 1)), 2)
    assert found["reward_other"] == (pytest.approx(BETA * (5 - 4)), 2)
    assert found["ranked"] == (1, 2)


def test_losses_of_single_positions() -> None:
    """Each may be weighted apart; the logits of one chunk exist at a time."""
    rows: list[int] = []

    class Counting(nn.Linear):
        def forward(self, hidden_ND: Tensor) -> Tensor:
            rows.append(len(hidden_ND))
            return super().forward(hidden_ND)

    table = Counting(D, V, dtype=torch.float64)
    hidden_ND = torch.randn(11, D, dtype=torch.float64, requires_grad=True)
    labels_N, weight_N = torch.randint(0, V, (11,)), torch.randn(11, dtype=torch.float64)
    losses_N = position_losses(hidden_ND, labels_N, table, chunk=4)
    found = torch.autograd.grad((losses_N * weight_N).sum(), [hidden_ND, *table.parameters()])
    assert rows[:3] == [4, 4, 3]
    assert sorted(rows[3:]) == [3, 4, 4]
    logits_NV = table(hidden_ND)
    expected_N = nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")
    torch.testing.assert_close(losses_N, expected_N, rtol=1e-12, atol=0)
    wanted = torch.autograd.grad((expected_N * weight_N).sum(), [hidden_ND, *table.parameters()])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
    assert position_losses(hidden_ND[:0], labels_N[:0], table).shape == (0,)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("ab", [1, 0]),
        ("aab", [2, 2, 0]),
        ("abba", [1, 3, 3, 1]),
        ("abca", [1, 2, 3, 1]),
        ("aaaa", [-1, -1, -1, -1]),
        ("a", [-1]),
        ("", []),
        (["a", "", "b", ""], [2, -1, 0, -1]),
        (["", "a", ""], [-1, -1, -1]),
    ],
)
def test_whose_prompt_an_image_is_contrasted_with(prompts: str, expected: list[int]) -> None:
    assert partners(list(prompts)) == expected


def test_no_partner_has_an_equal_prompt() -> None:
    generator = torch.Generator().manual_seed(0)
    for classes in (2, 3, 50):
        prompts = [str(int(c)) for c in torch.randint(0, classes, (40,), generator=generator)]
        prompts[::7] = [""] * len(prompts[::7])
        for i, other in enumerate(partners(prompts)):
            assert (other < 0) == (not prompts[i])
            assert other < 0 or prompts[other] not in ("", prompts[i])
