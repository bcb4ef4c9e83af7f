"""Opens Chameleon folders: transformers' key layout, and what else has been published.

Lumina-mGPT and ARRA's release were written by their own copies of the model class. Theirs differ
from transformers' in two ways (Alpha-VLLM/Lumina-mGPT, lumina_mgpt/model): query and key norms are
stored once per model-parallel shard, (shards, head), where transformers has (heads, head); and the
image encoder may be left out, because training deletes it.

Nothing is converted on opening: tensors keep their bytes and their type.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, GenerationConfig

from arra.files import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
IMAGE_ENCODER = "model.vqmodel."
ADAPTOR = "adaptor."
"""The alignment projector of ARRA's released code, which stays in the checkpoints it writes."""
NOT_USED = (ADAPTOR, "model.vqmodel.decoder.")
"""Prefixes that are left out: transformers' class has no such parts. Anole's decoder is the one in
Meta's vqgan.ckpt, which paints here as the image tokenizer."""
DERIVED = ".rotary_emb.inv_freq"
"""Suffix of frequencies that old transformers stored and that follow from the config."""
WITHOUT_ENCODER = "vqmodel_not_stored"
"""Key in config.json of what this package writes: the weights hold no image encoder."""
NORMS = tuple(f"self_attn.{n}_norm.{kind}" for n in "qk" for kind in ("weight", "bias"))


def read_config(folder: Path) -> ChameleonConfig:
    """The config of a Chameleon folder.

    Raises:
        ValueError: it has no vocabulary map, without which no id is known to be an image code.
    """
    config = ChameleonConfig.from_pretrained(folder)
    if not config.vocabulary_map:
        raise ValueError(
            f"{folder / 'config.json'} has no vocabulary_map, which says the ids of image codes: "
            f"take the config.json that was published with the weights"
        )
    return config


def vocabulary_map(config: ChameleonConfig) -> dict[str, int]:
    """Token to id, as read by `read_config`."""
    assert config.vocabulary_map is not None
    return config.vocabulary_map


def empty_chameleon(folder: Path) -> ChameleonForConditionalGeneration:
    """The architecture with fresh weights, without an image encoder if the config says so."""
    config = read_config(folder)
    model = ChameleonForConditionalGeneration(config)
    if config.to_dict().get(WITHOUT_ENCODER, False):
        del model.model.vqmodel
    return _with_generation_config(model, folder)


def open_chameleon(folder: Path) -> ChameleonForConditionalGeneration:
    """The model in a folder, in the type its weights are stored in.

    The tensors are mapped from the files, not read into a second copy: the peak is one times the
    files' size (measured: docs/chameleon.md).

    Raises:
        ValueError: files or tensors are missing, or are not those of the config's architecture.
    """
    config = read_config(folder)
    tensors = _read(folder)
    with torch.device("meta"):
        model = ChameleonForConditionalGeneration(config)
    if not any(name.startswith(IMAGE_ENCODER) for name in tensors):
        del model.model.vqmodel
        setattr(config, WITHOUT_ENCODER, True)
    expected = model.state_dict()
    _refuse_differences(folder, set(expected), set(tensors))
    for name, tensor in tensors.items():
        tensors[name] = _fitted(folder, name, tensor, expected[name].shape)
    _tell_original_code(config, tensors)
    model.load_state_dict(tensors, assign=True)
    # Its frequencies are in no file and were made on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    config.dtype = model.dtype
    return _with_generation_config(model, folder).eval()


def _with_generation_config(
    model: ChameleonForConditionalGeneration, folder: Path
) -> ChameleonForConditionalGeneration:
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def stored_names(folder: Path) -> set[str]:
    """Names of all tensors in the folder, read from the files' headers.

    Raises:
        ValueError: see `open_chameleon`.
    """
    return {name for file in _files(folder) for name in _names(file)}


# ---- files ---------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        files = sorted({folder / name for name in read_json(folder / INDEX)["weight_map"].values()})
    else:
        files = [folder / SINGLE]
    for file in files:
        if not file.is_file():
            pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pth"))
            found = "pickled weights (.bin or .pth): convert them" if pickled else "no such file"
            raise ValueError(f"expected Chameleon weights in {file} (safetensors), found {found}")
    return files


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file} is cut off or damaged ({error}): get it again")


def _read(folder: Path) -> dict[str, Tensor]:
    """All tensors that the model has, mapped from the files."""
    tensors: dict[str, Tensor] = {}
    for file in _files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if not name.startswith(NOT_USED) and not name.endswith(DERIVED):
                        tensors[name] = opened.get_tensor(name)
        except SafetensorError as error:
            raise _damaged(file, error) from None
    return tensors


# ---- key layouts ---------------------------------------------------------------------------------


def _refuse_differences(folder: Path, expected: set[str], found: set[str]) -> None:
    missing, unknown = sorted(expected - found), sorted(found - expected)
    if missing or unknown:
        said = [f"{len(missing)} missing ({missing[0]} ...)"] if missing else []
        said += [f"{len(unknown)} unknown ({unknown[0]} ...)"] if unknown else []
        raise ValueError(
            f"{folder} does not hold the tensors of the Chameleon that its config.json describes: "
            f"{', '.join(said)}"
        )


def _fitted(folder: Path, name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """The tensor in transformers' shape: a norm stored per shard is repeated for its heads."""
    if tensor.shape == shape:
        return tensor
    per_shard = name.endswith(NORMS) and tensor.ndim == 2 and tensor.shape[1] == shape[1]
    if per_shard and shape[0] % tensor.shape[0] == 0:
        return tensor.repeat_interleave(shape[0] // tensor.shape[0], dim=0)
    raise ValueError(
        f"{folder}: {name} has the shape {tuple(tensor.shape)}, its config.json describes "
        f"{tuple(shape)}"
    )


def _tell_original_code(config: ChameleonConfig, tensors: Mapping[str, Tensor]) -> None:
    """Says that norms are stored per head, in the words of the code that stores them per shard.

    With as many shards as heads both shapes are the same, so that what was published for
    Lumina-mGPT's code opens there again. Not where heads share keys: it has no words for that.
    """
    heads = config.num_attention_heads
    if config.num_key_value_heads == heads and all(
        tensor.shape[0] == heads for name, tensor in tensors.items() if name.endswith(NORMS)
    ):
        config.model_parallel_size = heads


def describes_lumina(folder: Path) -> bool:
    """Whether config.json was written by Lumina-mGPT's copy of the model class.

    Its class names are its own, and its config has a switch for the masking of image logits.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = config.get("architectures") or []
    return "mask_image_logits" in config or any("XLLMX" in name for name in names)
