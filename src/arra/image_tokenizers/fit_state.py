"""The state of a fit on disk: safetensors and JSON, visible only when complete.

checkpoints/step-00000500/
    model.safetensors       the tokenizer's own state dict
    ema.safetensors         its averaged weights, if any
    NAME.safetensors        what else learns: `discriminator`, terms of the loss with parameters
    training.safetensors    `exp_avg/MODULE.NAME`, `exp_avg_sq/…`, `step/…` and the code averages
    state.json              step, fingerprint of the source, SHA-256 of the files above
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arra.files import atomic_dir, read_json, sha256_of, write_json
from arra.image_tokenizers.codebook import CodebookAverage


@dataclass
class FitState:
    """Everything that a resume restores, in place, and the source it belongs to.

    Attributes:
        source: fingerprint of the source.
        modules: by name; `model` is the tokenizer.
        optimizers: of their parameters, each in at most one.
        average: behind the codebook.
    """

    source: str
    modules: dict[str, nn.Module]
    optimizers: tuple[torch.optim.Optimizer, ...]
    average: CodebookAverage

    def named(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Every parameter, as `MODULE.NAME`."""
        for module_name, module in self.modules.items():
            for name, parameter in module.named_parameters():
                yield f"{module_name}.{name}", parameter


def latest(out: Path) -> Path | None:
    """The newest checkpoint of a fit, if any."""
    found = sorted((out / "checkpoints").glob("step-*"))
    return found[-1] if found else None


def save(out: Path, step: int, state: FitState) -> None:
    """Writes the checkpoint of `step` (steps done) and removes the older ones."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in state.named()}
    parts = {name: module.state_dict() for name, module in state.modules.items()}
    parts["training"] = {
        f"{key}/{names[parameter]}": value
        for optimizer in state.optimizers
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    parts["training"]["codes/count"] = state.average.count_K
    parts["training"]["codes/sum"] = state.average.sum_KD
    folder = out / "checkpoints" / f"step-{step:08d}"
    if folder.exists():
        return
    with atomic_dir(folder) as temporary:
        sums = {}
        for part, tensors in parts.items():
            file = temporary / f"{part}.safetensors"
            save_file({k: t.detach().contiguous().cpu() for k, t in tensors.items()}, file)
            sums[file.name] = sha256_of(file)
        write_json(temporary / "state.json", {"step": step, "source": state.source, "sha256": sums})
    for old in sorted((out / "checkpoints").glob("step-*"))[:-1]:
        shutil.rmtree(old)


def restore(folder: Path, state: FitState) -> int:
    """Loads a checkpoint into `state`; returns the number of steps done.

    Raises:
        ValueError: a file is missing or damaged, or the source has changed since.
    """
    info = read_json(folder / "state.json")
    if info["source"] != state.source:
        raise ValueError(
            f"the source has changed since {folder} was written: restore it or change --out"
        )
    for name, expected in info["sha256"].items():
        if not (folder / name).is_file() or sha256_of(folder / name) != expected:
            raise ValueError(f"{folder / name} is missing or damaged: remove {folder} to resume")
    for name, module in state.modules.items():
        module.load_state_dict(load_file(folder / f"{name}.safetensors"))
    parameters = dict(state.named())
    owners = {
        parameter: optimizer
        for optimizer in state.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for flat, tensor in load_file(folder / "training.safetensors").items():
        key, _, name = flat.partition("/")
        if key == "codes":
            average = {"count": state.average.count_K, "sum": state.average.sum_KD}[name]
            average.copy_(tensor)
        else:
            parameter = parameters[name]
            owners[parameter].state[parameter][key] = tensor.to(parameter.device)
    return int(info["step"])
