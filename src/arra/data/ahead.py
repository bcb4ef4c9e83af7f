"""Values of successive steps, made in a thread while earlier ones are used."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Ahead(Generic[Value]):
    """Makes `make(step)` before it is asked for: those of the next steps, in one thread.

    Any step may be asked for; what was made for others is then dropped. A mistake that is made for
    a step is raised when that step is taken.

    Args:
        make: called in the thread, for one step at a time; its value is the same whoever calls.
        end: steps from here on are made only when they are asked for.
        depth: how many steps ahead.

    Attributes:
        waited: seconds that `take` has waited since this was last set to 0.
    """

    def __init__(self, make: Callable[[int], Value], end: int, depth: int = 2) -> None:
        self._make, self._end, self._depth = make, end, depth
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._coming: dict[int, Future[Value]] = {}
        self.waited = 0.0

    def take(self, step: int) -> Value:
        """The value of `step`."""
        started = time.perf_counter()
        wanted = range(step, max(step + 1, min(step + 1 + self._depth, self._end)))
        for other in self._coming.keys() - set(wanted):
            self._coming.pop(other).cancel()
        for each in wanted:
            if each not in self._coming:
                self._coming[each] = self._pool.submit(self._make, each)
        try:
            return self._coming.pop(step).result()
        finally:
            self.waited += time.perf_counter() - started

    def stop(self) -> None:
        """Begins nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Ends the thread; waits for the value that it is making, and for no other."""
        self._pool.shutdown(cancel_futures=True)
