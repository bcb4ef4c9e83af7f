"""Opens a folder that holds an image tokenizer."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from arra.files import read_json
from arra.image_tokenizers.vq import VQConfig, VQModel


def load_folder(folder: Path, device: str = "cpu") -> VQModel:
    """The tokenizer in `folder` (config.json, model.safetensors), frozen, float32.

    Raises:
        ValueError: a file is missing or damaged, or belongs to another kind of model.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} holds no image tokenizer: {name} is missing. Name a folder written by "
                f"`arra tokenizer train`"
            )
    settings = read_json(folder / "config.json")
    found = settings.get("model_type") if isinstance(settings, dict) else None
    if found != VQConfig.model_type:
        raise ValueError(
            f"{folder} is not an image tokenizer: its config.json says model_type {found!r} "
            f"instead of {VQConfig.model_type!r}"
        )
    model = VQModel(VQConfig.from_dict(settings))
    file = folder / "model.safetensors"
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut off ({error}): get it again") from None
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            raise ValueError(
                f"{file} does not fit its config.json: {name} should be {expected.get(name)}, "
                f"but is {given.get(name)}"
            )
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model.eval().requires_grad_(False).to(torch.device(device))
