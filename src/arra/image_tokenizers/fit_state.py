"""The state of a fit on disk: safetensors and JSON, visible only when complete.

checkpoints/step-00000500/
    model.safetensors       the tokenizer's own state dict
    training.safetensors    `exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME` and the code averages
    state.json              step, fingerprint of the source, SHA-256 of the files above
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from arra.files import atomic_dir, read_json, sha256_of, write_json
from arra.image_tokenizers.codebook import CodebookAverage
from arra.image_tokenizers.vq import VQModel


@dataclass
class FitState:
    """Everything that a resume restores, in place, and the source it belongs to."""

    source: str
    model: VQModel
    optimizer: torch.optim.Optimizer
    average: CodebookAverage

    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters that have gradients (all but the codebook, which follows averages)."""
        return [p for p in self.model.parameters() if p.requires_grad]


def latest(out: Path) -> Path | None:
    """The newest checkpoint of a fit, if any."""
    found = sorted((out / "checkpoints").glob("step-*"))
    return found[-1] if found else None


def save(out: Path, step: int, state: FitState) -> None:
    """Writes the checkpoint of `step` (steps done) and removes the older ones."""
    names: dict[Tensor, str] = {p: name for name, p in state.model.named_parameters()}
    training: dict[str, Tensor] = {
        f"{key}/{names[parameter]}": value
        for parameter, values in state.optimizer.state.items()
        for key, value in values.items()
    }
    training["codes/count"] = state.average.count_K
    training["codes/sum"] = state.average.sum_KD
    folder = out / "checkpoints" / f"step-{step:08d}"
    if folder.exists():
        return
    with atomic_dir(folder) as temporary:
        sums = {}
        for part, tensors in (("model", state.model.state_dict()), ("training", training)):
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
    state.model.load_state_dict(load_file(folder / "model.safetensors"))
    parameters = dict(state.model.named_parameters())
    for flat, tensor in load_file(folder / "training.safetensors").items():
        key, _, name = flat.partition("/")
        if key == "codes":
            average = {"count": state.average.count_K, "sum": state.average.sum_KD}[name]
            average.copy_(tensor)
        else:
            parameter = parameters[name]
            state.optimizer.state[parameter][key] = tensor.to(parameter.device)
    return int(info["step"])
