"""prepare --engine ray: the bytes of one machine, whoever is killed, and errors in a sentence.

Everything is drawn and encoded by what is bundled. Ray starts on this machine alone; the long tests
also join a cluster by its address, and kill workers and drivers that they started.
"""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arra.data import engine_ray
from arra.data.job import open_job
from arra.data.plan import Unit
from arra.data.prepare import prepare
from arra.data.prepare_config import PrepareConfig
from arra.data.sources import open_source

IMAGES, SHARD = 20, 4


def config(out: Path, **changes) -> PrepareConfig:
    options = {"encoder": ("builtin:scenes-clip",), "size": 32, "batch_size": 3, "threads": 1}
    options |= {"limit": IMAGES, "shard_rows": SHARD, "splits": ("train",), "workers": 0}
    return PrepareConfig(
        source="builtin:scenes",
        image_tokenizer="builtin:scenes",
        out=out,
        **(options | {"val_fraction": 0.2} | changes),
    )


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def ray():
    """Ray in this process, with one CPU and on the loopback address only."""
    module = pytest.importorskip("ray")
    yield module
    module.shutdown()


def test_ray_on_this_machine_gives_the_bytes_of_the_local_engine(tmp_path, ray, capfd):
    prepare(config(tmp_path / "local"))
    begun = config(tmp_path / "ray", device="cpu")
    open_job(begun)  # only the plan: Ray goes on with what somebody else began
    capfd.readouterr()
    prepare(dataclasses.replace(begun, engine="ray", ray_workers=1))
    assert content(tmp_path / "ray") == content(tmp_path / "local")
    assert not ray.is_initialized(), "what the command has started ends with it"
    said = capfd.readouterr()
    assert said.out == ""
    assert all(line.startswith("prepare: ") for line in said.err.splitlines()), said.err
    assert f"{IMAGES}/{IMAGES} images" in said.err


# ---- without a cluster ---------------------------------------------------------------------------


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"needs the package 'ray': pip install 'arra\[ray\]'"):
        prepare(config(tmp_path / "out", engine="ray"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ray_address": "auto"}, "need --engine ray"),
        ({"ray_workers": 2}, "need --engine ray"),
        ({"engine": "ray", "ray_cpus": -1}, "--ray-cpus must not be negative"),
    ],
)
def test_settings_that_cannot_be(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        config(tmp_path, **changes)


class Nodes:
    """A cluster of machines with two GPUs and eight CPUs each, as Ray describes them."""

    def __init__(self, machines: int, gpus: float) -> None:
        self._each = {"CPU": 8.0} | ({"GPU": gpus} if gpus else {})
        self._machines = machines

    def nodes(self):
        return [{"Alive": True, "Resources": self._each}] * self._machines

    def cluster_resources(self):
        return {name: value * self._machines for name, value in self._each.items()}


@pytest.mark.parametrize(
    ("gpus", "changes", "expected"),
    [
        (0, {}, (8, 3, 0)),  # as many CPUs each as the plan has threads
        (0, {"ray_cpus": 8}, (4, 8, 0)),
        (0, {"ray_workers": 2}, (2, 3, 0)),
        (2, {"device": "cuda"}, (8, 4, 1)),  # one each, and its share of the CPUs
        (2, {"device": "cuda", "ray_gpus": 0.5, "ray_cpus": 2}, (16, 2, 0.5)),
    ],
)
def test_workers_fill_the_cluster(tmp_path, gpus, changes, expected):
    engine = engine_ray.RayEngine(config(tmp_path, engine="ray", **changes))
    engine._ray = Nodes(4, gpus)
    job = open_job(config(tmp_path / "out", engine="ray", threads=3, **changes), here="cpu")
    workers = engine._workers(job, units=100)
    assert (workers.number, workers.cpus, workers.gpus) == expected
    assert engine._workers(job, units=1).number == 1
    engine._ray = Nodes(4, 0.25)
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, ray_cpus=9))
    with pytest.raises(ValueError, match="no machine of the Ray cluster has 9 CPUs"):
        engine._workers(job, units=1)


def test_a_worker_that_does_not_see_the_plan_says_so(tmp_path):
    worker = engine_ray._Worker(config(tmp_path / "elsewhere"), str(tmp_path / "gone"), None)
    answer = worker({"unit": [0, 1]})
    assert answer["unit"] == [0, 1]
    assert "plan.json, which the command has just written, is not seen" in answer["error"][0]
    assert answer["error"][0].endswith(f"(on {socket.gethostname()})")


def test_other_settings_or_versions_on_a_worker_are_its_answer(tmp_path):
    open_job(config(tmp_path / "out"))
    worker = engine_ray._Worker(config(tmp_path / "out", size=40), str(tmp_path / "gone"), None)
    assert "--size was 32, now 40" in worker({"unit": [0]})["error"][0]


