"""Makes the units of a job on Ray: on this machine, or on a cluster that is joined by its address.

Ray Data takes the numbers of the waiting units through a pool of workers, each with its share of
CPUs and GPUs. A worker opens the same job from its settings, makes units as engine_local does and
writes their shards itself: nothing but numbers travels. Ray starts a worker that died again, and
gives its unit to the next one.

Legend: a unit is one shard, known by its place in `Job.units`.
"""

import contextlib
import logging
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from arra.data import engine_local
from arra.data.job import Job, open_job
from arra.data.plan import FILE as PLAN
from arra.data.plan import Unit
from arra.data.prepare_config import PrepareConfig
from arra.data.progress import Meter
from arra.device import pick_device
from arra.files import read_json
from arra.image_tokenizers.interface import ImageTokenizer

ATTEMPTS = 4
"""How often a unit is begun before it is taken to be what kills its workers."""
UNITS_TOGETHER = 8
"""The most units that a worker is given at once: reading, computing and writing then overlap."""
SHOWS_WITHIN = 60.0
"""Seconds until a shard that another machine wrote must be seen here (NFS keeps old listings)."""
OBJECT_STORE = 2**28
"""Bytes of shared memory for Ray's own objects, which are small here."""

LOCAL = "local"
"""Ray's name for a cluster of this machine alone, for this process."""

SHARED = "--out must be on a file system that all machines share, or in an object store"

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_memory_monitor_refresh_ms": "0",
}
"""Set before Ray is imported, unless the user has: nothing is reported to its makers, errors are
told by us, and a Ray that we start kills no worker because others take the machine's memory."""


@dataclass(frozen=True)
class Workers:
    """How many workers, and what each of them is given."""

    number: int
    cpus: float
    gpus: float


