"""Inverse CDF sampling: exact probabilities, exact filters, nothing shared between rows."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arra.generate.sampling import RowSampling, code_probabilities, guide, sample, uniforms
from arra.generate.settings import Sampling

PLAIN = Sampling(cfg=1.0)
LOGITS = torch.tensor([[2.0, 0.5, -1.0, 1.0, 0.0, -3.0]])


def rows(sampling: Sampling, count: int = 1) -> RowSampling:
    return RowSampling.of([sampling] * count)


def naive(logits: list[float], sampling: Sampling) -> list[float]:
    """Probabilities by the definition, in Python."""
    heated = [x / sampling.temperature for x in logits]
    weights = [math.exp(x - max(heated)) for x in heated]
    order = sorted(range(len(logits)), key=lambda k: (-weights[k], k))
    kept = order[: sampling.top_k] if sampling.top_k else order
    total, collected, nucleus = sum(weights[k] for k in kept), 0.0, []
    for k in kept:
        if collected >= sampling.top_p * total:
            break
        nucleus.append(k)
        collected += weights[k]
    return [weights[k] / collected if k in nucleus else 0.0 for k in range(len(logits))]


@pytest.mark.parametrize(
    "sampling",
    [
        PLAIN,
        Sampling(temperature=0.5),
        Sampling(temperature=2.0),
        Sampling(top_k=3),
        Sampling(top_p=0.7),
        Sampling(temperature=1.5, top_k=4, top_p=0.8),
        Sampling(top_k=99),
        Sampling(top_p=1e-9),
    ],
)
def test_draws_follow_the_exact_probabilities(sampling: Sampling) -> None:
    """Chi-square at fixed seeds; the exact probabilities to float32's precision."""
    expected = torch.tensor(naive(LOGITS[0].tolist(), sampling), dtype=torch.float64)
    found = code_probabilities(LOGITS, rows(sampling))[0].double()
    torch.testing.assert_close(found / found.sum(), expected, rtol=1e-6, atol=0)
    draws = 20_000
    uniform_N = uniforms([7], draws)[0]
    counts = torch.bincount(
        sample(LOGITS.expand(draws, -1), uniform_N, rows(sampling, draws)), minlength=6
    )
    possible = expected > 0
    assert counts[~possible].sum() == 0
    degrees = int(possible.sum()) - 1
    chi = (counts - draws * expected)[possible].square() / (draws * expected)[possible]
    # Mean and variance of chi-square are its degrees of freedom and twice that.
    assert chi.sum() <= degrees + 4 * (2 * degrees) ** 0.5 + 1e-9


@given(
    logits=st.lists(st.integers(-4, 4), min_size=2, max_size=12),
    top_k=st.integers(0, 13),
    top_p=st.floats(0.01, 1.0),
    temperature=st.floats(0.1, 4.0),
)
def test_filters_keep_what_their_definition_keeps(
    logits: list[int], top_k: int, top_p: float, temperature: float
) -> None:
    """Ties included: integers as logits make many."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    values = torch.tensor([logits], dtype=torch.float64)
    found = code_probabilities(values, rows(sampling))[0]
    kept = (found > 0).sum()
    # A sum that misses top_p by the last bit may keep one code more or less.
    low, high = (
        sum(p > 0 for p in naive([float(x) for x in logits], Sampling(1.0, temperature, top_k, p)))
        for p in (max(top_p - 1e-9, 1e-12), min(top_p + 1e-9, 1.0))
    )
    assert low <= kept <= high


def test_temperature_0_takes_the_likeliest() -> None:
    logits = torch.randn(5, 9)
    drawn = sample(logits, torch.rand(5).double(), rows(Sampling(temperature=0.0, top_k=3), 5))
    assert torch.equal(drawn, logits.argmax(1))


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_draw_a_possible_code(uniform: float) -> None:
    """0 never draws a leading code without weight, the largest uniform no trailing one."""
    logits = torch.tensor([[-math.inf, -200.0, 1.0, 1.0, 1.0, -200.0, -math.inf]])
    drawn = int(sample(logits, torch.tensor([uniform], dtype=torch.float64), rows(PLAIN)))
    assert drawn == (2 if uniform == 0 else 4)


def test_rows_are_independent_and_uniforms_are_the_seeds() -> None:
    logits = torch.randn(6, 40)
    uniform_NP = uniforms([5, 6, 5, 2**63 - 1], 10)
    assert torch.equal(uniform_NP[0], uniform_NP[2])
    assert not torch.equal(uniform_NP[0], uniform_NP[1])
    assert torch.equal(uniforms([6], 10)[0], uniform_NP[1])
    assert uniform_NP.dtype == torch.float64
    uniform_N = uniforms([1], 6)[0]
    for sampling in (PLAIN, Sampling(top_k=5, top_p=0.5)):
        together = sample(logits, uniform_N, rows(sampling, 6))
        alone = [sample(logits[i : i + 1], uniform_N[i : i + 1], rows(sampling)) for i in range(6)]
        assert torch.equal(together, torch.cat(alone))


def test_rows_with_settings_of_their_own() -> None:
    """Each as if all had them, to the last bit; one without filters beside one with them."""
    settings = [PLAIN, Sampling(top_k=5), Sampling(1.0, 0.0), Sampling(1.0, 0.7, 9, 0.5), PLAIN]
    logits, uniform_N = torch.randn(5, 40), uniforms([3], 5)[0]
    mixed = RowSampling.of(settings)
    assert mixed.filtered
    for row, sampling in enumerate(settings):
        own = rows(sampling, 5)
        assert torch.equal(
            sample(logits, uniform_N, mixed)[row], sample(logits, uniform_N, own)[row]
        )
        both = code_probabilities(logits, mixed)[row], code_probabilities(logits, own)[row]
        assert torch.equal(*both)


def test_uniforms_are_these_numbers() -> None:
    """Frozen: another generator would repaint every picture that anybody made."""
    expected = torch.tensor([0.9700530018065531, 0.7078198643997880, 0.4593829431274509])
    torch.testing.assert_close(uniforms([0], 3)[0].float(), expected, rtol=0, atol=1e-6)
    assert torch.equal(uniforms([0], 3)[0], uniforms([0], 64)[0, :3])


def test_guidance_formula() -> None:
    guided, unguided = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    assert guide(guided, unguided, 3.0).tolist() == [[7.0, -1.0]]
    assert torch.equal(guide(guided, unguided, 0.0), unguided)


@pytest.mark.parametrize(
    ("wrong", "flag"),
    [
        ({"cfg": -0.1}, "--cfg"),
        ({"cfg": math.nan}, "--cfg"),
        ({"cfg": math.inf}, "--cfg"),
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": math.nan}, "--temperature"),
        ({"top_k": -1}, "--top-k"),
        ({"top_k": 1.5}, "--top-k"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_p": 1.01}, "--top-p"),
        ({"top_p": math.nan}, "--top-p"),
        ({"cfg_interval": (0.5, 0.2)}, "--cfg-interval"),
        ({"cfg_interval": (-0.1, 1.0)}, "--cfg-interval"),
        ({"cfg_interval": (0.0, 1.1)}, "--cfg-interval"),
    ],
)
def test_bad_values_are_refused_with_their_range(wrong: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=rf"{flag} must be .*, got "):
        Sampling(**wrong)
    with pytest.raises(ValueError, match=f"{flag} must be"):
        PLAIN.with_changes(**wrong)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_bad_seeds_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="--seed must be in"):
        uniforms([seed], 2)
