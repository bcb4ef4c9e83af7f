"""A tokenizer whose codes are made of a frozen vision encoder's features: semantic codes.

In the manner of VFMTok (arXiv 2507.08441; CVMI-Lab/VFMTok): patch features of several blocks of a
frozen encoder become latents, the latents codes, and from the codes come pixels and, in the fit,
the encoder's features again (teacher.py). Different from there: codes stand on a regular grid in
raster order instead of at learned places (its "region-adaptive" queries need a deformable
attention), so that painters, layouts and patch targets work as with any other tokenizer; and what
lies between features and latents is convolutional, like the decoder.

A folder holds config.json, model.safetensors and encoder/: the frozen encoder in its own format.

Legend: N images, d hidden width of the encoder, C channels, H and W pixels, h and w cells.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arra.files import atomic_dir
from arra.image_tokenizers.layers import PixelNorm, ResBlock, SemanticVQConfig, VQConfig
from arra.image_tokenizers.loading import fitting
from arra.image_tokenizers.teacher import Teacher, stored_sha256
from arra.image_tokenizers.vq import VQModel

ENCODER = "encoder"
"""The subfolder of a tokenizer that holds its frozen encoder."""


class Adapter(nn.Module):
    """Features (N, d, h, w) of each layer to latents (N, z, h, w).

    Each layer has its own norm and projection, as in VFMTok; residual blocks mix the cells. With
    kernel 1 and norm "pixel" a cell's latent depends on the features of that cell alone.
    """

    def __init__(self, config: SemanticVQConfig) -> None:
        super().__init__()
        width, kernel = config.levels()[-1], config.encoder_kernel
        levels = range(max(1, len(config.encoder_layers)))
        self.norms = nn.ModuleList(PixelNorm(config.encoder_dim) for _ in levels)
        self.projections = nn.ModuleList(nn.Conv2d(config.encoder_dim, width, 1) for _ in levels)
        self.blocks = nn.Sequential(
            *(ResBlock(width, width, config, kernel) for _ in range(config.res_blocks))
        )
        self.norm_out = PixelNorm(width)
        self.conv_out = nn.Conv2d(width, config.z_channels, 1)

    def forward(self, layers: Sequence[Tensor]) -> Tensor:
        projected = [
            projection(norm(layer_Ndhw))
            for layer_Ndhw, norm, projection in zip(
                layers, self.norms, self.projections, strict=True
            )
        ]
        h_NChw = self.blocks(torch.stack(projected).sum(dim=0))
        return self.conv_out(F.silu(self.norm_out(h_NChw)))


class SemanticVQModel(VQModel):
    """A VQ tokenizer that sees through a frozen encoder; otherwise as `VQModel`.

    Attributes:
        teacher: the frozen encoder. No part of `state_dict()`; None in a model on the meta device
            that is only asked for its shapes.
    """

    config_class = SemanticVQConfig
    config: SemanticVQConfig

    def __init__(self, config: SemanticVQConfig, teacher: Teacher | None = None) -> None:
        super().__init__(config)
        self.teacher = teacher

    def make_encoder(self) -> nn.Module:
        """The trained part between the frozen encoder and the codes."""
        return Adapter(self.config)

    def given(self, x_NCHW: Tensor) -> list[Tensor]:
        """The frozen features (N, d, h, w) of floats -1..1, shallow to deep, without gradients."""
        assert self.teacher is not None, "this model has no encoder: open it from its folder"
        height, width = x_NCHW.shape[2:]
        grid = (height // self.factor, width // self.factor)
        return [layer_Ndhw.to(self.dtype) for layer_Ndhw in self.teacher(x_NCHW, grid)]

    def save_pretrained(self, save_directory: Path) -> None:  # type: ignore[override]
        """Writes a folder that `load_image_tokenizer` opens, the frozen encoder included."""
        self.store_encoder(Path(save_directory))
        super().save_pretrained(save_directory)

    def store_encoder(self, folder: Path) -> None:
        """Copies the frozen encoder into `folder`/encoder, unless it is there."""
        assert self.teacher is not None, "this model has no encoder: open it from its folder"
        if not (folder / ENCODER).exists():
            with atomic_dir(folder / ENCODER) as temporary:
                shutil.copytree(self.teacher.folder, temporary, dirs_exist_ok=True)


def open_semantic(folder: Path, settings: dict[str, Any], device: str = "cpu") -> SemanticVQModel:
    """The tokenizer in `folder`, frozen, float32.

    Args:
        settings: its config.json.

    Raises:
        ValueError: a file is missing or damaged, or the encoder is not the one that the codes were
            fitted on.
    """
    config = SemanticVQConfig.from_dict(settings)
    with torch.device("meta"):
        model = SemanticVQModel(config)
    tensors = fitting(folder, model)
    model.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
    inside = folder / ENCODER
    if not inside.is_dir():
        raise ValueError(f"{inside}, the frozen encoder that the codes are made of, is missing")
    if stored_sha256(inside) != config.encoder_sha256:
        raise ValueError(
            f"{inside} is not the encoder that {folder} was fitted with: put the original back"
        )
    model.teacher = Teacher(inside, tuple(config.encoder_layers))
    return model.eval().requires_grad_(False).to(torch.device(device))


def semantic_config(config: VQConfig, teacher: Teacher) -> SemanticVQConfig:
    """The configuration of a semantic tokenizer with the decoder and the codes of `config`."""
    sizes: dict[str, Any] = {name: getattr(config, name) for name in VQConfig.sizes()}
    return SemanticVQConfig(
        **sizes,
        encoder_layers=list(teacher.layers),
        encoder_dim=teacher.dim,
        encoder_sha256=stored_sha256(teacher.folder),
    )
