"""What a run writes while it lasts: log lines, rates, trackers that may fail, progress."""

import dataclasses
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import small_config, small_dataset, small_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from arra.config import LogConfig, ModelConfig, TrainConfig
from arra.doctor.devices import GPUS, peak_tflops
from arra.train import progress
from arra.train.monitor import Monitor
from arra.train.progress import Live, clock
from arra.train.setup import Run
from arra.train.throughput import MEASURED, ModelFlops
from arra.train.trackers import FILE, require_trackers
from arra.train.world import World

FIELDS = {"loss_ar": 2.0, "loss_gva": 0.5, "images_per_s": 8.0, "memory_gb": 1.5, "skipped": 0}
RED = Image.new("RGB", (8, 4), (255, 0, 0))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data"))


def run_in(folder: Path, data: Path, **changes: Any) -> Run:
    folder.mkdir(exist_ok=True)
    run = small_run(small_config(data, **changes), World(torch.device("cpu")))
    return dataclasses.replace(run, folder=folder)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---- the log and TensorBoard ---------------------------------------------------------------------


def next_second() -> None:
    """TensorBoard reads event files by name: their second, then a number that sorts 10 before 9."""
    now = int(time.time())
    while int(time.time()) == now:
        time.sleep(0.01)


def test_lines_are_kept_up_to_the_step_that_is_resumed(tmp_path: Path, data: Path) -> None:
    run = run_in(tmp_path / "run", data)
    with Monitor(run, 0, 0) as monitor:
        for step in (2, 4, 6):
            monitor.write(step, FIELDS)
        monitor.picture("samples", RED, 4)
    with open(run.folder / "log.jsonl", "a") as log:
        log.write('{"step": 8, "los')  # killed
    next_second()
    with Monitor(run, 4, 4) as monitor:
        monitor.write(6, FIELDS | {"loss_ar": 1.0})
    assert [line["step"] for line in lines_of(run.folder)] == [2, 4, 6]
    assert lines_of(run.folder)[-1]["images_seen"] == 48
    board = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss_ar")] == [(2, 2.0), (4, 2.0), (6, 1.0)]
    assert [e.step for e in board.Images("samples")] == [4]
    assert "config/text_summary" in board.Tags()["tensors"]


def test_numbers_that_are_not_finite_end_the_run(tmp_path: Path, data: Path) -> None:
    run = run_in(tmp_path / "run", data)
    with Monitor(run, 0, 0) as monitor, pytest.raises(FloatingPointError, match="loss_ar is nan"):
        monitor.write(2, FIELDS | {"loss_ar": float("nan")})


def test_rates_are_those_of_training_alone(tmp_path: Path, data: Path, monkeypatch) -> None:
    run = run_in(tmp_path / "run", data)
    now = [100.0]
    monkeypatch.setattr("arra.train.throughput.time.monotonic", lambda: now[0])
    with Monitor(run, 0, 0) as monitor:
        now[0] += 8.0
        with monitor.apart():
            now[0] += 2.0
        found = monitor.measured(4, {"tokens": 100.0, "squares": 1000.0, "labels": 50.0})
    assert found["images_per_s"] == pytest.approx(4 * 8 / 8.0)
    assert found["tokens_per_s"] == pytest.approx(4 * 100 / 8.0)
    assert found["overhead"] == pytest.approx(0.2)
    assert found["tflops"] > 0
    assert 0.05 < found["memory_gb"] < 100
    assert "mfu" not in found  # a CPU's peak is not known
    assert set(found) <= set(MEASURED)


@pytest.mark.parametrize("lora", [False, True])
def test_counted_operations_are_those_of_torch(lora: bool, tmp_path: Path, data: Path) -> None:
    """A forward and backward pass, eager attention; the projectors are not the model's."""
    model = ModelConfig(
        layers=2, hidden_size=24, heads=2, mlp_size=32, text_vocabulary=280, attention="eager"
    )
    run = run_in(tmp_path / "run", data, model=model)
    backbone = run.backbone
    if lora:  # frozen matrices have no gradient of their own
        for block in backbone.blocks:
            block.mlp.requires_grad_(False)
    micro = run.loader.step(0)[0]
    rows, length = micro.batch.ids_BT.shape
    with FlopCounterMode(display=False) as counter:
        backbone.head(backbone.last_hidden(micro.batch.ids_BT).flatten(0, 1)).sum().backward()
    expected = ModelFlops.of(backbone).total(rows * length, rows * length**2, rows * length)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_gpu_is_known_by_its_drivers_name(name: str, known: str | None) -> None:
    expected = None if known is None else GPUS[known].bfloat16
    assert peak_tflops(name, "bfloat16") == expected


# ---- trackers ------------------------------------------------------------------------------------


