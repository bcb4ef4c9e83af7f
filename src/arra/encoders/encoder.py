"""A frozen encoder E_F with its own preprocessing and the pooling that gives f_GF.

Pooling, with what it means in each family (CLIP, DINOv2, ViT):

- `class` (default): the class token. The paper (section 3.2) takes it from CLIP and BioMedCLIP. In
  CLIP it is taken after the post layer norm, `pooler_output`; in DINOv2 and ViT it is the first
  token after the final layer norm.
- `projected`: CLIP only, the class token's image embedding in the space shared with text. The
  released code of the paper aligns to this one, although the text names the class token.
- `mean`: the mean over patch tokens of `last_hidden_state` (as the paper does for encoders without
  a class token).
- `both`: `class` and `mean`, concatenated.

Legend: N images, D feature width, H and W pixels the encoder sees, L tokens, d hidden width.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    DeiTImageProcessorPil,
    PreTrainedModel,
    ViTImageProcessorPil,
)

from arra.encoders.families import SHAPING_KEYS, Family, family_of
from arra.files import read_json
from arra.resolve import resolve_folder

POOLINGS = ("class", "projected", "mean", "both")
DEFAULT_POOLING = "class"

PROCESSORS = {
    "BitImageProcessor": BitImageProcessorPil,
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "ConvNextImageProcessor": ConvNextImageProcessorPil,
    "DeiTImageProcessor": DeiTImageProcessorPil,
    "ViTImageProcessor": ViTImageProcessorPil,
}
"""By the name in preprocessor_config.json, always with Pillow: torchvision's resize gives other
features, and transformers 5.17 has no AutoImageProcessor where torchvision is absent."""

_PROCESSOR_NAMES = ("image_processor_type", "feature_extractor_type", "processor_class")


class Encoder:
    """Maps a list of RGB images to features (N, D) float32, on the encoder's device.

    Attributes:
        name: the last part of what was asked for, such as `clip-vit-large-patch14`.
        spec: what was asked for, without the pooling.
        pooling: one of POOLINGS.
        dim: D.
        family: name of the architecture.
        fingerprint: sha256 over weights, shape-free config values, preprocessing, pooling, family.
        model: the frozen transformers model, in eval mode.
    """

    def __init__(
        self, spec: str, folder: Path, family: Family, pooling: str, device: torch.device | str
    ) -> None:
        self.spec, self.pooling, self.family = spec, pooling, family.name
        self.name = _short_name(spec)
        self.device = torch.device(device)
        model = family.load(folder, pooling == "projected")
        self._processor = _load_processor(folder, family)
        self.fingerprint = _fingerprint(model, folder, family, pooling)
        model.to(self.device)  # type: ignore[arg-type]
        self.model = model.eval().requires_grad_(False)
        config = model.config
        width = config.projection_dim if pooling == "projected" else config.hidden_size
        self.dim = int(width) * (2 if pooling == "both" else 1)
        self._first_patch = 1 + int(getattr(config, "num_register_tokens", 0))

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Features (N, D) float32 of RGB images of any sizes."""
        return self.pool(self.preprocess(images))

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Pixels (N, 3, H, W) float32 as the encoder's own preprocessor_config.json says."""
        return self.pixels(images).to(self.device)

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """What `preprocess` gives, still in main memory; may be called from several threads."""
        pixels = self._processor(images=list(images), return_tensors="pt")["pixel_values"]
        return pixels.to(torch.float32)

    def pool(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """Features (N, D) of preprocessed pixels. Differentiable with respect to the pixels."""
        output = self.model(pixel_values=pixels_NCHW)
        if self.pooling == "projected":
            return output.image_embeds
        hidden_NLd = output.last_hidden_state
        if self.pooling == "mean":
            return hidden_NLd[:, self._first_patch :].mean(dim=1)
        class_Nd = output.pooler_output if self.family == "CLIP" else hidden_NLd[:, 0]
        if self.pooling == "class":
            return class_Nd
        mean_Nd = hidden_NLd[:, self._first_patch :].mean(dim=1)
        return torch.cat([class_Nd, mean_Nd], dim=-1)


def load_encoder(
    spec: str | Path, pooling: str | None = None, device: torch.device | str = "cpu"
) -> Encoder:
    """Loads a frozen encoder.

    Args:
        spec: a folder, hub id or `builtin:NAME`, with an optional `@class|projected|mean|both`.
        pooling: the same choice as an argument; `class` where neither is given.
        device: where it computes.

    Raises:
        FileNotFoundError: no config.json or preprocessor_config.json in the folder.
        ValueError: nothing there, an unknown architecture, or a pooling the family does not have.
    """
    bare, suffix = split_spec(str(spec))
    if pooling is not None and suffix is not None and pooling != suffix:
        raise ValueError(f"encoder {spec} says @{suffix}, but pooling {pooling!r} is asked for")
    chosen = pooling or suffix or DEFAULT_POOLING
    if chosen not in POOLINGS:
        raise ValueError(f"unknown pooling {chosen!r}; there is {', '.join(POOLINGS)}")
    folder = resolve_folder(bare, "encoder")
    family = family_of(folder)
    if chosen == "projected" and not family.projects:
        raise ValueError(f"encoder {bare} ({family.name}) has no projection: use @class or @mean")
    return Encoder(bare, folder, family, chosen, device)


def split_spec(spec: str) -> tuple[str, str | None]:
    """Splits `E@POOLING` into E and POOLING (None where there is no @).

    Raises:
        ValueError: something else than a pooling behind the @.
    """
    bare, at, suffix = spec.rpartition("@")
    if not at or "/" in suffix:  # an @ within a folder's path belongs to the path
        return spec, None
    if suffix not in POOLINGS:
        raise ValueError(f"encoder {spec}: @{suffix} is no pooling; there is {', '.join(POOLINGS)}")
    return bare, suffix


def _short_name(spec: str) -> str:
    if spec.startswith("builtin:"):
        return spec.removeprefix("builtin:")
    return Path(spec).expanduser().resolve().name if Path(spec).is_dir() else spec.split("/")[-1]


def _load_processor(folder: Path, family: Family) -> Any:
    config = _processor_config(folder)
    named = config.get("image_processor_type") or config.get("feature_extractor_type")
    kind = (named or family.processor).removesuffix("Fast")
    kind = kind.replace("FeatureExtractor", "ImageProcessor")
    if kind not in PROCESSORS:
        raise ValueError(
            f"encoder {folder} is preprocessed by {named}; supported are {', '.join(PROCESSORS)}"
        )
    return PROCESSORS[kind].from_pretrained(folder, local_files_only=True)


def _processor_config(folder: Path) -> dict[str, Any]:
    """The preprocessing as the folder's file says it; whole processors keep it one level down."""
    if (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").is_file():
        nested = read_json(folder / "processor_config.json").get("image_processor")
        if nested:
            return nested
    raise FileNotFoundError(
        f"encoder {folder} has no preprocessor_config.json: copy the one of its model there"
    )


def _fingerprint(model: PreTrainedModel, folder: Path, family: Family, pooling: str) -> str:
    config = model.config.to_dict()
    processor = _processor_config(folder)
    described = {
        "family": family.name,
        "pooling": pooling,
        "config": {key: config[key] for key in SHAPING_KEYS if key in config},
        "processor": {k: v for k, v in processor.items() if k not in _PROCESSOR_NAMES},
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
