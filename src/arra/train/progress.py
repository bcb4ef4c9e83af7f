"""How far a run is: on a terminal a live line, elsewhere a plain line for each line of the log."""

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SHOWN = (
    *("loss_ar", "loss_gva", "gva_constant", "val_loss_ar"),
    *("loss_cca", "reward_margin", "ranked", "val_loss_cca", "images_per_s"),
)
"""Fields of a plain line."""


class Live:
    """What a run shows of itself while it lasts.

    Args:
        steps: of the whole run.
        first_step: done before this session; they do not count for the time left.
    """

    def __init__(self, steps: int, first_step: int) -> None:
        self.steps, self.first_step = steps, first_step
        self._began, self._bar = time.monotonic(), None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[said]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]} left"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=steps, completed=first_step, said="", left="")
            self._bar.start()

    def step(self, step: int) -> None:
        """So many optimizer steps are done: moves the bar, if there is one."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, left=self.remaining(step))

    def line(self, step: int, fields: Mapping[str, float]) -> None:
        """A line of the log was written."""
        parts = [f"{name} {fields[name]:.4g}" for name in SHOWN if name in fields]
        parts += [f"{fields['memory_gb']:.3g} GB"] if "memory_gb" in fields else []
        parts += [f"SKIPPED {fields['skipped']:g}"] if fields.get("skipped") else []
        if self._bar is not None:
            self._bar.update(self._task, completed=step, said="  ".join(parts))
        else:
            left = self.remaining(step)
            print(f"step {step}/{self.steps}  {'  '.join(parts)}  {left} left", flush=True)

    def remaining(self, step: int) -> str:
        """Time to the last step at this session's mean speed."""
        done = step - self.first_step
        return clock((time.monotonic() - self._began) / max(done, 1) * (self.steps - step))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def clock(seconds: float) -> str:
    """3:07, 2:03:07 or 1 d 02:03:07."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02d}:{minute:02d}:{second:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
