"""The architectures an encoder folder may hold, by the `model_type` of its config.json.

Each is one of transformers' own models. What its output holds, and so which poolings there are, is
said by the table FAMILIES at the end of this file.

Legend: N images, L tokens, P patches (raster order), d hidden width, D feature width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    PreTrainedModel,
    Sam2VisionConfig,
    Sam2VisionModel,
    SamVisionConfig,
    SamVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTMAEModel,
    ViTModel,
)
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings

from arra.encoders.loading import from_folder
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

WITH_CLASS_TOKEN = ("class", "mean", "both", "patch")
WITH_PROJECTION = ("class", "mean", "both", "patch", "projected")


@dataclass(frozen=True)
class Tokens:
    """What a vision tower says about N images.

    Attributes:
        patches_NPd: one vector a patch.
        class_Nd: the class token, where there is one.
        projected_ND: the embedding in the space shared with text, where it was asked for.
    """

    patches_NPd: Tensor
    class_Nd: Tensor | None = None
    projected_ND: Tensor | None = None


Read = Callable[[Any, Tensor], Tokens]
"""(model, pixels (N, 3, H, W)) -> its tokens."""


def _hidden_size(model: Any, pooling: str) -> int:
    return int(model.config.hidden_size)


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: as errors and fingerprints call it.
        processor: the image processor of folders that do not name theirs.
        load: (folder, pooling) -> model in float32, every weight from the file.
        read: the model's tokens.
        poolings: those it has; the first is the default.
        width: (model, pooling) -> d, or D of `projected`.
        shrink: lets the model see inputs of a smaller size; None: it has one size only.
        shaping: further config values that change features without changing any shape; a dot leads
            into a nested config.
    """

    name: str
    processor: str
    load: Callable[[Path, str], PreTrainedModel]
    read: Read
    poolings: tuple[str, ...] = WITH_CLASS_TOKEN
    width: Callable[[Any, str], int] = _hidden_size
    shrink: Callable[[Any, int], None] | None = None
    shaping: tuple[str, ...] = ()


# ---- class tokens --------------------------------------------------------------------------------


def _load_plain(kind: Any) -> Callable[[Path, str], PreTrainedModel]:
    return lambda folder, pooling: from_folder(kind, folder, {})


def _load_vit(folder: Path, pooling: str) -> PreTrainedModel:
    return from_folder(ViTModel, folder, {"add_pooling_layer": False})


def _read_plain(model: Any, pixels_NCHW: Tensor) -> Tokens:
    """Class token, then register tokens if the family has them, then patches."""
    hidden_NLd = model(pixel_values=pixels_NCHW).last_hidden_state
    first = 1 + int(getattr(model.config, "num_register_tokens", 0))
    return Tokens(hidden_NLd[:, first:], hidden_NLd[:, 0])


def _load_clip(folder: Path, pooling: str) -> PreTrainedModel:
    raw = read_json(folder / "config.json")
    if raw["model_type"] == "clip":
        vision = dict(raw.get("vision_config") or {})
        # A whole CLIP says its projection once for both towers; the vision part may repeat another.
        if "projection_dim" in raw:
            vision["projection_dim"] = raw["projection_dim"]
        config = CLIPVisionConfig.from_dict(vision)
    else:
        config = CLIPVisionConfig.from_dict(raw)
    kind = CLIPVisionModelWithProjection if pooling == "projected" else CLIPVisionModel
    return from_folder(kind, folder, {"config": config})


def _read_clip(model: Any, pixels_NCHW: Tensor) -> Tokens:
    """Of either class of transformers: with the projection, or with the class token."""
    output = model(pixel_values=pixels_NCHW)
    patches_NPd = output.last_hidden_state[:, 1:]
    if isinstance(model, CLIPVisionModelWithProjection):
        return Tokens(patches_NPd, projected_ND=output.image_embeds)
    return Tokens(patches_NPd, output.pooler_output)


def _clip_width(model: Any, pooling: str) -> int:
    config = model.config
    return int(config.projection_dim if pooling == "projected" else config.hidden_size)


