"""Something to prepare: photo-like JPEG files, and models of real shapes with random weights.

Legend: H and W pixels.
"""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from arra.image_tokenizers.vq import VQConfig, VQModel

DISTINCT = 500
"""Pictures that are drawn; more files than that hold them again under other names."""
SIDES = (256, 512)
"""Pixels, from and to, of each side."""


def write_pictures(folder: Path, number: int) -> None:
    """An image folder of JPEG files with captions."""
    random = np.random.default_rng(0)
    drawn = [_photo(random) for _ in range(min(number, DISTINCT))]
    lines = []
    for each in range(number):
        name = f"{each // 1000:03d}/{each:06d}.jpg"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(drawn[each % len(drawn)])
        lines.append(json.dumps({"file_name": name, "text": f"picture number {each}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _photo(random: np.random.Generator) -> bytes:
    """Light and colour that change slowly, edges, texture and grain: about 40 KB of JPEG."""
    width, height = (int(side) for side in random.integers(*SIDES, size=2))
    layers = []
    for cells, weight in ((4, 0.5), (16, 0.3), (64, 0.15)):
        coarse = random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        layers.append(weight * np.asarray(smooth, dtype=np.float32))
    grain = random.normal(6, 6, (height, width, 1)).astype(np.float32)
    photo_HWC = np.clip(sum(layers) + grain, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(photo_HWC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_models(folder: Path, large: bool) -> tuple[str, str, str]:
    """Folders of an image tokenizer and an encoder, and what they are.

    Args:
        folder: to write them into.
        large: those that a GPU is used for, else such as a CPU bears.
    """
    torch.manual_seed(0)
    size, patch, width, channels = ("B", 16, 768, 128) if large else ("S", 32, 384, 16)
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=12,
        num_attention_heads=width // 64,
        image_size=224,
        patch_size=patch,
        projection_dim=2 * width // 3,
    )
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "encoder")
    CLIPImageProcessorPil().save_pretrained(folder / "encoder")
    config = VQConfig(
        base_channels=channels,
        channel_multipliers=[1, 1, 2, 2, 4],
        res_blocks=2,
        attention_levels=[4],
        z_channels=2 * channels,
        codebook_size=16384,
        codebook_dim=8,
        l2_normalize=True,
    )
    VQModel(config).save_pretrained(folder / "tokenizer")
    what = (
        f"random weights: CLIP ViT-{size}/{patch} at 224 px; VQ-16 with 16,384 codes of 8 numbers, "
        f"{channels} channels"
    )
    return str(folder / "tokenizer"), str(folder / "encoder"), what
