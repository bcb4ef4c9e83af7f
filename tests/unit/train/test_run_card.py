"""The run card: written at the start, kept over sessions, and free of places."""

import dataclasses
import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from small_runs import small_config, small_dataset, small_run

from arra.config import AlignConfig, LogConfig
from arra.files import sha256_of, write_json
from arra.train.run_card import (
    FILE,
    RunCard,
    _process_name,
    config_hash,
    is_alive,
    public_name,
)
from arra.train.setup import Run
from arra.train.world import World


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("somebody") / "data set")


def run_in(folder: Path, data: Path) -> Run:
    folder.mkdir()
    write_json(folder / "config.json", {"run": {"dataset": sha256_of(data / "manifest.json")}})
    run = small_run(small_config(data, out=str(folder)), World(torch.device("cpu")))
    return dataclasses.replace(run, folder=folder)


def card_of(run: Run) -> dict:
    return json.loads((run.folder / FILE).read_text())


def test_a_card_is_there_from_the_start(tmp_path: Path, data: Path) -> None:
    run = run_in(tmp_path / "run", data)
    card = RunCard(run, 0, time.monotonic())
    found = card_of(run)
    assert found["progress"]["state"] == "running"
    assert found["sessions"][0]["ended"] is None
    assert is_alive(found["sessions"][0]["process"]) == (True if _process_name(1) else None)
    assert found["hashes"]["dataset_manifest"] == sha256_of(data / "manifest.json")
    assert found["hashes"]["encoders"] == {"clip": "none"}
    assert found["data"] == {"name": "data set", "source": "", "rows": {"train": 20, "val": 5}}
    assert found["model"]["parameters"] == sum(p.numel() for p in run.step.model.parameters())
    card.update(4, skipped=1)
    progress = card_of(run)["progress"]
    assert (progress["step"], progress["samples_seen"], progress["epochs"]) == (4, 32, 1.6)
    assert progress["skipped_steps"] == 1


def test_how_a_session_ends(tmp_path: Path, data: Path) -> None:
    run = run_in(tmp_path / "run", data)
    endings = [
        (4, None, "stopped", ""),
        (5, SystemExit(75), "preempted", ""),
        (6, KeyboardInterrupt(), "interrupted", ""),
        (7, ValueError(f"{run.folder}/log.jsonl in {Path.home()}/x"), "failed",
         "ValueError: RUN/log.jsonl in ~/x"),
        (20, None, "finished", ""),
    ]  # fmt: skip
    begun = 0
    for step, error, how, said in endings:
        try:
            with RunCard(run, begun, time.monotonic() - 36) as card:
                card.update(step)
                if error is not None:
                    raise error
        except (ValueError, SystemExit, KeyboardInterrupt):
            assert error is not None
        last = card_of(run)["sessions"][-1]
        assert (last["how"], last["error"], last["from_step"]) == (how, said, begun)
        assert last["ended"].endswith("Z")
        begun = step
    progress = card_of(run)["progress"]
    assert progress["steps_computed"] == 20
    assert progress["hours"] == pytest.approx(5 * 36 / 3600, rel=0.5)
    assert progress["gpu_hours"] == 0.0
    assert progress["processor_hours"] == pytest.approx(
        progress["hours"] * torch.get_num_threads(), rel=0.02
    )


def test_a_session_without_an_end_was_killed(tmp_path: Path, data: Path) -> None:
    run = run_in(tmp_path / "run", data)
    RunCard(run, 0, time.monotonic()).update(6)
    RunCard(run, 4, time.monotonic())  # six were done, four were saved
    sessions = card_of(run)["sessions"]
    assert [s["how"] for s in sessions] == ["killed", "running"]


def test_no_place_is_told(tmp_path: Path, data: Path) -> None:
    run = run_in(tmp_path / "run", data)
    RunCard(run, 0, time.monotonic())
    text = (run.folder / FILE).read_text()
    assert str(tmp_path) not in text
    assert "somebody" not in text
    assert os.uname().nodename not in text


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("/home/ann/pictures/", "pictures"),
        ("~/pictures", "pictures"),
        ("s3://bucket/deep/pictures?limit=3", "pictures"),
        ("builtin:scenes", "builtin:scenes"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("", ""),
    ],
)
def test_names_without_places(spec: str, name: str) -> None:
    assert public_name(spec) == name


def test_the_hash_of_a_config_is_that_of_what_is_trained(data: Path) -> None:
    config = small_config(data)
    passing = dataclasses.replace(config.data, skip_steps=("3",))
    same = dataclasses.replace(
        config, out="elsewhere", micro_batch=1, log=LogConfig(every=3), data=passing
    )
    assert config_hash(config) == config_hash(same)
    assert config_hash(config) != config_hash(small_config(data, align=AlignConfig(weight=0.1)))


def test_a_process_that_is_gone_is_known() -> None:
    other = subprocess.Popen(["sleep", "60"])
    name = _process_name(other.pid)
    if not name:
        pytest.skip("this system has no /proc")
    assert is_alive(name) is True
    other.kill()
    other.wait()
    assert is_alive(name) is False
    assert is_alive(f"elsewhere{name}") is None
    assert is_alive("") is None
