"""Whose a run folder is: a new run's, or the one that goes on in it."""

import dataclasses
import shutil
from pathlib import Path
from typing import Literal

import torch

from arra.config import TrainConfig
from arra.config_json import differences, from_json, to_json
from arra.device import cpu_has_bfloat16, pick_device
from arra.files import place, read_json, sha256_of, write_json
from arra.models.adapted import OWN_BASE
from arra.models.loading import PIPELINE
from arra.models.run_folder import latest_checkpoint
from arra.train.alignment import ONLINE
from arra.train.run_card import FILE as RUN_CARD
from arra.train.splits import CACHE
from arra.train.trackers import FILE as TRACKERS


def claim(config: TrainConfig, folder: Path) -> tuple[TrainConfig, int]:
    """Makes `folder` this run's own, or finds that it already is.

    Returns the config with `auto` types resolved, as config.json has it, and the CPU threads of a
    process. config.json is written first, so that a run killed at any later moment can be resumed.

    Raises:
        ValueError: the folder holds something else, or a run with other settings or data.
    """
    file = folder / "config.json"
    dataset = manifest_hash(config)
    if not file.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no run: choose another --out")
        config = dataclasses.replace(config, dtype=_pick_dtype(config))
        threads = config.threads or torch.get_num_threads()
        write_json(file, {**to_json(config), "run": {"dataset": dataset, "threads": threads}})
        return config, threads
    written = read_json(file)
    run = written.pop("run")
    before = from_json(TrainConfig, written)
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype=before.dtype)
    changed = differences(before, config)
    if changed:
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}): resume it with its "
            f"own, or choose another --out"
        )
    if run["dataset"] != dataset:
        raise ValueError(
            f"{folder} was trained on another dataset than {config.data_folder}: resume it with "
            f"the same data, or choose another --out"
        )
    return config, run["threads"]


def unclaim(folder: Path) -> None:
    """Takes back what `claim` and `set_up` wrote, unless something was trained since.

    After a mistake in its settings: the corrected command would be refused as another run's.
    """
    if latest_checkpoint(folder) is not None or (folder / "log.jsonl").exists():
        return
    for name in ("config.json", PIPELINE, ONLINE, RUN_CARD, TRACKERS):
        (folder / name).unlink(missing_ok=True)
    for name in ("model", "tokenizer", OWN_BASE, "tensorboard", "wandb", "trackio", CACHE):
        shutil.rmtree(folder / name, ignore_errors=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def manifest_hash(config: TrainConfig) -> str:
    """SHA-256 of the dataset's manifest, which holds those of all its files."""
    file = place(config.data_folder) / "manifest.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"--data {config.data_folder} is no prepared dataset (it has no manifest.json): write "
            f"one with `arra prepare`"
        )
    return sha256_of(file)


def _pick_dtype(config: TrainConfig) -> Literal["float32", "bfloat16"]:
    """`auto` = bfloat16 where it is native: a third faster on a CPU that has it."""
    if config.dtype != "auto":
        return config.dtype
    native = pick_device(config.device) != "cpu" or cpu_has_bfloat16()
    return "bfloat16" if native else "float32"
