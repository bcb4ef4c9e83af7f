"""Runs `arra` commands, each in a process of its own, and kills them where it is told to.

Read from standard input, one command a line, fields separated by tabs: where to kill (a name and a
number), whom (main = the process, all = its whole group), the folder it writes, and the command.
One import serves all: every run is a fork of this process, made before anything has begun.

  sync N      in the N-th flush to the disk: a file is written, but not yet renamed
  batch N     after N batches (or rejects)
  after S     S seconds after the first shard was finished
  never 0     not at all
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEFT_WITHIN = 10.0
"""Seconds within which every process of a killed command must be gone."""


def die_at(owner: Any, name: str, calls: int, die: Callable[[], None]) -> None:
    """Replaces a function by one that dies when it is called so often."""
    real, left = getattr(owner, name), [calls]

    def counted(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            die()
        return real(*arguments)

    setattr(owner, name, counted)


def die_after(seconds: float, notes: Path, die: Callable[[], None]) -> None:
    while not any(notes.glob("*.json")):
        time.sleep(0.005)
    time.sleep(seconds)
    die()


def child(point: str, when: str, whom: str, out: Path, command: list[str]) -> int:
    """The command, in a process group of its own."""
    from arra.cli import main
    from arra.data.progress import Meter

    os.setsid()

    def die() -> None:
        if whom == "all":
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    if point == "sync":
        die_at(os, "fsync", int(when), die)
    elif point == "batch":
        die_at(Meter, "add", int(when), die)
    elif point == "after":
        arguments = (float(when), out / ".progress", die)
        threading.Thread(target=die_after, args=arguments, daemon=True).start()
    return main(command)


def gone(group: int) -> bool:
    """Whether nobody of a process group is left, after a while."""
    latest = time.monotonic() + LEFT_WITHIN
    while time.monotonic() < latest:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


if __name__ == "__main__":
    # Not at the top: processes that decode import this module as well.
    import arra.data.prepare
    import arra.image_tokenizers.loading  # noqa: F401 - for the forks

    runs: list[tuple[int, dict[str, Any]]] = []
    for line in sys.stdin:
        point, when, whom, out, *command = line.rstrip("\n").split("\t")
        pid = os.fork()
        if pid == 0:
            os._exit(child(point, when, whom, Path(out), command))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        folder = Path(out)
        found = {
            "exit": code,
            "begun": any(folder.glob(".progress/*")) or any(folder.glob(".*.partial")),
            "in_a_file": any(folder.glob("**/.*.partial")),
            "done": (folder / "manifest.json").exists(),
        }
        runs.append((pid, found))
    for pid, found in runs:
        print("run " + json.dumps({**found, "gone": gone(pid)}), flush=True)
