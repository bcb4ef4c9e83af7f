"""Runs `arra` commands, each in a process of its own, and kills them where it is told to.

Read from standard input, one command a line, fields separated by tabs: where to kill (a name and a
number), whom (main = the process, all = its whole group; or a signal that main gets instead), the
folder it writes, and the command. One import serves all: every run is a fork of this process, made
before anything has begun. Arguments are modules to import first.

  sync N      in the N-th flush to the disk: a file is written, but not yet renamed
  batch N     after N batches (or rejects)
  after S     S seconds after the first shard was finished
  trains S    S seconds after the first step of training
  validates N at the beginning of the N-th validation
  saves N     while the N-th checkpoint is written: its folder is there, under a hidden name
  never 0     not at all
"""

import importlib
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


def die_in_training(seconds: float, die: Callable[[], None]) -> None:
    import arra.train.loop as loop

    real = loop.optimizer_step

    def first(*arguments: Any) -> None:
        loop.optimizer_step = real
        threading.Timer(seconds, die).start()
        real(*arguments)

    loop.optimizer_step = first


def die_in_saving(number: int, checkpoints: Path, die: Callable[[], None]) -> None:
    """The moment within it is the system's choice: a thread looks as often as it can."""
    seen: set[str] = set()
    while len(seen) < number:
        if checkpoints.is_dir():
            seen |= {p.name for p in checkpoints.iterdir() if p.name.startswith(".step-")}
        time.sleep(0.0005)
    die()


def child(point: str, when: str, whom: str, out: Path, command: list[str]) -> int:
    """The command, in a process group of its own."""
    from arra.cli import main
    from arra.data.progress import Meter

    os.setsid()
    signals = signal.Signals.__members__

    def die() -> None:
        if whom == "all":
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.Signals[whom] if whom in signals else signal.SIGKILL)

    if point == "sync":
        die_at(os, "fsync", int(when), die)
    elif point == "batch":
        die_at(Meter, "add", int(when), die)
    elif point == "after":
        arguments = (float(when), out / ".progress", die)
        threading.Thread(target=die_after, args=arguments, daemon=True).start()
    elif point == "trains":
        die_in_training(float(when), die)
    elif point == "validates":
        import arra.train.loop as loop

        die_at(loop, "validate", int(when), die)
    elif point == "saves":
        of_saving = (int(when), out / "checkpoints", die)
        threading.Thread(target=die_in_saving, args=of_saving, daemon=True).start()
    try:
        return main(command)
    except SystemExit as error:
        return int(str(error.code))


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
    for module in sys.argv[1:] or ("arra.data.prepare", "arra.image_tokenizers.loading"):
        importlib.import_module(module)

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
