"""run_card.json: what a stranger needs in order to judge, and to repeat, a run.

Written when training begins, brought up to date at each checkpoint and at the end: a run that was
killed has one too. Nothing in it says where files lie or whose machine it was.
"""

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy
import torch
import transformers
from torch import Tensor

import arra
from arra.config import TrainConfig
from arra.config_json import RESUMABLE, to_json
from arra.files import read_json, write_json
from arra.train.world import World

if TYPE_CHECKING:
    from arra.train.setup import Run

FILE = "run_card.json"


@dataclasses.dataclass
class Session:
    """One process' life, or that of all that torchrun started, from opening the run to its end.

    Attributes:
        started, ended: UTC; no end was written by one that was killed.
        how: running, finished, stopped (asked to end before the last step), preempted (SIGTERM),
            interrupted (Ctrl-C), failed, or killed: found by the session after it.
        from_step, to_step: optimizer steps done; the second as of the last checkpoint.
        processes, machines, device, threads: what it ran on; threads are those of one process.
        cross_entropy: the kernel of the loss, ours or liger.
        process: which process 0 is, for `is_alive`; says nothing to people.
        seconds: from the start, up to the last checkpoint or the end.
        error: what it failed with.
    """

    started: str
    from_step: int
    to_step: int
    processes: int
    machines: int
    device: str
    threads: int
    cross_entropy: str = "ours"
    process: str = ""
    how: str = "running"
    ended: str | None = None
    seconds: float = 0.0
    error: str = ""


class RunCard:
    """The card of a run, and in it this session. Process 0 writes; the others only hold it.

    As a context it notes how the session ends.
    """

    def __init__(self, run: "Run", first_step: int, began: float) -> None:
        """Args:
        first_step: optimizer steps that were done before.
        began: `time.monotonic()` when the command began; loading belongs to a session.
        """
        self.run, self.began, self.step = run, began, first_step
        self.skipped = 0
        self.path = run.folder / FILE
        self.sessions = _sessions_before(self.path) if run.world.is_main else []
        self.session = Session(
            started=_now(),
            from_step=first_step,
            to_step=first_step,
            processes=run.world.size,
            machines=_machines(run.world),
            device=_device(run.world),
            threads=torch.get_num_threads(),
            cross_entropy=run.step.objective.kernel,
            process=_process_name(os.getpid()),
        )
        self.sessions.append(self.session)
        self._about = _about(run) if run.world.is_main else {}
        self._write()

    def __enter__(self) -> "RunCard":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.session.ended, self.session.how = _now(), self._how(error)
        if error is not None and self.session.how == "failed":
            self.session.error = self._without_places(f"{type(error).__name__}: {error}")
        self._write()

    def update(self, step: int, skipped: int = 0) -> None:
        """Notes that a checkpoint was written after `step` optimizer steps.

        Args:
            skipped: how many of the run's steps were skipped, because they were not finite.
        """
        self.step, self.skipped = step, skipped
        self.session.to_step = step
        self._write()

    def _how(self, error: BaseException | None) -> str:
        if error is None:
            return "finished" if self.step >= self.run.config.steps else "stopped"
        if isinstance(error, KeyboardInterrupt):
            return "interrupted"
        return "preempted" if isinstance(error, SystemExit) else "failed"

    def _without_places(self, text: str) -> str:
        for place, name in ((self.run.folder.resolve(), "RUN"), (self.run.folder, "RUN")):
            text = text.replace(str(place), name) if place.name else text
        return text.replace(str(Path.home()), "~")

    def _write(self) -> None:
        if not self.run.world.is_main:
            return
        self.session.seconds = round(time.monotonic() - self.began, 1)
        sessions = [dataclasses.asdict(session) for session in self.sessions]
        write_json(self.path, {**self._about, "progress": self._progress(), "sessions": sessions})

    def _progress(self) -> dict[str, Any]:
        config, seconds = self.run.config, sum(s.seconds for s in self.sessions)
        device_hours = {"gpu": 0.0, "processor": 0.0}
        for session in self.sessions:
            on_gpu = session.device != "cpu"
            busy = session.processes * (1 if on_gpu else session.threads)
            device_hours["gpu" if on_gpu else "processor"] += session.seconds * busy / 3600
        seen = self.step * config.batch_size
        return {
            "state": self.session.how,
            "step": self.step,
            "steps": config.steps,
            "samples_seen": seen,
            "epochs": round(seen / self.run.loader.num_samples, 4),
            "skipped_steps": self.skipped,
            "steps_computed": sum(s.to_step - s.from_step for s in self.sessions),
            "seconds": round(seconds, 1),
            "hours": round(seconds / 3600, 4),
            "gpu_hours": round(device_hours["gpu"], 4),
            "processor_hours": round(device_hours["processor"], 4),
        }


