"""A study's stages: announced, timed, and skipped where their result is already there."""

import time
from collections.abc import Callable
from pathlib import Path

from arra.files import read_json, write_json


class Stages:
    """Runs named stages in order and keeps their seconds in `stages.json`, over all resumes.

    Only time in which something was done counts: a stage that finds its result finished adds none.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.file, self.say = folder / "stages.json", say
        self.seconds: dict[str, float] = read_json(self.file) if self.file.exists() else {}
        self.started = time.monotonic()

    def run(self, name: str, done: bool, work: Callable[[], None]) -> None:
        """Does `work` unless it is `done`; an interrupted stage's time counts as well."""
        if done:
            self.say(f"== {name}: done before ({clock(self.seconds.get(name, 0.0))})")
            return
        self.say(f"== {name}   (at {clock(time.monotonic() - self.started)})")
        began = time.monotonic()
        try:
            work()
        finally:
            # Rounded before it is used: a resumed study reads this file and must say the same.
            spent = self.seconds.get(name, 0.0) + time.monotonic() - began
            self.seconds[name] = round(spent, 1)
            write_json(self.file, self.seconds)
        self.say(f"   {name} took {clock(time.monotonic() - began)}")

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def clock(seconds: float) -> str:
    """Seconds as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
