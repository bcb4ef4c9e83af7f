"""The VQGAN family as one configurable model: an image becomes a grid of codes, codes an image.

Taming-transformers' VQGAN (arXiv 2012.09841, section 3.1) and its descendants differ in widths,
depths, attention and in how the codebook is searched. All of that is configuration here, so that
published weights of the family fit by renaming keys (see `VQConfig`).

Ranges: images come and go as uint8 NCHW, 0..255, RGB. Inside they are floats from -1 to 1:
x = byte / 127.5 - 1. Codes are int64 (N, h, w) in 0..K-1, row by row from the top left.

Legend: N images, C channels, H and W pixels, h and w cells (h = H / factor), K codes, D code width.
"""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from arra.image_tokenizers.layers import Decoder, Encoder, VQConfig

LOOKUP_ROWS = 1 << 24
"""Entries of one block of the distance table in a codebook search (64 MiB in float32)."""


class VQModel(PreTrainedModel):
    """A VQ image tokenizer: `encode` to codes, `decode` to pixels."""

    config_class = VQConfig
    config: VQConfig
    main_input_name = "pixels"

    def __init__(self, config: VQConfig) -> None:
        super().__init__(config)
        _check(config)
        self.encoder = self.make_encoder()
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)
        self.codes = nn.Embedding(config.codebook_size, config.codebook_dim)
        self.post_init()

    def make_encoder(self) -> nn.Module:
        """From what `given` says to latents (N, z, h, w)."""
        return Encoder(self.config)

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initial values stand; weights that a folder lacks are an error at load."""

    @property
    def codebook(self) -> Tensor:
        """(K, D): the vectors that are decoded, of unit length where the lookup is normalised."""
        weight_KD = self.codes.weight
        return F.normalize(weight_KD, dim=-1) if self.config.l2_normalize else weight_KD

    @property
    def codebook_size(self) -> int:
        """K."""
        return self.config.codebook_size

    @property
    def factor(self) -> int:
        """Pixels per side of one code's cell."""
        return self.config.factor()

    @property
    def image_size(self) -> int:
        """Pixels per side of the images it was fitted on."""
        return self.config.image_size

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that decides codes and pixels, in float32 whatever is stored."""
        config = {
            name: list(value) if isinstance(value, list | tuple) else value
            for name in sorted(self.config.sizes())
            if name not in ("image_size", "dropout", "config")
            for value in [getattr(self.config, name)]
        }
        total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            total.update(f"{name}{tuple(tensor.shape)}".encode())
            total.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    def latents(self, x_NCHW: Tensor) -> Tensor:
        """Floats -1..1 (N, 3, H, W) to what is compared with the codebook, (N, D, h, w)."""
        return self.latents_of(self.given(x_NCHW))

    def given(self, x_NCHW: Tensor) -> Any:
        """What the encoder is given of floats -1..1: the pixels themselves."""
        return x_NCHW

    def latents_of(self, given: Any) -> Tensor:
        """The latents (N, D, h, w) of what the encoder is given."""
        z_NDHW = self.quant_conv(self.encoder(given))
        return F.normalize(z_NDHW, dim=1) if self.config.l2_normalize else z_NDHW

    @torch.no_grad()
    def nearest(self, z_NDHW: Tensor) -> Tensor:
        """Codes (N, h, w) of the vectors nearest to latents; of equal ones the lowest code."""
        z_RD = z_NDHW.permute(0, 2, 3, 1).flatten(0, 2).float()
        codebook_KD = self.codebook.float()
        square_K = codebook_KD.square().sum(dim=1)
        rows = max(1, LOOKUP_ROWS // len(codebook_KD))
        # |z - e|^2 less |z|^2, which is the same for all codes
        blocks = [
            torch.addmm(square_K, part, codebook_KD.T, alpha=-2).argmin(dim=1)
            for part in z_RD.split(rows)
        ]
        n, _, h, w = z_NDHW.shape
        return torch.cat(blocks).view(n, h, w)

    def embed(self, codes_NHW: Tensor) -> Tensor:
        """Codes (N, h, w) to their vectors (N, D, h, w)."""
        return F.embedding(codes_NHW, self.codebook).permute(0, 3, 1, 2)

    def render(self, z_NDHW: Tensor) -> Tensor:
        """Code vectors (N, D, h, w) to floats (N, 3, H, W), about -1..1."""
        return self.decoder.paint(self.trunk(z_NDHW))

    def trunk(self, z_NDHW: Tensor) -> Tensor:
        """Code vectors (N, D, h, w) to the decoder's features on their grid, (N, C, h, w)."""
        return self.decoder.trunk(self.post_quant_conv(z_NDHW))

    @torch.no_grad()
    def encode(self, pixels_NCHW: Tensor) -> Tensor:
        """Images, uint8 (N, 3, H, W), to codes, int64 (N, h, w).

        Raises:
            ValueError: not uint8 NCHW, or a side that `factor` does not divide.
        """
        shape = tuple(pixels_NCHW.shape)
        if pixels_NCHW.dtype != torch.uint8 or pixels_NCHW.ndim != 4 or shape[1] != 3:
            raise ValueError(
                f"an image tokenizer encodes uint8 images of shape (N, 3, H, W), "
                f"but got {str(pixels_NCHW.dtype).removeprefix('torch.')} of shape {shape}"
            )
        if 0 in shape or shape[2] % self.factor or shape[3] % self.factor:
            raise ValueError(
                f"images of {shape[2]}x{shape[3]} pixels do not fit this image tokenizer: "
                f"choose sides that are multiples of {self.factor}"
            )
        x_NCHW = to_floats(pixels_NCHW.to(self.device)).to(self.dtype)
        return self.nearest(self.latents(x_NCHW))

    @torch.no_grad()
    def decode(self, codes_NHW: Tensor) -> Tensor:
        """Codes, integers (N, h, w), to images, uint8 (N, 3, h * factor, w * factor).

        Raises:
            ValueError: not a grid of integers, or a code outside 0..K-1.
        """
        if codes_NHW.ndim != 3 or codes_NHW.is_floating_point() or codes_NHW.numel() == 0:
            raise ValueError(
                f"codes are integers of shape (N, height, width), but got "
                f"{str(codes_NHW.dtype).removeprefix('torch.')} of shape {tuple(codes_NHW.shape)}"
            )
        low, high = (int(edge) for edge in codes_NHW.aminmax())
        if low < 0 or high >= self.codebook_size:
            raise ValueError(
                f"code {low if low < 0 else high} does not belong to this image tokenizer, whose "
                f"codes are 0..{self.codebook_size - 1}: use the tokenizer that made the codes"
            )
        return to_bytes(self.render(self.embed(codes_NHW.to(self.device, torch.int64))))


def to_floats(pixels_NCHW: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1."""
    return pixels_NCHW.float() / 127.5 - 1.0


def to_bytes(x_NCHW: Tensor) -> Tensor:
    """Floats -1..1 (clipped) to uint8 0..255, rounded."""
    return ((x_NCHW.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _check(config: VQConfig) -> None:
    levels = len(config.channel_multipliers)
    if levels < 1 or config.codebook_size < 1 or config.patch_size < 1:
        raise ValueError("a VQ tokenizer needs at least one level, one code and patch_size 1")
    if config.norm not in ("group", "pixel"):
        raise ValueError(f"norm is {config.norm!r}, but must be 'group' or 'pixel'")
    if config.encoder_kernel not in (1, 3):
        raise ValueError(f"encoder_kernel is {config.encoder_kernel}, but must be 1 or 3")
    outside = [level for level in config.attention_levels if not 0 <= level < levels]
    if outside:
        raise ValueError(f"attention_levels {outside} are not among the levels 0..{levels - 1}")
