"""The checkpoints in a run folder, for all that open one; train/checkpoint.py writes them.

checkpoints/step-00001000/
    model/       shard-00001-model-00001-of-00001.safetensors, shard-00002-..., one of each process:
                 the model's own state dict, cut as the processes held it
    adapter_model.safetensors, adapter_config.json      in its place, of an adapter: a peft folder
    ema/         the averaged weights, if any, under the same names
    objective/   projectors (training only: never exported)
    optimizer/   `exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME`; 8 bits have other keys
    state.json   step, pending log sums, SHA-256 of the files above

A part is what torch.distributed.checkpoint writes as safetensors: where a shard lies in its tensor
is said in its file's header. So any number of processes reads what any number wrote. One that is
being written has a hidden name, and a damaged one is put aside as `damaged-step-00001000`.
"""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from arra.files import read_json
from arra.models.adapted import ADAPTER_WEIGHTS

FORMAT = 2
"""Of a checkpoint's files; 1 was one file for each part."""


class Damaged(ValueError):
    """A checkpoint is not as it was written."""


def step_name(step: int) -> str:
    """The name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def finished_checkpoints(run: Path) -> list[Path]:
    """Those that were written to their end, oldest first; nobody says that they are still whole."""
    return sorted((run / "checkpoints").glob("step-*"))


def latest_checkpoint(run: Path) -> Path | None:
    """The newest finished checkpoint of a run folder."""
    return max(finished_checkpoints(run), default=None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's state.json.

    Raises:
        Damaged: a file is missing.
        ValueError: another version of this package wrote the checkpoint.
    """
    try:
        state = read_json(checkpoint / "state.json")
    except (FileNotFoundError, ValueError) as error:
        raise Damaged(str(error)) from None
    found = state.get("format", 1)
    if found != FORMAT:
        raise ValueError(
            f"{checkpoint} has format {found}, and this version of arra reads format {FORMAT}: "
            f"export it with the version that wrote it, or train again with another --out"
        )
    for name in state["sha256"]:
        if not (checkpoint / name).is_file():
            raise Damaged(f"{checkpoint / name} is missing")
    return state


def weights_folder(checkpoint: Path) -> Path:
    """Where the weights of the model, or of what of it trains, lie: a part to read."""
    adapter = (checkpoint / ADAPTER_WEIGHTS).is_file()
    return checkpoint if adapter else checkpoint / "model"


def stored_tensors(part: Path) -> dict[str, TensorStorageMetadata]:
    """Size, type and shards of each tensor of a part, from its files' headers.

    A part without tensors has no folder.

    Raises:
        Damaged: a file is cut off, or shards are missing.
    """
    if not part.is_dir():
        return {}
    try:
        stored = dcp.HuggingFaceStorageReader(str(part)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{part} cannot be read ({error}): it is damaged") from None
    found = {n: t for n, t in stored.items() if isinstance(t, TensorStorageMetadata)}
    for name, tensor in found.items():
        if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.size):
            raise Damaged(f"{part} is not whole: shards of {name} are missing")
    return found


def load_part(part: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills `tensors` in place with what a part holds, whatever the number of its shards.

    Each process reads what it needs: distributed tensors get their own shard. No process waits for
    another, and no whole tensor is held besides.

    Raises:
        ValueError: names or shapes are others, or a file is damaged (`Damaged`).
    """
    stored = stored_tensors(part)
    wrong = sorted(stored.keys() ^ tensors.keys())
    wrong = wrong or [name for name, tensor in tensors.items() if tensor.shape != stored[name].size]
    if wrong:
        raise ValueError(f"{part} does not fit: {wrong[0]} is missing in one of them or differs")
    if not stored:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as intended
        reader = dcp.HuggingFaceStorageReader(str(part))
        try:
            held = {name: tensor.detach() for name, tensor in tensors.items()}
            dcp.load(held, storage_reader=reader, no_dist=True)
        except dcp.CheckpointException as error:
            raise Damaged(f"{part} cannot be read: {failure_of(error)}") from error


def read_part(part: Path) -> dict[str, Tensor]:
    """The whole tensors of a part, on the CPU.

    Raises:
        Damaged: a file is cut off, or shards are missing.
    """
    tensors = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in stored_tensors(part).items()
    }
    load_part(part, tensors)
    return tensors


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's state dict with each tied parameter under one name, as a checkpoint has it."""
    first = {name for name, _ in model.named_parameters()}
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)} - first
    return {name: t for name, t in model.state_dict().items() if name not in again}


def failure_of(error: dcp.CheckpointException) -> BaseException:
    """What the first of the processes failed with."""
    exception, _ = next(iter(error.failures.values()))
    return exception
