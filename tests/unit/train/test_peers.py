"""Processes that are not alike are told apart before anything is computed."""

import dataclasses
import importlib.metadata
from pathlib import Path

import pytest
from ranks import RankFailed, in_ranks
from small_runs import small_config, small_dataset

from arra.config import TrainConfig
from arra.files import write_json
from arra.train import peers
from arra.train.world import open_world


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    data = small_dataset(tmp_path / "data")
    (tmp_path / "out").mkdir()
    return dataclasses.replace(small_config(data), out=str(tmp_path / "out"))


def _check(config: TrainConfig, **on_the_second: object) -> None:
    with open_world("cpu") as world:
        folder = Path(config.out)
        if world.is_main:
            write_json(folder / "config.json", {"steps": config.steps})
        mine = config if world.is_main else dataclasses.replace(config, **on_the_second)
        peers.check_peers(world, mine, Path(mine.out), patience=0.3)


def test_alike_processes_pass(config: TrainConfig) -> None:
    in_ranks(2, _check, config)


@pytest.mark.parametrize("what", ["flags", "data", "no data", "out", "version"])
def test_what_differs_is_named(
    config: TrainConfig, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_json(other / "manifest.json", {})
    changes: dict[str, object] = {
        "flags": {"steps": 7},
        "data": {"data_folder": str(other)},
        "no data": {"data_folder": str(tmp_path / "nothing")},
        "out": {"out": str(other)},
        "version": {},
    }[what]
    words = {"flags": "other flags", "out": "does not see in --out", "version": "torch 9.9"}

    def act() -> None:
        if what == "version":
            true = importlib.metadata.version
            with open_world("cpu") as world:
                if not world.is_main:
                    monkeypatch.setattr(
                        peers, "version", lambda name: "9.9" if name == "torch" else true(name)
                    )
                write_json(Path(config.out) / "config.json", {})
                peers.check_peers(world, config, Path(config.out))
        else:
            _check(config, **changes)

    with pytest.raises(RankFailed, match=words.get(what, "is not the dataset")):
        in_ranks(2, act)
