"""Writes shards one after another in a thread of its own, while the next ones are made."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from arra.data.plan import Unit
from arra.data.progress import Usage
from arra.data.shard_file import Row
from arra.data.sources import Reject

AHEAD = 2
"""Finished shards that wait in memory at most, the one being written among them."""


class Writer:
    """Use as a context; `finish` at its end, or what is not written yet is left.

    Args:
        write: writes a unit, such as `Job.write`. After its first error nothing more is written.
        usage: learns how long whoever calls `put` had to wait.
    """

    def __init__(self, write: Callable[[Unit, Sequence[Row | Reject]], None], usage: Usage) -> None:
        self._write, self._usage = write, usage
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._waiting: deque[Future[None]] = deque()
        self._failed = False

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def put(self, unit: Unit, done: Sequence[Row | Reject]) -> None:
        """Hands over a unit.

        Raises:
            OSError: this or an earlier one could not be written.
        """
        with self._usage.waiting("the disk"):
            self._settle(AHEAD - 1)
        self._waiting.append(self._thread.submit(self._next, unit, done))

    def finish(self) -> None:
        """Waits until everything is written; raises as `put`."""
        with self._usage.waiting("the disk"):
            self._settle(0)

    def check(self) -> None:
        """Raises the error of what could not be written meanwhile."""
        self._settle(len(self._waiting))

    def _settle(self, left: int) -> None:
        """Waits until no more than `left` are waiting; those that are done are looked at anyway."""
        while self._waiting and (len(self._waiting) > left or self._waiting[0].done()):
            self._waiting.popleft().result()

    def _next(self, unit: Unit, done: Sequence[Row | Reject]) -> None:
        if self._failed:
            return
        self._failed = True  # until it is written
        self._write(unit, done)
        self._failed = False