class Attempts:
    """Stands for the actor that counts."""

    def __init__(self, count: int) -> None:
        self.begin = self
        self._count = count

    def remote(self, file: str) -> int:
        return self._count


def test_a_unit_that_kills_its_workers_is_not_tried_for_ever(tmp_path, monkeypatch):
    module = pytest.importorskip("ray")
    monkeypatch.setattr(module, "get", lambda count: count)
    begun = config(tmp_path / "out", limit=8)
    job = open_job(begun)
    worker = engine_ray._Worker(begun, str(tmp_path / "gone"), Attempts(engine_ray.ATTEMPTS + 1))
    answer = worker({"unit": [0]})
    assert f"{job.units[0].file} ended its worker 4 times" in answer["error"][0]
    worker = engine_ray._Worker(begun, str(tmp_path / "gone"), Attempts(1))
    assert worker({"unit": [0]})["error"] == [""]
    assert job.finished(job.units[0]) is not None
    counted = engine_ray._Attempts()
    assert [counted.begin("a"), counted.begin("b"), counted.begin("a")] == [1, 1, 2]


def test_a_shard_that_this_machine_does_not_see_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_ray, "SHOWS_WITHIN", 0.0)
    job = open_job(config(tmp_path / "out"))
    unit = Unit("train", 0, open_source("builtin:scenes"), 0, SHARD)
    with pytest.raises(ValueError, match=r"train-00000.parquet, but .* must be on a file system"):
        engine_ray._seen(job, unit)


# ---- with processes that are killed --------------------------------------------------------------


def command(out: Path, *more: str) -> list[str]:
    flags = "--encoder builtin:scenes-clip --limit 96 --shard-rows 4 --batch-size 4 --size 64"
    fixed = "--splits train --threads 1 --workers 0 --val-fraction 0"
    return [
        *(sys.executable, "-m", "arra.cli", "prepare", "builtin:scenes"),
        *("--image-tokenizer", "builtin:scenes", *flags.split(), *fixed.split()),
        *("--out", str(out), *more),
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("local") / "out"
    subprocess.run(command(out), check=True, capture_output=True)
    return content(out)


def begun(out: Path, shards: int, *more: str) -> subprocess.Popen[str]:
    """The command with Ray, running, with so many shards finished."""
    ray = ("--engine", "ray", "--ray-workers", "2", "--ray-cpus", "1", *more)
    process = subprocess.Popen(command(out, *ray), stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 300
    while len(list(out.glob("*.parquet"))) < shards:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.05)
    return process


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """Processes of Ray's that hold an open job, of this driver alone."""
    import psutil

    below = psutil.Process(process.pid).children(recursive=True)
    return [each.pid for each in below if "MapWorker" in " ".join(each.cmdline())]


@pytest.mark.long
def test_killed_workers_lose_no_row(tmp_path, undisturbed):
    pytest.importorskip("ray")
    process = begun(tmp_path / "out", 3)
    killed = workers_of(process)
    assert len(killed) == 2
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    assert process.wait(300) == 0, process.stderr and process.stderr.read()
    assert content(tmp_path / "out") == undisturbed


@pytest.mark.long
def test_a_killed_driver_goes_on_with_the_same_command(tmp_path, undisturbed):
    pytest.importorskip("ray")
    process = begun(tmp_path / "out", 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process = begun(tmp_path / "out", 3)
    assert process.wait(300) == 0
    said = process.stderr.read() if process.stderr else ""
    assert "going on" in said
    assert content(tmp_path / "out") == undisturbed


@pytest.mark.long
def test_a_cluster_joined_by_its_address(tmp_path, undisturbed):
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = f"--head --block --port {port} --num-cpus 2"
    quiet = "--include-dashboard false --disable-usage-stats"
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", *start.split(), *quiet.split()],
        cwd=tmp_path,  # another folder than the driver's: relative paths are the driver's
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = f"127.0.0.1:{port}"
        ray = ("--engine", "ray", "--ray-address", address, "--ray-cpus", "1")
        for _ in range(60):
            done = subprocess.run(command(Path("out"), *ray), cwd=tmp_path, capture_output=True)
            if b"cannot be joined" not in done.stderr:
                break
            time.sleep(1)
        assert done.returncode == 0, done.stderr
        assert content(tmp_path / "out") == undisturbed
        wrong = subprocess.run(
            command(tmp_path / "more", *ray, "--ray-gpus", "1"), capture_output=True, text=True
        )
        assert wrong.returncode == 1
        assert "no machine of the Ray cluster has" in wrong.stderr
    finally:
        head.terminate()
        head.wait(60)
