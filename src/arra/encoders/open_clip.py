"""Vision towers in open_clip's own format: BioMedCLIP, RemoteCLIP, GeoRSCLIP and their like.

A folder with `open_clip_config.json` and the weights beside it, read without open_clip, timm or
remote code. Two kinds of tower (mlfoundations/open_clip 89fb801, model.py, `_build_vision_tower`):

- timm's ViT and a linear projection (timm_model.py; names of huggingface/pytorch-image-models
  aa4b585, vision_transformer.py): BioMedCLIP, a ViT-B/16. It becomes transformers' ViTModel.
- open_clip's own (transformer.py, class VisionTransformer). It becomes transformers' CLIP.

Legend: N images, d hidden width, D width of the space shared with text.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, ViTConfig, ViTModel

from arra.encoders.families import FAMILIES, WITH_PROJECTION, Read, Tokens
from arra.encoders.loading import from_tensors
from arra.encoders.preprocessing import Preprocessing, open_clip_pixels
from arra.files import read_json
from arra.foreign import SUFFIXES, read_foreign

CONFIG = "open_clip_config.json"
PUBLISHED = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""What the weights are called on the hub, the preferred first."""
POOLINGS = WITH_PROJECTION

_KNOWN = {
    *("image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio", "patch_dropout"),
    *("timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_drop"),
    *("timm_drop_path", "timm_patch_dropout"),
}
"""Options of a tower that are understood, or matter in training only."""
_TIMM_NAME = re.compile(r"vit_(tiny|small|base|large)_patch\d+_(clip_)?\d+(\.\w+)?")
_TIMM_HEAD = 64
"""Width of an attention head in all of those."""
_NAMES_OF_TIMM = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_BLOCK_OF_TIMM = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_NAMES_OF_OPEN_CLIP = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1": "vision_model.embeddings.patch_embedding",
    "ln_pre": "vision_model.pre_layrnorm",
    "ln_post": "vision_model.post_layernorm",
}
_BLOCK_OF_OPEN_CLIP = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


class ProjectedViT(nn.Module):
    """transformers' ViT and a projection of its class token; `config` is the ViT's."""

    def __init__(self, trunk: ViTModel, projection: nn.Linear) -> None:
        super().__init__()
        self.trunk, self.projection = trunk, projection
        self.config = trunk.config

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> Any:
        """The output of the ViT."""
        return self.trunk(pixel_values=pixel_values, output_hidden_states=output_hidden_states)


@dataclass(frozen=True)
class Tower:
    """A vision tower.

    Attributes:
        name: as errors and fingerprints call it.
        model: with every weight loaded.
        read: its tokens.
        projected: D.
        preprocessing: how its images are prepared.
    """

    name: str
    model: Any
    read: Read
    projected: int
    preprocessing: Preprocessing


def is_open_clip(folder: Path) -> bool:
    """Whether a folder is to be read as open_clip's; transformers' format goes before it."""
    if not (folder / CONFIG).is_file():
        return False
    other = folder / "config.json"
    return not other.is_file() or read_json(other).get("model_type") not in FAMILIES


def open_tower(folder: Path) -> Tower:
    """The vision tower of an open_clip folder, in float32.

    Raises:
        ValueError: no weights, weights that do not fit, or a tower of another kind.
    """
    whole = read_json(folder / CONFIG)
    model_cfg = whole.get("model_cfg") or {}
    vision = model_cfg.get("vision_cfg") or {}
    unknown = sorted(set(vision) - _KNOWN)
    if unknown:
        raise ValueError(
            f"encoder {folder}: {CONFIG} sets {', '.join(unknown)} for its tower, which is not "
            f"supported"
        )
    weights = weights_of(folder)
    prefix = "visual."
    tensors = {
        name.removeprefix(prefix): tensor.float()
        for name, tensor in read_foreign(weights).tensors.items()
        if name.startswith(prefix)
    }
    if not tensors:
        raise ValueError(f"{weights}: expected tensors named visual.*, as open_clip's are")
    size = vision.get("image_size", 224)
    if not isinstance(size, int):
        raise ValueError(f"encoder {folder}: image_size {size} is no square's side")
    preprocessing = open_clip_pixels(whole.get("preprocess_cfg") or {}, size, folder)
    if "timm_model_name" in vision:
        vit = _open_timm(vision, tensors, size, folder)
        width = vit.projection.out_features
        return Tower("open_clip ViT", vit, _read_timm, width, preprocessing)
    clip = _open_own(model_cfg, tensors, size, folder)
    width = clip.config.projection_dim
    return Tower("open_clip CLIP", clip, _read_own, width, preprocessing)


