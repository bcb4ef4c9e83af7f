"""Sums that stay on the device: read once, over all processes, without what was refused."""

import json
import math
from typing import Any

import pytest
import torch
from ranks import in_ranks

from arra.objective import Terms
from arra.train.tally import StepSums, Tally, mean_of
from arra.train.world import World, open_world

CPU = World(torch.device("cpu"))
GOOD, BAD = torch.zeros(()), torch.ones(())


def sums(value: float, count: float = 2.0, **more: tuple[float, float]) -> StepSums:
    made = StepSums()
    pairs = {"ar": (value * count, count), **more}
    made.add_terms(
        Terms(
            {n: torch.tensor(v) for n, (v, _) in pairs.items()},
            {n: c for n, (_, c) in pairs.items()},
            dict.fromkeys(pairs, 1.0),
            {},
        )
    )
    made.known = {"tokens": 10.0}
    return made


def test_refused_steps_are_in_no_mean_but_in_what_was_done() -> None:
    tally = Tally(CPU)
    for step, (value, refused) in enumerate([(1.0, GOOD), (math.nan, BAD), (4.0, GOOD)]):
        tally.add(step, sums(value, 1 + step), refused)
    first, second, _ = tally.read()
    assert (first.step, first.refused, first.mean("ar")) == (0, False, 1.0)
    assert (second.refused, second.sums["ar"]) == (True, 0.0)
    assert math.isnan(second.by_rank[0]["ar"])
    assert tally.means() == {"ar": (1 * 1 + 4 * 3) / (1 + 3), "tokens": 10.0}


def test_terms_may_come_and_go() -> None:
    """A schedule that ends the alignment takes its terms away."""
    tally = Tally(CPU)
    tally.add(0, sums(1.0, **{"gva/clip": (3.0, 2.0)}), GOOD)
    tally.add(1, sums(3.0), GOOD)
    assert [record.terms for record in tally.read()] == [("ar", "gva/clip"), ("ar",)]
    assert tally.means() == {"ar": 2.0, "gva/clip": 1.5, "tokens": 10.0}


def test_an_interval_goes_on_from_a_checkpoint() -> None:
    values = torch.rand(7).tolist()
    whole, first = Tally(CPU), Tally(CPU)
    for step, value in enumerate(values):
        whole.add(step, sums(value), GOOD)
        if step < 3:
            first.add(step, sums(value), GOOD)
    whole.read()
    first.read()
    second = Tally(CPU, json.loads(json.dumps(first.saved())))
    for step, value in enumerate(values[3:], 3):
        second.add(step, sums(value), GOOD)
    second.read()
    assert second.means() == whole.means()
    whole.clear()
    assert whole.means() == {}


def test_what_does_not_count_is_named_all_the_same() -> None:
    own = sums(2.0)
    nothing = Terms({"ar": torch.tensor(math.nan)}, {"ar": 5}, {"ar": 1.0}, {})
    own.add_terms(nothing, counted=False)
    assert mean_of(own, CPU) == {"ar": 2.0, "tokens": 10.0}


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_add_up_to_one_process(count: int) -> None:
    values = torch.rand(2, count).tolist()

    def one() -> tuple[dict[str, float], list[Any]]:
        with open_world("cpu") as world:
            tally = Tally(world)
            for step in range(2):
                own = sums(values[step][world.rank], 1 + world.rank)
                own.add("grad_norm", torch.tensor(6.0 + step) / world.size, 1 / world.size)
                tally.add(step, own, GOOD)
            broken = sums(math.inf if world.rank == 1 else 1.0)
            tally.add(2, broken, BAD)
            records = tally.read()
            return tally.means(), [each["ar"] for each in records[2].by_rank]

    found = in_ranks(count, one)
    assert all(each == found[0] for each in found)
    means, by_rank = found[0]
    total = sum(v * (1 + rank) for row in values for rank, v in enumerate(row))
    assert means["ar"] == pytest.approx(total / (count * (count + 1)), rel=1e-6)
    assert means["grad_norm"] == pytest.approx(6.5, rel=1e-6)
    assert means["tokens"] == 10.0 * count
    assert by_rank == [1.0, math.inf, *[1.0] * (count - 2)]