class _AllPatches(ViTMAEEmbeddings):
    """Embeddings that hide no patch and keep their order.

    With a mask_ratio of 0 transformers' own would still sort the patches at random.
    """

    def random_masking(
        self, sequence: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The patches as they are, a mask (N, P) of zeros, and the order (N, P)."""
        mask_NP = sequence.new_zeros(sequence.shape[:2])
        order_NP = torch.arange(sequence.shape[1], device=sequence.device).expand_as(mask_NP)
        return sequence, mask_NP, order_NP


def _load_mae(folder: Path, pooling: str) -> PreTrainedModel:
    # Not a subclass: transformers translates old names of weights by the name of the class.
    model: Any = from_folder(ViTMAEModel, folder, {})
    embeddings = _AllPatches(model.config)
    embeddings.load_state_dict(model.embeddings.state_dict())
    model.embeddings = embeddings
    return model


# ---- without a class token -----------------------------------------------------------------------


def _load_siglip(folder: Path, pooling: str) -> PreTrainedModel:
    raw = _vision_part(folder)
    config = SiglipVisionConfig.from_dict(raw)
    if pooling == "projected" and not raw.get("vision_use_head", True):
        raise ValueError(f"encoder {folder} (SigLIP) was saved without its head: use @mean")
    return from_folder(SiglipVisionModel, folder, {"config": config})


def _read_siglip(model: Any, pixels_NCHW: Tensor) -> Tokens:
    """Its head pools by attention; the result is what is compared with text."""
    output = model(pixel_values=pixels_NCHW)
    return Tokens(output.last_hidden_state, projected_ND=output.pooler_output)


def _load_sam(folder: Path, pooling: str) -> PreTrainedModel:
    config = SamVisionConfig.from_dict(_vision_part(folder))
    return from_folder(SamVisionModel, folder, {"config": config})


def _read_sam(model: Any, pixels_NCHW: Tensor) -> Tokens:
    """The image embedding that SAM's decoder sees: after the neck."""
    return Tokens(_raster(model(pixel_values=pixels_NCHW).last_hidden_state))


def _shrink_sam(model: Any, size: int) -> None:
    """Absolute positions by bicubic interpolation; relative ones follow in transformers' class."""
    encoder, patch = model.vision_encoder, int(model.config.patch_size)
    native = int(model.config.image_size)
    if size % patch or not patch <= size <= native:
        raise ValueError(
            f"SAM sees squares of {native} pixels, or smaller ones in multiples of {patch}; "
            f"{size} is none"
        )
    if encoder.pos_embed is not None:
        position_1dhw = encoder.pos_embed.detach().permute(0, 3, 1, 2)
        smaller_1dhw = F.interpolate(
            position_1dhw, (size // patch, size // patch), mode="bicubic", antialias=False
        )
        encoder.pos_embed = torch.nn.Parameter(smaller_1dhw.permute(0, 2, 3, 1).contiguous())
    encoder.patch_embed.image_size = (size, size)


def _load_sam2(folder: Path, pooling: str) -> PreTrainedModel:
    config = Sam2VisionConfig.from_dict(_vision_part(folder))
    return from_folder(
        Sam2VisionModel, folder, {"config": config, "key_mapping": {"^vision_encoder.": ""}}
    )


def _read_sam2(model: Any, pixels_NCHW: Tensor) -> Tokens:
    """The coarsest level of the pyramid: the image embedding before SAM 2 adds its memory."""
    return Tokens(_raster(model(pixel_values=pixels_NCHW).fpn_hidden_states[-1]))


def _raster(grid_NDhw: Tensor) -> Tensor:
    return grid_NDhw.flatten(2).transpose(1, 2)


def _vision_part(folder: Path) -> dict[str, Any]:
    """config.json of a vision tower alone, or the vision part of a whole model's."""
    raw = read_json(folder / "config.json")
    return dict(raw.get("vision_config") or {}) if "vision" not in raw["model_type"] else raw


# ---- the table -----------------------------------------------------------------------------------

_CLIP = Family(
    "CLIP", "CLIPImageProcessor", _load_clip, _read_clip, WITH_PROJECTION, width=_clip_width
)
_SIGLIP = Family(
    "SigLIP",
    "SiglipImageProcessor",
    _load_siglip,
    _read_siglip,
    ("mean", "projected", "patch"),
)
_SAM = Family(
    "SAM",
    "SamImageProcessor",
    _load_sam,
    _read_sam,
    ("mean", "patch"),
    width=lambda model, pooling: int(model.config.output_channels),
    shrink=_shrink_sam,
    shaping=("use_abs_pos", "use_rel_pos", "window_size", "global_attn_indexes"),
)
_SAM2_BACKBONE = (
    *("hidden_act", "layer_norm_eps", "num_attention_heads_per_stage", "blocks_per_stage"),
    *("window_size_per_stage", "global_attention_blocks", "num_query_pool_stages"),
    *("query_stride", "patch_stride", "patch_padding"),
)
_SAM2 = Family(
    "SAM2",
    "Sam2ImageProcessor",
    _load_sam2,
    _read_sam2,
    ("mean", "patch"),
    width=lambda model, pooling: int(model.config.fpn_hidden_size),
    shaping=(
        "fpn_top_down_levels",
        *(f"backbone_config.{key}" for key in _SAM2_BACKBONE),
    ),
)

FAMILIES: dict[str, Family] = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "dinov2": Family("DINOv2", "BitImageProcessor", _load_plain(Dinov2Model), _read_plain),
    "dinov2_with_registers": Family(
        "DINOv2", "BitImageProcessor", _load_plain(Dinov2WithRegistersModel), _read_plain
    ),
    "dinov3_vit": Family(
        "DINOv3",
        "DINOv3ViTImageProcessor",
        _load_plain(DINOv3ViTModel),
        _read_plain,
        shaping=("rope_theta", "rope_parameters", "use_gated_mlp"),
    ),
    "sam": _SAM,
    "sam_vision_model": _SAM,
    "sam2": _SAM2,
    "sam2_video": _SAM2,
    "sam2_vision_model": _SAM2,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "vit": Family("ViT", "ViTImageProcessor", _load_vit, _read_plain),
    "vit_mae": Family("MAE", "ViTImageProcessor", _load_mae, _read_plain),
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
    if kind in ("siglip2", "siglip2_vision_model"):
        raise ValueError(
            f"encoder {folder} is SigLIP 2 of variable resolution (naflex), which is not "
            f"supported: use one of fixed resolution, such as google/siglip2-base-patch16-224"
        )
    if kind not in FAMILIES:
        raise ValueError(
            f"encoder {folder} is of type {kind!r}; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]