class RayEngine:
    """Ray for one preparation. Use as a context.

    Args:
        config: what is prepared; its `ray_address` says where Ray is.

    Raises:
        ValueError: Ray is not installed, is not found at the address, or has not what is asked for.
    """

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config

    def __enter__(self) -> "RayEngine":
        address = self._config.ray_address or os.environ.get("RAY_ADDRESS") or LOCAL
        self._ray = _imported(address)
        self._ours = not self._ray.is_initialized()
        if self._ours:
            _start(self._ray, address)
        self._context = self._ray.data.DataContext.get_current()
        self._bars = self._context.enable_progress_bars
        self._context.enable_progress_bars = False
        return self

    def __exit__(self, *_: object) -> None:
        self._context.enable_progress_bars = self._bars
        if self._ours:
            self._ray.shutdown()

    def open(self, image_tokenizer: ImageTokenizer | None) -> Job:
        """The job as its workers will see it; here the models stay on the CPU, they do no work.

        Raises:
            ValueError: wrong or changed settings.
        """
        if image_tokenizer is not None:
            raise ValueError("--engine ray: workers load the image tokenizer by its name")
        device = self._config.device
        if device.startswith("cuda:"):
            raise ValueError(f"--device {device}: Ray gives each worker its GPU, say cuda")
        gpus = self._ray.cluster_resources().get("GPU", 0)
        if device == "auto":
            device = "cuda" if gpus else "cpu"
        if device == "cuda" and not gpus:
            raise ValueError("--device cuda: the Ray cluster has no GPU, use cpu or auto")
        if device != "cuda":
            pick_device(device)
        return open_job(replace(self._config, device=device), here="cpu")

    def make_units(self, job: Job, waiting: Sequence[Unit]) -> None:
        """Makes the shards of the units in `waiting`.

        Raises:
            ValueError, OSError: what the first worker to fail says, in one sentence.
        """
        if not waiting:
            return
        places = {(unit.split, unit.number): place for place, unit in enumerate(job.units)}
        numbers = [{"unit": places[unit.split, unit.number]} for unit in waiting]
        workers = self._workers(job, len(waiting))
        together = max(1, min(UNITS_TOGETHER, len(waiting) // (4 * workers.number)))
        config = job.config
        if config.workers == "auto":  # of its own CPUs, not of the machine's
            few = together * config.shard_rows < engine_local.ROWS_FOR_PROCESSES
            config = replace(config, workers=0 if few else max(1, int(workers.cpus) - 1))
        counter = self._ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Attempts)
        attempts = counter.remote()
        data = self._ray.data
        made = data.from_items(numbers, override_num_blocks=-(-len(numbers) // together))
        made = made.map_batches(
            _Worker,
            fn_constructor_args=(config, os.getcwd(), attempts),
            batch_size=None,
            compute=data.ActorPoolStrategy(size=workers.number, max_tasks_in_flight_per_actor=1),
            num_cpus=workers.cpus,
            num_gpus=workers.gpus,
        )
        total = sum(unit.stop - unit.start for unit in job.units)
        done = total - sum(unit.stop - unit.start for unit in waiting)
        with Meter("prepare", total, done) as meter, self._told():
            for batch in made.iter_batches(batch_size=None, prefetch_batches=0):
                for place, errno, error in zip(
                    batch["unit"], batch["errno"], batch["error"], strict=True
                ):
                    if error:
                        raise OSError(int(errno), str(error)) if errno else ValueError(str(error))
                    unit = job.units[int(place)]
                    meter.add(unit.stop - unit.start, len(_seen(job, unit)["rejects"]))

    def _workers(self, job: Job, units: int) -> Workers:
        config, there = job.config, self._ray.cluster_resources()
        all_gpus, all_cpus = there.get("GPU", 0.0), there.get("CPU", 0.0)
        gpus = config.ray_gpus or (1.0 if job.plan["device"] == "cuda" else 0.0)
        share = max(1.0, all_cpus * gpus // max(1.0, all_gpus)) if gpus else job.plan["threads"]
        cpus = float(config.ray_cpus or share)
        fits = [
            min(
                node["Resources"].get("CPU", 0.0) // cpus,
                node["Resources"].get("GPU", 0.0) // gpus if gpus else float("inf"),
            )
            for node in self._ray.nodes()
            if node["Alive"]
        ]
        number = int(sum(fits))
        if number == 0:
            flags = f"--ray-cpus {cpus:g}" + (f" --ray-gpus {gpus:g}" if gpus else "")
            raise ValueError(
                f"no machine of the Ray cluster has {cpus:g} CPUs"
                + (f" and {gpus:g} GPUs" if gpus else "")
                + f" for one worker: give it less than {flags}"
            )
        return Workers(min(units, config.ray_workers or number), cpus, gpus)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Says in one sentence what Ray says in pages."""
        try:
            yield
        except self._ray.exceptions.RayError as error:
            raise ValueError(f"a worker of Ray failed: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """What the innermost traceback ends with; of errors without one, their first line."""
    text = str(error)
    found = re.search(r"^[\w.]*(Error|Exception)\b.*$", text, re.M)
    return found[0] if found else (text.strip().splitlines() or [type(error).__name__])[0]


def _imported(address: str) -> ModuleType:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    tokens = (os.environ.get("RAY_AUTH_TOKEN"), os.environ.get("RAY_AUTH_TOKEN_PATH"))
    if address != LOCAL and (any(tokens) or (Path.home() / ".ray" / "auth_token").is_file()):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as `ray start` does where it finds one
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--engine ray needs the package {error.name!r}: pip install 'arra[ray]'"
        ) from None
    return ray


def _start(ray: ModuleType, address: str) -> None:
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    options: dict[str, Any] = {}
    if address == LOCAL:
        # Its processes find each other without a network; no web server, little memory set aside.
        options = {
            "_node_ip_address": "127.0.0.1",
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE,
        }
    try:
        with _hushed():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"--ray-address {address}: Ray cannot be joined ({_reason(error.__cause__ or error)})"
        ) from None


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Nothing on standard error, where Ray's C++ part tells which log level it has read."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _seen(job: Job, unit: Unit) -> dict[str, Any]:
    """The note of a unit that a worker reports as made.

    Raises:
        ValueError: it is not there: the workers write to another disk.
    """
    latest = time.monotonic() + SHOWS_WITHIN
    while True:
        if job.note(unit).is_file():
            note = read_json(job.note(unit))
            if note["shard"] is None or (job.out / note["shard"]["file"]).is_file():
                return note
        if time.monotonic() > latest:
            raise ValueError(
                f"a worker made {unit.file}, but this machine does not see it in {job.out}: "
                f"{SHARED}"
            )
        time.sleep(0.2)


class _Worker:
    """One process of the pool: holds the open job, makes one unit per call.

    What a user can mend is returned as a sentence, since Ray would try again what it sees raised.
    """

    def __init__(self, config: PrepareConfig, folder: str, attempts: Any) -> None:
        self._attempts = attempts
        if Path(folder).is_dir():
            os.chdir(folder)  # relative paths mean what they meant where the command was given
        self._job: Job | None = None
        self._error: Exception | None = None
        try:
            _require_plan(config)
            self._job = open_job(config)
        except (ValueError, OSError) as error:
            self._error = error

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        numbers = [int(number) for number in batch["unit"]]
        error = self._error
        if self._job is not None:
            try:
                self._make(self._job, [self._job.units[number] for number in numbers])
            except (ValueError, OSError, FloatingPointError, RuntimeError) as raised:
                error = raised
        number = error.errno if isinstance(error, OSError) else 0
        said = f"{error} (on {socket.gethostname()})" if error else ""
        return {
            "unit": numbers,
            "errno": [number or 0] * len(numbers),
            "error": [said] * len(numbers),
        }

    def _make(self, job: Job, units: Sequence[Unit]) -> None:
        """Makes those that a worker who died had not finished."""
        import ray

        waiting = [unit for unit in units if job.finished(unit) is None]
        if not waiting:
            return
        if ray.get(self._attempts.begin.remote(waiting[0].file)) > ATTEMPTS:
            raise ChildProcessError(
                f"{waiting[0].file} ended its worker {ATTEMPTS} times, as systems do where memory "
                f"runs out: try a smaller --batch-size or more --ray-cpus for each worker"
            )
        engine_local.make_units(job, waiting)


class _Attempts:
    """How often units were begun. Outlives the workers."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, file: str) -> int:
        self._begun[file] += 1
        return self._begun[file]


def _require_plan(config: PrepareConfig) -> None:
    if not (config.out / PLAN).is_file():
        raise ValueError(
            f"{config.out / PLAN}, which the command has just written, is not seen by this "
            f"machine: {SHARED}"
        )
