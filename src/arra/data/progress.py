"""How far a long job is: a bar with a time estimate on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY = 10.0
"""Seconds between plain lines."""


class Meter:
    """Counts images of one job. Use as a context; everything goes to standard error.

    Args:
        what: the job, first word of each line.
        total: images altogether.
        done: images that an earlier run has finished; they do not count for the speed.
        note: says more, whenever a line is shown.
    """

    def __init__(
        self, what: str, total: int, done: int = 0, note: Callable[[], str] | None = None
    ) -> None:
        self.what, self.total, self.done, self.left_out = what, total, done, 0
        self._note = note
        self._before = done
        self._begun = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("images"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(what, total=total, completed=done, note="")

    def __enter__(self) -> "Meter":
        if self._bar is not None:
            self._bar.start()
        elif self._before:
            self._line(f"going on, {self._before} of {self.total} images are finished")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self.done != self._before:
            self._line(self._state())

    def add(self, images: int, left_out: int = 0) -> None:
        """Counts `images` more rows done, `left_out` of which were rejected."""
        self.done += images
        self.left_out += left_out
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=", ".join(self._notes()))
        elif time.monotonic() - self._last_line >= LINE_EVERY:
            self._last_line = time.monotonic()
            self._line(self._state())

    def _state(self) -> str:
        speed = (self.done - self._before) / max(1e-9, time.monotonic() - self._begun)
        parts = [f"{self.done}/{self.total} images", f"{speed:.1f} images/s"]
        if self.done < self.total and speed > 0:
            parts.append(f"about {_duration((self.total - self.done) / speed)} left")
        return ", ".join(parts + self._notes())

    def _notes(self) -> list[str]:
        left_out = [f"{self.left_out} left out"] if self.left_out else []
        return left_out + ([self._note()] if self._note is not None else [])

    def _line(self, text: str) -> None:
        print(f"{self.what}: {text}", file=sys.stderr, flush=True)


_Item = TypeVar("_Item")


class Usage:
    """How much of the time a device computes, and what it waits for otherwise.

    Attributes:
        device: seconds in which it was busy.
        waited: seconds of waiting, by what for.
    """

    def __init__(self) -> None:
        self.device = 0.0
        self.waited = {"pictures": 0.0, "the disk": 0.0}
        self._begun = time.monotonic()

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """What happens inside is waiting for `what`."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.waited[what] += time.monotonic() - begun

    def pictures(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """The same items; until each comes, the device waits for pictures."""
        each = iter(items)
        while True:
            with self.waiting("pictures"):
                item = next(each, None)
            if item is None:
                return
            yield item

    def shares(self) -> dict[str, float]:
        """Of the time since the start. A GPU may compute while others wait for pictures."""
        seconds = max(1e-9, time.monotonic() - self._begun)
        idle = max(0.0, seconds - self.device)
        return {
            "device": min(1.0, self.device / seconds),
            **{what: min(waited, idle) / seconds for what, waited in self.waited.items()},
        }

    def told(self) -> str:
        """In one line."""
        shares = self.shares()
        waits = [f"{shares[what]:.0%} for {what}" for what in self.waited]
        return f"device {shares['device']:.0%} busy, waiting {' and '.join(waits)}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
