"""What a checkpoint holds: a run's state as flat named tensors, by part, and back in place.

The parts are those of models/run_folder.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from arra.models.adapted import ADAPTER_WEIGHTS, Adapter
from arra.models.run_folder import load_part, own_tensors, stored_tensors, weights_folder
from arra.train.optim import Average

Parts = dict[str, dict[str, Tensor]]
"""Names to tensors, by the folder that they are written to (or file, of an adapter)."""


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

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the model: an adapter, or all of it."""
        return dict(self.adapter.tensors) if self.adapter else own_tensors(self.model)


def trained_tensors(model: nn.Module, adapter: Adapter | None) -> dict[str, Tensor]:
    """The parameters of `model` that move, under the names that a checkpoint gives them."""
    if adapter:
        return dict(adapter.tensors)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def parts_of(state: State) -> Parts:
    """What is written, by folder (or file, of an adapter); nothing is copied that need not be."""
    weights = state.weights()
    parts: Parts = {
        "model": weights,
        "objective": dict(state.objective.state_dict()),
        "optimizer": _flatten_optimizer(state),
    }
    if state.average is not None:
        parts["ema"] = {**weights, **state.average.weights}
    if state.adapter:  # a peft folder holds whole tensors, in one file
        del parts["model"]
        parts[ADAPTER_WEIGHTS] = {n: _whole(t) for n, t in weights.items()}
    return {
        name: {key: tensor.detach().contiguous() for key, tensor in _unshared(tensors).items()}
        for name, tensors in parts.items()
    }


def load_parts(folder: Path, state: State) -> None:
    """Fills a state with a checkpoint's tensors, in place.

    Raises:
        ValueError: they are of another model.
    """
    weights = state.weights()
    if state.average is not None:
        load_part(folder / "ema", {**weights, **state.average.weights})
    load_part(weights_folder(folder), weights)
    load_part(folder / "objective", dict(state.objective.state_dict()))
    _load_optimizer(folder / "optimizer", state)


def local(tensor: Tensor) -> Tensor:
    """What of a tensor this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies what another name has already: safetensors names each memory once."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        place = local(tensor).data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen |= {place} if place else set()  # an empty shard is nowhere
    return found


def _parameter_names(state: State) -> dict[int, str]:
    named = [("model", state.model), ("objective", state.objective)]
    return {id(p): f"{part}.{n}" for part, m in named for n, p in m.named_parameters()}


def _flatten_optimizer(state: State) -> dict[str, Tensor]:
    """`KEY/NAME` of each state; counters that are plain numbers become int64 scalars."""
    names = _parameter_names(state)
    return {
        f"{key}/{names[id(parameter)]}": (
            value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
        )
        for parameter, values in state.optimizer.state.items()
        for key, value in values.items()
    }


def _load_optimizer(part: Path, state: State) -> None:
    """States of a parameter's own shape are cut as it is; all else is whole on each process."""
    parameters = {id(p): p for g in state.optimizer.param_groups for p in g["params"]}
    named = {name: parameters[i] for i, name in _parameter_names(state).items() if i in parameters}
    tensors: dict[str, Tensor] = {}
    for flat, stored in stored_tensors(part).items():
        parameter, dtype = named[flat.partition("/")[2]], stored.properties.dtype
        tensors[flat] = (
            torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            if stored.size == parameter.shape
            else torch.zeros(stored.size, dtype=dtype, device=parameter.device)
        )
    load_part(part, tensors)
    for flat, tensor in tensors.items():
        key, _, name = flat.partition("/")
        counter = tensor.dtype == torch.int64 and tensor.ndim == 0
        state.optimizer.state[named[name]][key] = int(tensor) if counter else tensor
