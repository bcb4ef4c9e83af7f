"""What several processes tell each other: mistakes, and who speaks of them."""

import os
import sys

import pytest
from ranks import in_ranks

from arra.cli import main
from arra.train import world as worlds
from arra.train.world import SAID, World, open_world


def notes(act: object, patience: float = 0.5) -> list[str] | None:
    worlds.HEARING = patience
    try:
        with open_world("cpu") as world:
            act(world)  # type: ignore[operator]
    except ValueError as error:
        return list(getattr(error, "__notes__", ()))
    return None


def heard(world: World) -> None:
    def wrong() -> None:
        raise ValueError("wrong")

    world.on_main(wrong)


def alike(world: World) -> None:
    raise ValueError("wrong")


def own(world: World) -> None:
    if world.rank == 2:
        raise ValueError("wrong here")


def unlike(world: World) -> None:
    raise ValueError(f"wrong on {world.rank}")


@pytest.mark.parametrize("act", [heard, alike])
def test_a_mistake_of_all_is_said_once(act: object) -> None:
    assert in_ranks(3, notes, act, 10.0) == [[], [SAID], [SAID]]


@pytest.mark.parametrize(("act", "expected"), [(own, [None, None, []]), (unlike, [[], [], []])])
def test_a_mistake_of_its_own_is_said_by_itself(act: object, expected: list[object]) -> None:
    assert in_ranks(3, notes, act) == expected


def complaint(arguments: list[str]) -> tuple[int, str]:
    """Exit code, and what was written to stderr, of a command on one rank."""
    read, write = os.pipe()
    os.dup2(write, sys.stderr.fileno())
    sys.stderr = os.fdopen(os.dup(write), "w", buffering=1)
    try:
        code = main(arguments)
    except SystemExit as left:
        code = int(left.code or 0)
    sys.stderr.flush()
    os.set_blocking(read, False)
    try:
        return code, os.read(read, 10_000).decode()
    except BlockingIOError:
        return code, ""


@pytest.mark.parametrize(
    ("wrong", "code", "word"),
    [(["--data", "/nowhere"], 1, "no prepared dataset"), (["--no-such-flag"], 2, "no-such-flag")],
)
def test_the_command_line_complains_once(
    wrong: list[str], code: int, word: str, tmp_path: object
) -> None:
    first, *others = in_ranks(3, complaint, ["train", "scenes", "--out", f"{tmp_path}/o", *wrong])
    assert first[0] == code
    assert word in first[1]
    assert others == [(code, "")] * 2


def sums(ranks: int, local_size: int) -> tuple[bool, list[dict[str, int]]]:
    rank = int(os.environ["RANK"])
    here = min(local_size, ranks - rank // local_size * local_size)  # the last may have fewer
    os.environ |= {"LOCAL_WORLD_SIZE": str(here), "LOCAL_RANK": str(rank % local_size)}
    with open_world("cpu") as world:
        found = [world.sum({"a": (rank + 1) * n, "b": 10**15 + rank}) for n in range(3)]
        world.apart().barrier()
        return world.machine is not None, found


@pytest.mark.parametrize(
    ("ranks", "local_size", "grouped"), [(4, 2, True), (4, 4, False), (3, 2, False)]
)
def test_sums_by_machine(ranks: int, local_size: int, grouped: bool) -> None:
    """As many machines as it takes, on this one; unequal ones add up in one ring."""
    expected = [
        {"a": n * ranks * (ranks + 1) // 2, "b": ranks * 10**15 + ranks * (ranks - 1) // 2}
        for n in range(3)
    ]
    assert in_ranks(ranks, sums, ranks, local_size) == [(grouped, expected)] * ranks