def weights_of(folder: Path) -> Path:
    """The file with the weights: under a published name, or the only one there is."""
    for name in PUBLISHED:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(found) != 1:
        said = f"found {', '.join(path.name for path in found)}" if found else "found none"
        raise ValueError(
            f"encoder {folder} has an {CONFIG}, so it needs {' or '.join(PUBLISHED)}, or one file "
            f"of weights; {said}"
        )
    return found[0]


def _read_timm(model: Any, pixels_NCHW: Tensor) -> Tokens:
    """Tokens after the final norm, the first of which is projected."""
    hidden_NLd = model(pixel_values=pixels_NCHW).last_hidden_state
    class_Nd = hidden_NLd[:, 0]
    return Tokens(hidden_NLd[:, 1:], class_Nd, model.projection(class_Nd))


def _read_own(model: Any, pixels_NCHW: Tensor) -> Tokens:
    """As CLIP's: patches before the post norm, the class token after it, then projected."""
    output = model.vision_model(pixel_values=pixels_NCHW)
    class_Nd = output.pooler_output
    return Tokens(output.last_hidden_state[:, 1:], class_Nd, model.visual_projection(class_Nd))


# ---- timm's ViT ----------------------------------------------------------------------------------


def _open_timm(
    vision: dict[str, Any], tensors: dict[str, Tensor], size: int, folder: Path
) -> ProjectedViT:
    name, proj = str(vision["timm_model_name"]), vision.get("timm_proj", "linear")
    pool = vision.get("timm_pool", "avg")
    if not _TIMM_NAME.fullmatch(name) or pool not in ("", "token") or proj != "linear":
        raise ValueError(
            f"encoder {folder} is a {name} with timm_pool {pool!r} and timm_proj {proj!r}; "
            f"supported of timm are plain ViTs (vit_base_patch16_224) that project their class "
            f"token: timm_pool '' or 'token', timm_proj 'linear'"
        )
    renamed: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    strange = []
    for key, tensor in tensors.items():
        if key in ("head.proj.weight", "head.proj.bias"):
            head[key.rpartition(".")[2]] = tensor
            continue
        new = _renamed_key(key.removeprefix("trunk."), _NAMES_OF_TIMM, "blocks", _BLOCK_OF_TIMM)
        layer = re.fullmatch(r"trunk\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)", key)
        if layer is not None:
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            at = f"encoder.layer.{layer[1]}.attention.attention"
            renamed |= {f"{at}.{part}.{layer[2]}": value for part, value in parts}
        elif key.startswith("trunk.") and new is not None:
            renamed[new.replace("blocks.", "encoder.layer.")] = tensor
        else:
            strange.append(key)
    _refuse_strange(strange, folder)
    patch = _shape_of(tensors, "trunk.patch_embed.proj.weight", folder)
    width = patch[0]
    up = _shape_of(tensors, "trunk.blocks.0.mlp.fc1.weight", folder)
    projection = _shape_of(tensors, "head.proj.weight", folder)
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=depth_of(tensors, "blocks"),
        num_attention_heads=width // _TIMM_HEAD,
        intermediate_size=up[0],
        patch_size=patch[2],
        image_size=size,
        layer_norm_eps=1e-6,
        qkv_bias="trunk.blocks.0.attn.qkv.bias" in tensors,
    )
    linear = nn.Linear(projection[1], projection[0], bias="bias" in head)
    linear.load_state_dict(head)
    trunk = from_tensors(ViTModel, config, renamed, folder, {"add_pooling_layer": False})
    return ProjectedViT(trunk, linear)


