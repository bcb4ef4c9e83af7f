"""Emu3's image tokenizer, which is one for video: an image is a clip of equal frames.

transformers' `Emu3VQVAE` does the work: it repeats an image over the frames that become one code
frame, and of the frames that it decodes the first is the image.

Legend: N images, C channels, H and W pixels, h and w cells, K codes, D code width; uint8 0..255.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Emu3Config, Emu3VQVAE, Emu3VQVAEConfig

from arra.files import read_json, write_json

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Files of an image processor; in the second, transformers 5 keeps it under `image_processor`."""
HALF = (0.5, 0.5, 0.5)
"""Mean and spread of pixels: baaivision/Emu3, emu3/tokenizer/image_processing_emu3visionvq.py.
transformers' image processor has CLIP's where a folder does not say."""


class FrameTokenizer(nn.Module):
    """`Emu3VQVAE` behind the interface of an image tokenizer.

    Args:
        model: the tokenizer.
        mean, spread: x = (byte / 255 - mean) / spread is what `model` sees, by channel.
    """

    mean_C111: Tensor
    spread_C111: Tensor

    def __init__(
        self, model: Emu3VQVAE, mean: Sequence[float] = HALF, spread: Sequence[float] = HALF
    ) -> None:
        super().__init__()
        self.model = model.eval()
        self.register_buffer("mean_C111", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("spread_C111", torch.tensor(spread).view(-1, 1, 1), persistent=False)

    @property
    def codebook(self) -> Tensor:
        """(K, D): the vectors that are decoded."""
        return self.model.quantize.embedding.weight

    @property
    def codebook_size(self) -> int:
        """K."""
        return self.model.config.codebook_size

    @property
    def factor(self) -> int:
        """Pixels per side of one code's cell."""
        return self.model.spatial_scale_factor

    @property
    def image_size(self) -> int:
        """Pixels per side: the least that the authors' image processor scales to."""
        return 512

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that decides codes and pixels."""
        decides = {
            name: getattr(self.model.config, name)
            for name in ("temporal_downsample_factor", "attn_resolutions", "num_attention_heads")
        }
        decides |= {"mean": self.mean_C111.tolist(), "spread": self.spread_C111.tolist()}
        total = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            total.update(f"{name}{tuple(tensor.shape)}".encode())
            total.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    @torch.no_grad()
    def encode(self, pixels_NCHW: Tensor) -> Tensor:
        """Images, uint8 (N, 3, H, W), to codes, int64 (N, h, w).

        Raises:
            ValueError: not uint8 NCHW, or a side that `factor` does not divide.
        """
        if pixels_NCHW.dtype != torch.uint8 or pixels_NCHW.shape[1:2] != (3,):
            raise ValueError(
                f"an image tokenizer encodes uint8 images of shape (N, 3, H, W), but got "
                f"{pixels_NCHW.dtype} of shape {tuple(pixels_NCHW.shape)}"
            )
        sides = [tuple(pixels_NCHW.shape[2:])] * len(pixels_NCHW)
        if any(side % self.factor or not side for side in pixels_NCHW.shape[2:]):
            raise ValueError(
                f"images of {sides[0][0]}x{sides[0][1]} pixels do not fit this image tokenizer: "
                f"choose sides that are multiples of {self.factor}"
            )
        x_NCHW = pixels_NCHW.to(self.mean_C111.device).float() / 255
        x_NCHW = (x_NCHW - self.mean_C111) / self.spread_C111
        return torch.stack(self.model.encode(x_NCHW, image_sizes=sides).image_tokens)

    @torch.no_grad()
    def decode(self, codes_NHW: Tensor) -> Tensor:
        """Codes, integers (N, h, w), to images, uint8 (N, 3, h * factor, w * factor).

        Raises:
            ValueError: not a grid of integers, or a code outside 0..K-1.
        """
        if codes_NHW.ndim != 3 or codes_NHW.is_floating_point():
            raise ValueError(f"codes are integers (N, height, width), not {codes_NHW.shape}")
        if int(codes_NHW.min()) < 0 or int(codes_NHW.max()) >= self.codebook_size:
            raise ValueError(
                f"a code does not belong to this image tokenizer, whose codes are "
                f"0..{self.codebook_size - 1}: use the tokenizer that made the codes"
            )
        x_NCHW = self.model.decode(codes_NHW.to(self.mean_C111.device, torch.int64))
        bytes_NCHW = (x_NCHW * self.spread_C111 + self.mean_C111) * 255
        return bytes_NCHW.round().clamp(0, 255).to(torch.uint8)

    def save_pretrained(self, folder: Path) -> None:
        """Writes transformers' folder of an `Emu3VQVAE`, and the range of its pixels."""
        self.model.save_pretrained(folder)
        mean, spread = self.mean_C111.flatten().tolist(), self.spread_C111.flatten().tolist()
        write_json(Path(folder) / PROCESSORS[0], {"image_mean": mean, "image_std": spread})


def described_in(settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The tokenizer's own settings in a config.json: its own or a whole model's. None: neither."""
    if settings.get("model_type") == Emu3Config.model_type:
        return settings.get("vq_config") or {}
    return settings if settings.get("model_type") == Emu3VQVAEConfig.model_type else None


def from_tensors(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], folder: Path
) -> FrameTokenizer:
    """The tokenizer of `tensors` (names without the place inside a larger model), in float32.

    Args:
        settings: transformers' config of it.
        folder: where it came from; its image processor's file says the range of pixels.

    Raises:
        ValueError: tensors are missing, unknown or misshapen.
    """
    with torch.device("meta"):
        model = Emu3VQVAE(Emu3VQVAEConfig.from_dict(dict(settings)))
    kept = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    try:
        model.load_state_dict(kept, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{folder} holds no whole image tokenizer: {reason}") from None
    mean, spread = _range(folder)
    return FrameTokenizer(model, mean, spread).requires_grad_(False)


def _range(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and spread of pixels, from the first file of an image processor that has them."""
    for file in (folder / name for name in PROCESSORS):
        described = read_json(file) if file.is_file() else {}
        described = described.get("image_processor", described)
        if "image_mean" in described and "image_std" in described:
            return described["image_mean"], described["image_std"]
    return HALF, HALF
