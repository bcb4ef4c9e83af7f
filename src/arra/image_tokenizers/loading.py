"""Opens an image tokenizer: our own folder, or one of the published formats."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from arra.files import read_json
from arra.foreign import read_foreign
from arra.image_tokenizers.frames import described_in, from_tensors
from arra.image_tokenizers.interface import ImageTokenizer
from arra.image_tokenizers.layers import SemanticVQConfig, VQConfig
from arra.image_tokenizers.published import INSIDE, Parts, from_original, from_transformers
from arra.image_tokenizers.vq import VQModel

VQGAN = "vqgan.ckpt"


def load_file(file: Path, device: str = "cpu") -> VQModel:
    """The tokenizer in a published checkpoint file, frozen, float32.

    Raises:
        ValueError: a damaged file, one with code in it, or another family's.
    """
    return from_original(read_foreign(file)).model(device)


def load_folder(folder: Path, device: str = "cpu") -> ImageTokenizer:
    """The tokenizer in `folder`, frozen, float32.

    The folder is our own (config.json, model.safetensors), holds vqgan.ckpt and vqgan.yaml, or a
    whole model of transformers with an image tokenizer inside.

    Raises:
        ValueError: a file is missing or damaged, or belongs to another kind of model.
    """
    if (folder / "config.json").is_file():
        settings = read_json(folder / "config.json")
        found = settings.get("model_type") if isinstance(settings, dict) else None
        if found == VQConfig.model_type:
            return _ours(folder, settings).model(device)
        if found == SemanticVQConfig.model_type:
            from arra.image_tokenizers.semantic import open_semantic  # encoders load slowly

            return open_semantic(folder, settings, device)
        frames = described_in(settings) if isinstance(settings, dict) else None
        if frames is not None:
            return from_tensors(_inside(folder), frames, folder).to(torch.device(device))
        if not isinstance(settings, dict) or not isinstance(settings.get("vq_config"), dict):
            raise ValueError(
                f"{folder} is not an image tokenizer: its config.json says model_type {found!r} "
                f"instead of {VQConfig.model_type!r}"
            )
        return from_transformers(_inside(folder), settings["vq_config"], folder).model(device)
    if (folder / VQGAN).is_file():
        return load_file(folder / VQGAN, device)
    raise ValueError(
        f"{folder} holds no image tokenizer: config.json is missing. Name a folder written by "
        f"`arra tokenizer train` or `arra convert`, or a published checkpoint file itself"
    )


def _ours(folder: Path, settings: dict[str, Any]) -> Parts:
    config = VQConfig.from_dict(settings)
    return Parts(None, config, stored(folder, config), {})


def stored(folder: Path, config: VQConfig) -> dict[str, Tensor]:
    """The tensors of our folder in the types they are stored in, compared with its config.json.

    Raises:
        ValueError: they are damaged, or do not fit.
    """
    with torch.device("meta"):
        return fitting(folder, VQModel(config))


def fitting(folder: Path, model: VQModel) -> dict[str, Tensor]:
    """The tensors of our folder, which must have the names and shapes of `model`'s.

    Raises:
        ValueError: they are missing, damaged, or do not fit.
    """
    file = folder / "model.safetensors"
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no image tokenizer: model.safetensors is missing. Name a folder "
            f"written by `arra tokenizer train` or `arra convert`"
        )
    tensors = _tensors(file)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            raise ValueError(
                f"{file} does not fit its config.json: {name} should be {expected.get(name)}, "
                f"but is {given.get(name)}"
            )
    return tensors


def _inside(folder: Path) -> dict[str, Tensor]:
    """The tensors of the image tokenizer in transformers' folder, alone or inside a multimodal
    model (nothing else of it is read), under the tokenizer's own names."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors: convert it with save_pretrained first")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _tensors(file, inside_only=True)
    if tensors:
        return {INSIDE.sub("", name, count=1): tensor for name, tensor in tensors.items()}
    return {name: tensor for file in files for name, tensor in _tensors(file).items()}


def _tensors(file: Path, inside_only: bool = False) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            names = [n for n in opened.keys() if not inside_only or INSIDE.match(n)]  # noqa: SIM118
            return {name: opened.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut off ({error}): get it again") from None
