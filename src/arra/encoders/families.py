"""The architectures an encoder folder may hold, by the `model_type` of its config.json.

Each is a transformers model whose last hidden state is (N, 1 + registers + patches, hidden): the
class token first, then register tokens if the family has them, then the patches in raster order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Model,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    ViTModel,
)
from transformers.utils import logging

from arra.files import read_json

SHAPING_KEYS = (
    "hidden_act",
    "num_attention_heads",
    "layer_norm_eps",
    "patch_size",
    "image_size",
    "qkv_bias",
    "use_swiglu_ffn",
    "num_register_tokens",
)
"""Config values that change features without changing the shape of any weight."""


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: as errors and fingerprints call it.
        processor: the image processor of folders that do not name theirs.
        load: (folder, wants projection) -> model in float32, every weight from the file.
        projects: whether it has a projection into a space shared with text.
    """

    name: str
    processor: str
    load: Callable[[Path, bool], PreTrainedModel]
    projects: bool = False


def _load_clip(folder: Path, projection: bool) -> PreTrainedModel:
    raw = read_json(folder / "config.json")
    if raw["model_type"] == "clip":
        vision = dict(raw.get("vision_config") or {})
        # A whole CLIP says its projection once for both towers; the vision part may repeat another.
        if "projection_dim" in raw:
            vision["projection_dim"] = raw["projection_dim"]
        config = CLIPVisionConfig.from_dict(vision)
    else:
        config = CLIPVisionConfig.from_dict(raw)
    kind = CLIPVisionModelWithProjection if projection else CLIPVisionModel
    return from_folder(kind, folder, {"config": config})


def _load_vit(folder: Path, projection: bool) -> PreTrainedModel:
    return from_folder(ViTModel, folder, {"add_pooling_layer": False})


def _load_dinov2(folder: Path, projection: bool) -> PreTrainedModel:
    return from_folder(Dinov2Model, folder, {})


def _load_dinov2_with_registers(folder: Path, projection: bool) -> PreTrainedModel:
    return from_folder(Dinov2WithRegistersModel, folder, {})


def from_folder(kind: Any, folder: Path, options: dict[str, Any]) -> PreTrainedModel:
    """from_pretrained that reads safetensors only and refuses weights left at random."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # the unused text tower would be reported key by key
    logging.disable_progress_bar()
    try:
        model, info = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"encoder {folder} has no readable safetensors weights ({reason})"
        ) from None
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"encoder {folder} does not fit its config.json ({reason})") from None
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"encoder {folder} lacks {len(missing)} weights, {missing[0]} among them: "
            f"it is not a complete {kind.__name__}"
            + (" (pool with @class instead)" if "visual_projection.weight" in missing else "")
        )
    return model


FAMILIES: dict[str, Family] = {
    "clip": Family("CLIP", "CLIPImageProcessor", _load_clip, projects=True),
    "clip_vision_model": Family("CLIP", "CLIPImageProcessor", _load_clip, projects=True),
    "dinov2": Family("DINOv2", "BitImageProcessor", _load_dinov2),
    "dinov2_with_registers": Family("DINOv2", "BitImageProcessor", _load_dinov2_with_registers),
    "vit": Family("ViT", "ViTImageProcessor", _load_vit),
}


def family_of(folder: Path) -> Family:
    """The family of an encoder folder.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: an architecture that is not supported; the message names those that are.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"encoder {folder} has no config.json: it is not a model folder")
    kind = read_json(path).get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"encoder {folder} is of type {kind!r}; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]