def public_name(spec: str) -> str:
    """What a dataset or a model is called, without where it lies: a hub id or `builtin:` name as
    it is, of a path or a URL its last part."""
    located = spec.partition("?")[0].rstrip("/")
    is_place = "://" in located or located[:1] in ("/", ".", "~") or Path(located).exists()
    return located.rpartition("/")[2] or located if is_place else located


def config_hash(config: TrainConfig) -> str:
    """SHA-256 of the settings that make a run what it is: equal for two runs that should agree,
    wherever they lie and however their steps are split."""
    kept = _without_resumable(to_json(config), "")
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _without_resumable(value: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {
        name: _without_resumable(each, f"{prefix}{name}.") if isinstance(each, dict) else each
        for name, each in value.items()
        if f"{prefix}{name}" not in RESUMABLE
    }


def is_alive(process: str) -> bool | None:
    """Whether a session's process still runs; None where that cannot be known from here."""
    here, _, rest = process.partition(":")
    number = rest.partition(":")[0]
    if not number or here != _process_name(os.getpid()).partition(":")[0]:
        return None  # another machine, another container, or no Linux
    return process == _process_name(int(number))


def _process_name(number: int) -> str:
    """`HERE:PID:BEGUN`: a hash of this boot and its process space, and when the process began, so
    that a number that is given out again is another process. Empty where /proc does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    here = hashlib.sha256(boot + space.encode()).hexdigest()[:12]
    try:
        status = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"{here}:{number}:gone"
    return f"{here}:{number}:{status.rpartition(')')[2].split()[19]}"


def _sessions_before(path: Path) -> list[Session]:
    """Of the run so far; one that wrote no end was killed."""
    if not path.exists():
        return []
    try:
        sessions = [Session(**each) for each in read_json(path)["sessions"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no run card that this version can carry on ({error}): move it away"
        ) from None
    for session in sessions:
        if session.ended is None:
            session.how = "killed"
    return sessions


def _about(run: "Run") -> dict[str, Any]:
    """What does not change while a session lasts."""
    config, manifest = run.config, run.loader.dataset.manifest
    known = manifest.aligned() | {name: t.info for name, t in run.loader.targets.items()}
    parameters = list(run.backbone.model.parameters())
    return {
        "arra": arra.__version__,
        "commit": _commit(),
        "recipe": config.recipe,
        "model": {
            "name": public_name(config.model_path) if config.model_path else None,
            "architecture": type(run.backbone.model).__name__,
            "parameters": sum(map(_values, parameters)),
            "trained": sum(_values(p) for p in parameters if p.requires_grad),
        },
        "data": {
            "name": public_name(config.data_folder),
            "source": public_name(str(manifest.source.get("name", ""))),
            "rows": {name: info.rows for name, info in manifest.splits.items()},
        },
        "hashes": {
            "config": config_hash(config),
            "dataset_manifest": read_json(run.folder / "config.json")["run"]["dataset"],
            "image_tokenizer": manifest.tokenizer.fingerprint,
            "encoders": {name: info.encoder for name, info in known.items()},
            "text_encoders": {n: info.encoder for n, info in manifest.text_features.items()},
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
            "cuda": torch.version.cuda if run.world.device.type == "cuda" else None,
        },
        "hardware": _hardware(run.world),
    }


def _hardware(world: World) -> dict[str, Any]:
    """Of process 0's machine; the others are taken to be like it."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpu = _device(world) if world.device.type == "cuda" else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(pages / 1e9, 1),
        "accelerator": gpu,
        "processes": world.size,
        "machines": _machines(world),
        "threads": torch.get_num_threads(),
    }


def _machines(world: World) -> int:
    return max(1, world.size // world.local_size)


def _device(world: World) -> str:
    is_gpu = world.device.type == "cuda"
    return torch.cuda.get_device_name(world.device) if is_gpu else world.device.type


def _values(parameter: Tensor) -> int:
    """Packed 4-bit weights are two a byte."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _commit() -> str | None:
    """The package's commit, if it runs from a git checkout."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _processor() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        return None
    return platform.processor() or None