class Recorder:
    """Stands for wandb and trackio, as far as they are called."""

    def __init__(self, refuses: type[Exception] | None = None, breaks_at: int = 10**9) -> None:
        self.refuses, self.breaks_at = refuses, breaks_at
        self.started: list[dict] = []
        self.logged: list[dict] = []
        self.ended: list[Any] = []

    def module(self, name: str) -> types.ModuleType:
        made = types.ModuleType(name)
        made.init, made.Image = self.init, lambda picture: picture.size  # type: ignore[attr-defined]
        made.Settings = dict  # type: ignore[attr-defined]
        made.errors = types.SimpleNamespace(Error=LibraryError)  # type: ignore[attr-defined]
        made.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
        return made

    def init(self, **settings: Any) -> "Recorder":
        if self.refuses is not None:
            raise self.refuses("no network")
        self.started.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        pass

    def log(self, values: dict, step: int | None = None) -> None:
        if len(self.logged) >= self.breaks_at:
            raise LibraryError("the server is gone")
        self.logged.append(values if step is None else {**values, "step": step})

    def finish(self, exit_code: int = 0) -> None:
        self.ended.append(exit_code)


class LibraryError(Exception):
    pass


@pytest.fixture
def recorded(monkeypatch) -> dict[str, Recorder]:
    found = {"wandb": Recorder(), "trackio": Recorder()}
    for name, recorder in found.items():
        monkeypatch.setitem(sys.modules, name, recorder.module(name))
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "TRACKIO_DIR"):
        monkeypatch.setenv(name, "set so that the test leaves nothing behind")
    return found


def tracked(data: Path) -> dict[str, Any]:
    return {"log": LogConfig(trackers=("wandb", "trackio"))}


def test_trackers_get_everything_and_know_the_run_again(
    tmp_path: Path, data: Path, recorded: dict[str, Recorder]
) -> None:
    run = run_in(tmp_path / "run", data, **tracked(data))
    for first in (0, 2):
        with Monitor(run, first, first) as monitor:
            monitor.write(first + 2, FIELDS)
            monitor.picture("samples", RED, first + 2)
    with pytest.raises(RuntimeError), Monitor(run, 4, 4):
        raise RuntimeError("a mistake")
    ids = json.loads((run.folder / FILE).read_text())
    wandb, trackio = recorded["wandb"], recorded["trackio"]
    assert {s["id"] for s in wandb.started} == {ids["wandb"]}
    assert {s["name"] for s in trackio.started} == {f"run-{ids['trackio']}"}
    assert {s["resume"] for s in [*wandb.started, *trackio.started]} == {"allow"}
    assert wandb.started[0]["dir"] == str(run.folder)
    for recorder in recorded.values():
        assert [line["step"] for line in recorder.logged] == [2, 2, 4, 4]
        assert recorder.logged[0]["loss_ar"] == 2.0
        assert recorder.logged[1]["samples"] == (8, 4)
    assert wandb.ended == [0, 0, 1]


def test_a_tracker_that_fails_is_given_up_once(
    tmp_path: Path, data: Path, recorded: dict[str, Recorder], capsys
) -> None:
    recorded["wandb"].breaks_at, recorded["trackio"].refuses = 1, ConnectionError
    run = run_in(tmp_path / "run", data, **tracked(data))
    with Monitor(run, 0, 0) as monitor:
        for step in (2, 4, 6):
            monitor.write(step, FIELDS)
    said = capsys.readouterr().err
    assert said.count("wandb is given up, training goes on (the server is gone)") == 1
    assert said.count("trackio is given up, training goes on (no network)") == 1
    assert len(lines_of(run.folder)) == 3
    assert len(recorded["wandb"].logged) == 1


def test_a_tracker_that_refuses_a_login_does_not_end_training(
    tmp_path: Path, data: Path, recorded: dict[str, Recorder], capsys
) -> None:
    recorded["wandb"].refuses = LibraryError
    run = run_in(tmp_path / "run", data, **tracked(data))
    with Monitor(run, 0, 0) as monitor:
        monitor.write(2, FIELDS)
    assert "wandb is given up" in capsys.readouterr().err
    assert len(recorded["trackio"].logged) == 1


def test_a_missing_library_is_named_with_its_extra(monkeypatch) -> None:
    monkeypatch.setattr("arra.train.trackers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--log.trackers wandb needs pip install 'arra\[wandb\]'"):
        require_trackers(["wandb"])


# ---- progress ------------------------------------------------------------------------------------


def test_plain_lines_elsewhere_than_on_a_terminal(capsys) -> None:
    live = Live(100, 40)
    live.step(50)
    live.line(50, FIELDS | {"skipped": 2})
    live.close()
    said = capsys.readouterr().out
    assert said.startswith(
        "step 50/100  loss_ar 2  loss_gva 0.5  images_per_s 8  1.5 GB  SKIPPED 2"
    )
    assert said.endswith(" left\n")


def test_a_live_line_on_a_terminal(capsys, monkeypatch) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    live = Live(100, 0)
    live.step(10)
    live.line(10, FIELDS)
    live.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "loss_ar 2" in captured.err
    assert captured.err.count("\n") == 1


def test_clock() -> None:
    seconds = [0, 59, 61, 3599, 3600, 90_061]
    told = ["0:00", "0:59", "1:01", "59:59", "1:00:00", "1 d 01:01:01"]
    assert [clock(each) for each in seconds] == told


def test_options_are_read_back() -> None:
    from arra.config_json import from_json, to_json

    config = TrainConfig("data", "out", log=LogConfig(trackers=("wandb",), probe_every=5))
    assert from_json(TrainConfig, json.loads(json.dumps(to_json(config)))) == config
    assert np.all(np.asarray(RED)[..., 0] == 255)
