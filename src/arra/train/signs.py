"""What ends a run before its last step: SIGTERM, Ctrl-C, a checkpoint that could not be written.

Each process sees signs of its own at its own moment. They are summed over the processes together
with each step's counts, so that all of them stop after the same step.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from arra.train.world import World

PREEMPTED = 75
"""Exit code of a run that saved its state because of SIGTERM and will go on: `EX_TEMPFAIL` of
sysexits.h, "try again". Schedulers send SIGTERM some seconds before they take a machine away."""
IMPATIENT = 1.0
"""Seconds after which another Ctrl-C is another one: torchrun passes the first on to processes that
have had it from the terminal."""


class Signs:
    """The signs of one process, and those that all of them have agreed on."""

    def __init__(self) -> None:
        self.given = {"SIGTERM": 0, "SIGINT": 0, "unsaved": 0}
        self.heard = dict(self.given)
        self._since = 0.0

    @property
    def stopping(self) -> bool:
        """Whether all processes know that one of them was asked to stop."""
        return self.heard["SIGTERM"] + self.heard["SIGINT"] > 0

    def hear(self, sums: Mapping[str, int]) -> None:
        """Takes the sums of what each process has given."""
        self.heard = {name: sums[name] for name in self.given}

    def agree(self, world: World) -> None:
        """Sums what each process has given, where nothing else is summed."""
        self.hear(world.sum(self.given))

    def ending(self) -> BaseException:
        """What ends the process, after its state was saved: `SystemExit`, or as Ctrl-C does."""
        assert self.stopping
        return SystemExit(PREEMPTED) if self.heard["SIGTERM"] else KeyboardInterrupt()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Signals become signs meanwhile; a second Ctrl-C ends the process at once.

        Python tells the main thread only: training in another one is not stopped by signals.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, self._take) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.given[name]:
            if time.monotonic() - self._since > IMPATIENT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.given[name], self._since = 1, time.monotonic()
