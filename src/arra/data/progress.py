"""How far a long job is: a bar with a time estimate on a terminal, plain lines elsewhere."""

import sys
import time

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
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.total, self.done, self.left_out = what, total, done, 0
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
        elif self.done != self._before:
            self._line(self._state())

    def add(self, images: int, left_out: int = 0) -> None:
        """Counts `images` more rows done, `left_out` of which were rejected."""
        self.done += images
        self.left_out += left_out
        if self._bar is not None:
            note = f"{self.left_out} left out" if self.left_out else ""
            self._bar.update(self._task, completed=self.done, note=note)
        elif time.monotonic() - self._last_line >= LINE_EVERY:
            self._last_line = time.monotonic()
            self._line(self._state())

    def _state(self) -> str:
        speed = (self.done - self._before) / max(1e-9, time.monotonic() - self._begun)
        parts = [f"{self.done}/{self.total} images", f"{speed:.1f} images/s"]
        if self.done < self.total and speed > 0:
            parts.append(f"about {_duration((self.total - self.done) / speed)} left")
        if self.left_out:
            parts.append(f"{self.left_out} left out")
        return ", ".join(parts)

    def _line(self, text: str) -> None:
        print(f"{self.what}: {text}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
