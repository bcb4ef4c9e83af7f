"""Saving and restoring a run's state: safetensors and JSON only, visible only when complete.

The layout of a checkpoint is in models/run_folder.py. Each process writes the shards that it holds
(torch.distributed.checkpoint, flat names, tensors only), the first one all else. Everything goes
into a folder with a hidden name, is flushed and hashed there, and process 0 renames it when all are
done: a run killed at any moment has whole checkpoints only. While files are written training goes
on, for they are written from copies.
"""

import shutil
import sys
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from arra.config import CheckpointConfig
from arra.files import atomic_dir, sha256_of, write_json
from arra.models.adapted import ADAPTER_WEIGHTS
from arra.models.run_folder import (
    FORMAT,
    Damaged,
    failure_of,
    finished_checkpoints,
    read_state,
    step_name,
)
from arra.train.state import Parts, State, load_parts, local, parts_of
from arra.train.world import World

FILE_BYTES = 1 << 30
"""Of one file of one process, about: torch holds a file's bytes twice more while it writes it."""

# ---- saving --------------------------------------------------------------------------------------


class Saver:
    """Writes the checkpoints of a run, one at a time. As a context it waits for the last one.

    All processes call the same methods in the same order.
    """

    def __init__(self, run: Path, state: State, world: World, config: CheckpointConfig) -> None:
        self._run, self._state, self._config = run, state, config
        self._world, self._apart = world, world.apart()
        self._copies: Parts = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        if world.size == 1:  # here, for filters are not safe to change beside another thread
            warnings.filterwarnings("ignore", "torch.distributed is disabled")

    def save(self, step: int, extra: Mapping[str, Any]) -> None:
        """Checkpoint `step` (optimizer steps done), with `extra` in its state.json; the oldest
        beyond `keep` go when it is there.

        Raises:
            FloatingPointError: the weights are no longer finite; the last good checkpoint stays.
            OSError: this one, or the one before it, could not be written.
        """
        self.wait()
        self._refuse_bad_weights(step)
        parts = parts_of(self._state)
        if self._config.background:
            parts = self._copied(parts)
        self._writing = self._thread.submit(self._write, step, parts, dict(extra))
        if not self._config.background:
            self.wait()

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise at once. The processes get to know one after the other."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            OSError: the last checkpoint could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._copies.clear()

    def _refuse_bad_weights(self, step: int) -> None:
        finite = [torch.isfinite(local(p.detach())).all() for p in self._state.trained().values()]
        bad = int(bool(finite) and not bool(torch.stack(finite).all()))
        if self._world.sum({"bad": bad})["bad"]:
            raise FloatingPointError(
                f"the weights are not finite after step {step}: lower --optim.lr, or use --dtype "
                f"float32; the last good checkpoint is kept in {self._run}"
            )

    def _copied(self, parts: Parts) -> Parts:
        """CPU copies, in the memory of the save before (torch 2.11's own stager works once)."""
        pinned = self._world.device.type == "cuda"
        for part, tensors in parts.items():
            before, copies = self._copies.get(part, {}), {}
            for name, tensor in tensors.items():
                copy = before.get(name)
                if copy is None or copy.shape != tensor.shape:
                    copy = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
                local(copy).copy_(local(tensor))
                copies[name] = copy
            self._copies[part] = copies
        return self._copies

    def _write(self, step: int, parts: Parts, extra: Mapping[str, Any]) -> None:
        world, adapter = self._apart, self._state.adapter
        folder = self._run / "checkpoints" / step_name(step)
        with ExitStack() as stack:
            hidden = world.on_main(lambda: stack.enter_context(atomic_dir(folder)))
            for name, tensors in parts.items():
                if name != ADAPTER_WEIGHTS:
                    _write_part(hidden / name, tensors, world)
                elif world.is_main and adapter is not None:
                    save_file(tensors, hidden / name, {"format": "pt"})
                    adapter.save_config(hidden, self._state.base_name)
            sums: dict[str, str] = {}
            for own in world.on_all(lambda: _sums(hidden, world.rank)):
                sums |= own
            about = {"format": FORMAT, "step": step, "sha256": sums, **extra}
            world.on_main(lambda: write_json(hidden / "state.json", about))
            world.on_main(stack.close)
        world.on_main(lambda: _remove_old(self._run, self._config.keep))


def _write_part(part: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Each process' shards into its own files; of what all of them hold, one writes each tensor."""
    if not tensors:
        return
    writer = dcp.HuggingFaceStorageWriter(
        str(part), fqn_to_index_mapping=_files(tensors), save_distributed=True
    )
    try:
        dcp.save(tensors, storage_writer=writer, process_group=world.group, no_dist=world.size == 1)
    except dcp.CheckpointException as error:
        raise failure_of(error) from None


def _files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Which of a process' files a tensor goes into, from 1; the order of names is theirs."""
    index, filled, found = 1, 0, {}
    for name, tensor in tensors.items():
        size = local(tensor).nbytes
        if filled and filled + size > FILE_BYTES:
            index, filled = index + 1, 0
        filled += size
        found[name] = index
    return found


def _sums(folder: Path, rank: int) -> dict[str, str]:
    """SHA-256 of the files that process `rank` wrote; one that wrote nothing has none."""
    files = [*folder.glob(f"*/shard-{rank + 1:05d}-*")]
    if rank == 0:
        files += [file for file in folder.iterdir() if file.is_file()]
    return {str(file.relative_to(folder)): sha256_of(file) for file in sorted(files)}


def _remove_old(run: Path, keep: int) -> None:
    for old in finished_checkpoints(run)[:-keep] if keep > 0 else []:
        hidden = old.with_name(f".{old.name}.removed")
        old.rename(hidden)  # first: nobody finds half of it
        shutil.rmtree(hidden)


# ---- restoring -----------------------------------------------------------------------------------


def restore(run: Path, state: State, world: World) -> dict[str, Any] | None:
    """Loads the newest whole checkpoint of a run into `state`; returns its state.json.

    Damaged ones after it are put aside, with a warning. None: nothing was saved yet.

    Raises:
        ValueError: there are checkpoints, but none is whole; or they are of another model.
    """
    damaged: dict[Path, str] = {}
    for folder in world.on_main(lambda: _finished(run)):
        problems = [found for found in world.on_all(partial(_problem, folder, world)) if found]
        if not problems:
            world.on_main(lambda: _put_aside(damaged))
            load_parts(folder, state)
            return read_state(folder)
        damaged[folder] = problems[0]
    if damaged:
        raise ValueError(
            f"no checkpoint in {run} is whole ({'; '.join(damaged.values())}): restore one, or "
            f"remove {run / 'checkpoints'} to train from the start"
        )
    return None


def _finished(run: Path) -> list[Path]:
    """Newest first; what killed processes left unfinished goes."""
    for hidden in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(hidden)
    return finished_checkpoints(run)[::-1]


def _problem(folder: Path, world: World) -> str:
    """What is wrong with this process' share of the files of a checkpoint, if anything."""
    try:
        state = read_state(folder)
    except Damaged as error:
        return str(error)
    for name, expected in [*state["sha256"].items()][world.rank :: world.size]:
        if sha256_of(folder / name) != expected:
            return f"{folder / name} is damaged (its SHA-256 is another)"
    return ""


def _put_aside(damaged: Mapping[Path, str]) -> None:
    for folder, problem in damaged.items():
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)  # one of the same name from before
        folder.rename(aside)
        print(
            f"warning: {problem}; the checkpoint before it is used, and this one kept as {aside}",
            file=sys.stderr,
        )
