"""Streamed order: a function of the row counts, the seed and the step, direct from any step."""

import numpy as np
import pytest

from arra.data.order import Lanes, Place

COUNTS = [7, 5, 7, 7, 1, 7, 7, 3]


def lanes(counts: list[int] = COUNTS, **settings: int) -> Lanes:
    return Lanes(counts, **({"seed": 3, "batch_size": 6, "lanes": 2, "window": 2} | settings))


def drawn(order: Lanes, steps: range, size: int = 6) -> list[list[Place]]:
    return [order.at(step, np.arange(size)) for step in steps]


def samples_of(places: list[Place]) -> list[tuple[int, int]]:
    return [(place.shard, place.position) for place in places]


def directly(counts: list[int], seed: int, lanes: int, window: int, lane: int) -> list[int]:
    """Samples of one lane over two epochs, as numbers in the manifest's order, step by step."""
    total, before = sum(counts), np.cumsum([0, *counts])
    begin, end = total * lane // lanes, total * (lane + 1) // lanes
    found: list[int] = []
    for epoch in (0, 1):
        row = [
            (shard, position)
            for shard in np.random.default_rng([seed, 0, epoch]).permutation(len(counts))
            for position in range(counts[shard])
        ]
        mine = row[begin:end]
        shards = list(dict.fromkeys(shard for shard, _ in mine))
        for number in range(0, -(-len(shards) // window)):
            mixed = set(shards[number * window : (number + 1) * window])
            inside = [place for place in mine if place[0] in mixed]
            random = np.random.default_rng([seed, 3, epoch, lane, number])
            found += [
                int(before[inside[i][0]]) + inside[i][1] for i in random.permutation(len(inside))
            ]
    return found


@pytest.mark.parametrize(("count", "window", "size"), [(1, 1, 4), (2, 2, 6), (3, 8, 6), (4, 3, 4)])
def test_the_order_is_what_is_computed_step_by_step(count: int, window: int, size: int) -> None:
    order, before = lanes(lanes=count, window=window, batch_size=size), np.cumsum([0, *COUNTS])
    share = size // count
    for lane in range(count):
        expected = directly(COUNTS, 3, count, window, lane)
        slots = np.arange(lane * share, (lane + 1) * share)
        steps = len(expected) // share
        got = [place for step in range(steps) for place in order.at(step, slots)]
        rows = [int(before[place.shard]) + place.position for place in got]
        assert rows == expected[: len(rows)]


def test_an_epoch_holds_every_sample_once_in_another_order() -> None:
    order = lanes(batch_size=4)
    epochs = [
        [place for each in drawn(order, range(11 * e, 11 * e + 11), 4) for place in each]
        for e in (0, 1)
    ]
    assert sum(COUNTS) == 44
    for places in epochs:
        assert len(set(samples_of(places))) == 44
    assert epochs[0] != epochs[1]
    assert all(0 <= place.draw < 1 for place in epochs[0])


def test_any_step_and_any_slots_alone() -> None:
    whole = drawn(lanes(), range(40))
    for step in (39, 0, 17, 16, 8):
        assert lanes().at(step, np.arange(6)) == whole[step]
        assert [lanes().at(step, np.array([k]))[0] for k in range(6)] == whole[step]
    assert drawn(lanes(seed=4), range(40)) != whole


def test_a_lane_reads_its_own_shards_and_says_which_come_next() -> None:
    counts = [50] * 40
    order = lanes(counts, lanes=4, batch_size=8, window=3)
    slots = np.arange(2, 4)  # lane 1
    assert order.feeding(slots) == {1}
    seen: list[int] = []
    for step in range(250):
        now = {place.shard for place in order.at(step, slots)}
        seen += [shard for shard in now if shard not in seen]
        soon = order.shards_after(step, slots)
        assert len(soon) <= 3
        if step < 150:
            later = {p.shard for s in range(step, step + 200) for p in order.at(s, slots)}
            assert set(soon) <= later
    assert len(seen) == 10, "500 of 2,000 samples lie in 10 of 40 shards"


def test_a_window_mixes_its_shards() -> None:
    order = lanes([100] * 8, lanes=1, batch_size=10, window=4)
    first = [p.shard for places in drawn(order, range(20), 10) for p in places]
    assert len(set(first)) == 4
    assert 10 < np.bincount(first)[first[0]] < 90


def test_lanes_divide_the_batch() -> None:
    with pytest.raises(ValueError, match=r"--batch-size 6 is no multiple of --data\.lanes 4"):
        lanes(lanes=4)
    with pytest.raises(ValueError, match="more than the 2 samples"):
        lanes([2], lanes=3)