# ---- open_clip's own -----------------------------------------------------------------------------


def _open_own(
    model_cfg: dict[str, Any], tensors: dict[str, Tensor], size: int, folder: Path
) -> CLIPVisionModelWithProjection:
    vision = model_cfg.get("vision_cfg") or {}
    renamed, strange = in_transformers(
        tensors, _NAMES_OF_OPEN_CLIP, "vision_model.encoder.layers", ("proj", "visual_projection")
    )
    _refuse_strange(strange, folder)
    patch = _shape_of(tensors, "conv1.weight", folder)
    width = patch[0]
    config = CLIPVisionConfig(
        hidden_size=width,
        num_hidden_layers=depth_of(tensors, "resblocks"),
        num_attention_heads=width // int(vision.get("head_width", 64)),
        intermediate_size=_shape_of(tensors, "transformer.resblocks.0.mlp.c_fc.weight", folder)[0],
        patch_size=patch[2],
        image_size=size,
        projection_dim=_shape_of(tensors, "proj", folder)[1],
        hidden_act="quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
        layer_norm_eps=1e-5,
    )
    return from_tensors(CLIPVisionModelWithProjection, config, renamed, folder, {})


# ---- names ---------------------------------------------------------------------------------------


def in_transformers(
    tensors: Mapping[str, Tensor], names: dict[str, str], layers: str, projection: tuple[str, str]
) -> tuple[dict[str, Tensor], list[str]]:
    """A tower of open_clip's own as transformers' CLIP names it, and the keys that are unknown.

    Args:
        names: of what is not in a block.
        layers: what transformers calls the blocks.
        projection: what both call it; open_clip keeps it transposed.
    """
    renamed: dict[str, Tensor] = {}
    strange = []
    for key, tensor in tensors.items():
        new = _renamed_key(key, names, "transformer.resblocks", _BLOCK_OF_OPEN_CLIP)
        joined = re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", key)
        if joined is not None:
            parts = zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True)
            at = f"{layers}.{joined[1]}.self_attn"
            renamed |= {f"{at}.{part}.{joined[2]}": value for part, value in parts}
        elif key == projection[0]:
            renamed[f"{projection[1]}.weight"] = tensor.T.contiguous()
        elif new is not None:
            renamed[new.replace("transformer.resblocks", layers)] = tensor
        else:
            strange.append(key)
    return renamed, strange


def _renamed_key(
    key: str, names: dict[str, str], blocks: str, block_names: dict[str, str]
) -> str | None:
    """The name in transformers, with the block's number left where it was; None if unknown."""
    if key in names:
        return names[key]
    inner = re.fullmatch(rf"({re.escape(blocks)}\.\d+\.)?(.+)\.(weight|bias)", key)
    if inner is None:
        return None
    block, name, leaf = inner.groups()
    new = (block_names if block else names).get(name)
    return None if new is None else f"{block or ''}{new}.{leaf}"


def _refuse_strange(strange: list[str], folder: Path) -> None:
    if strange:
        raise ValueError(
            f"encoder {folder}: its tower has {len(strange)} tensors that a plain ViT has not, "
            f"visual.{strange[0]} among them: it is of a kind that is not supported"
        )


def _shape_of(tensors: dict[str, Tensor], name: str, folder: Path) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"encoder {folder} lacks visual.{name}: its weights are not complete")
    return tuple(tensors[name].shape)


def depth_of(tensors: dict[str, Tensor], blocks: str) -> int:
    found = (re.search(rf"\b{blocks}\.(\d+)\.", name) for name in tensors)
    return 1 + max(int(match[1]) for match in found if match)
