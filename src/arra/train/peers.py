"""Whether the processes of a run are alike, asked once before anything is computed.

Machines differ in ways that would end in a hang or, worse, in a run that looks well: another
version of a library, other flags, another dataset, an `--out` that is not shared.
"""

import hashlib
import json
import platform
import socket
import time
from importlib.metadata import version
from pathlib import Path

from arra.config import TrainConfig
from arra.config_json import to_json
from arra.files import sha256_of
from arra.train.claim import manifest_hash
from arra.train.world import World

PATIENCE = 60.0
"""Seconds for a file that another machine has written to be seen: NFS clients remember for up to
this long what was not there (acdirmax, nfs(5))."""


def check_peers(world: World, flags: TrainConfig, folder: Path, patience: float = PATIENCE) -> None:
    """Compares every process with process 0, which has written `folder`/config.json.

    Args:
        flags: what this process was started with.

    Raises:
        ValueError: one differs; the message names its machine, what differs, and the remedy.
    """
    if world.size == 1:
        return
    file = folder / "config.json"
    written = world.on_main(lambda: sha256_of(file))
    answers = world.on_all(lambda: _about(flags, _seen(file, written, patience)))
    wrong = [_difference(answers[0], other) for other in answers[1:]]
    for message in wrong:
        if message:
            raise ValueError(message)


def _about(flags: TrainConfig, seen: bool) -> dict[str, str]:
    """What must be the same everywhere, in the order in which it is told."""
    # Places may have other names on each machine; what is in them is compared.
    settings = {k: v for k, v in to_json(flags).items() if k not in ("data_folder", "out")}
    return {
        "machine": socket.gethostname(),
        "arra": version("arra"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "Python": platform.python_version().rpartition(".")[0],
        "flags": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "data": _dataset(flags),
        "out": "" if seen else "another",
    }


def _dataset(flags: TrainConfig) -> str:
    try:
        return manifest_hash(flags)
    except OSError:
        return "none"


def _seen(file: Path, expected: str, patience: float) -> bool:
    """Whether `file` is, or soon becomes, the one with this SHA-256."""
    until = time.monotonic() + patience
    while not file.is_file() or sha256_of(file) != expected:
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def _difference(first: dict[str, str], other: dict[str, str]) -> str:
    """A sentence on what of `other` is not as on process 0, or nothing."""
    here, there = first["machine"], other["machine"]
    name = next((k for k in first if k != "machine" and first[k] != other[k]), None)
    if name is None:
        return ""
    if name == "flags":
        return f"{there} was started with other flags than {here}: give all the same command"
    if name == "data":
        return (
            f"--data on {there} is not the dataset that {here} has: use one folder that all "
            f"machines see, or equal copies"
        )
    if name == "out":
        return (
            f"{there} does not see in --out what {here} has written there: name a folder on "
            f"storage that all machines share"
        )
    return (
        f"{there} has {name} {other[name]}, {here} has {first[name]}: install the same on all "
        f"machines"
    )
