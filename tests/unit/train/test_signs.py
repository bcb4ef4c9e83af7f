"""What asks a run to stop: signals become signs, and a second Ctrl-C is not waited for."""

import os
import signal
import threading

import pytest
from ranks import RankFailed, in_ranks

from arra.train import signs
from arra.train.signs import PREEMPTED, Signs
from arra.train.world import open_world


def told(number: int, times: int, patience: float) -> dict[str, int]:
    signs.IMPATIENT = patience
    found = Signs()
    with found.watched():
        for _ in range(times):
            os.kill(os.getpid(), number)
    return found.given


def test_a_signal_is_a_sign_however_often_it_comes() -> None:
    assert in_ranks(1, told, signal.SIGTERM, 3, 0.0)[0]["SIGTERM"] == 1
    assert in_ranks(1, told, signal.SIGINT, 2, 60.0)[0]["SIGINT"] == 1


def test_a_second_ctrl_c_ends_the_process_at_once() -> None:
    with pytest.raises(RankFailed, match="died without a word"):
        in_ranks(1, told, signal.SIGINT, 2, 0.0)


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signs().watched():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_another_thread_than_the_main_one_trains_without_them() -> None:
    raised: list[Exception] = []

    def watch() -> None:
        try:
            with Signs().watched():
                pass
        except ValueError as error:  # what Python says of handlers set outside the main thread
            raised.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert not raised


def ending(which: int) -> tuple[bool, object]:
    with open_world("cpu") as world:
        found = Signs()
        found.given["SIGTERM"] = int(world.rank == which)
        found.agree(world)
        return found.stopping, found.ending().args


def test_all_hear_what_one_was_told() -> None:
    assert in_ranks(2, ending, 1) == [(True, (PREEMPTED,))] * 2
