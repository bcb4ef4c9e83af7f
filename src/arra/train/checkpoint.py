"""A run's state on disk: safetensors and JSON only, visible only when complete.

checkpoints/step-00001000/
    model.safetensors       the model's own state dict; of an adapter run instead
    adapter_model.safetensors, adapter_config.json      all of it that trains: a peft folder
    ema.safetensors         the averaged weights, if any, under the same names
    objective.safetensors   projectors (training only: never exported)
    optimizer.safetensors   `exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME`; 8 bits have other keys
    state.json              step, pending log sums, SHA-256 of the files above
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arra.files import atomic_dir, read_json, sha256_of, write_json
from arra.models.adapted import ADAPTER_WEIGHTS, Adapter
from arra.models.loading import load_weights
from arra.train.optim import Average


@dataclass
class State:
    """Everything that a resume restores, in place.

    Attributes:
        adapter: what of `model` trains, if it is not all of it.
        base_name: what the adapter's config calls its frozen base.
    """

    model: nn.Module
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    average: Average | None
    adapter: Adapter | None = None
    base_name: str = ""

    def trained(self) -> dict[str, Tensor]:
        """The model's parameters that move, under the names that a checkpoint gives them."""
        return trained_tensors(self.model, self.adapter)


def save(run: Path, step: int, state: State, extra: Mapping[str, Any], keep: int) -> Path:
    """Writes checkpoint `step` (optimizer steps done) and removes the oldest beyond `keep`.

    Raises:
        FloatingPointError: the weights are no longer finite; the last good checkpoint stays.
    """
    if not all(bool(torch.isfinite(p).all()) for p in state.trained().values()):
        raise FloatingPointError(
            f"the weights are not finite after step {step}: lower --optim.lr, or use --dtype "
            f"float32; the last good checkpoint is kept in {run}"
        )
    folder = run / "checkpoints" / f"step-{step:08d}"
    adapter = state.adapter
    weights = dict(adapter.tensors) if adapter else unique_tensors(state.model)
    parts = {
        Path(ADAPTER_WEIGHTS).stem if adapter else "model": weights,
        "objective": dict(state.objective.state_dict()),
        "optimizer": _flatten_optimizer(state),
    }
    if state.average is not None:
        parts["ema"] = {**weights, **state.average.weights}
    with atomic_dir(folder) as temporary:
        sums = {}
        for name, tensors in parts.items():
            file = temporary / f"{name}.safetensors"
            save_file({k: t.detach().contiguous().cpu() for k, t in tensors.items()}, file)
            sums[file.name] = sha256_of(file)
        if adapter:
            adapter.save_config(temporary, state.base_name)
        write_json(temporary / "state.json", {"step": step, "sha256": sums, **extra})
    if keep > 0:
        for old in sorted((run / "checkpoints").glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    return folder


def restore(folder: Path, state: State) -> dict[str, Any]:
    """Loads a checkpoint into `state`; returns its state.json.

    Raises:
        ValueError: a file is missing, damaged or of another model.
    """
    info = read_json(folder / "state.json")
    for name, expected in info["sha256"].items():
        if not (folder / name).is_file() or sha256_of(folder / name) != expected:
            raise ValueError(f"{folder / name} is missing or damaged: remove {folder} to resume")
    if state.adapter:
        file = folder / ADAPTER_WEIGHTS
        state.adapter.load(load_file(file), file)
    else:
        file = folder / "model.safetensors"
        load_weights(state.model, load_file(file), file)
    state.objective.load_state_dict(load_file(folder / "objective.safetensors"))
    _restore_optimizer(load_file(folder / "optimizer.safetensors"), state)
    if state.average is not None:
        averaged = load_file(folder / "ema.safetensors")
        for name, tensor in state.average.weights.items():
            tensor.copy_(averaged[name])
    return info


def trained_tensors(model: nn.Module, adapter: Adapter | None) -> dict[str, Tensor]:
    """The parameters of `model` that move, under the names that a checkpoint gives them."""
    if adapter:
        return dict(adapter.tensors)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A state dict that names each storage once (safetensors refuses tied tables named twice)."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            kept[name] = tensor
    return kept


def _parameter_names(state: State) -> dict[int, str]:
    named = [("model", state.model), ("objective", state.objective)]
    return {id(p): f"{part}.{n}" for part, m in named for n, p in m.named_parameters()}


def _flatten_optimizer(state: State) -> dict[str, Tensor]:
    """Counters that are plain numbers become int64 scalars; what parameters share, copies."""
    names = _parameter_names(state)
    return {
        f"{key}/{names[id(parameter)]}": (
            value.clone() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
        )
        for parameter, values in state.optimizer.state.items()
        for key, value in values.items()
    }


def _restore_optimizer(tensors: dict[str, Tensor], state: State) -> None:
    by_name = {name: i for i, name in _parameter_names(state).items()}
    parameters = {id(p): p for g in state.optimizer.param_groups for p in g["params"]}
    for flat, tensor in tensors.items():
        key, _, name = flat.partition("/")
        parameter = parameters[by_name[name]]
        counter = tensor.dtype == torch.int64 and tensor.ndim == 0
        state.optimizer.state[parameter][key] = (
            int(tensor) if counter else tensor.to(parameter.device)
        )
