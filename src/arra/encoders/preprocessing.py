"""From PIL images to the pixels that a published encoder was trained on.

Always with Pillow or torch: torchvision is not needed, and its resize of 8-bit images gives other
features.

Legend: N images, C = 3 channels, H and W pixels the encoder sees.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    DeiTImageProcessorPil,
    SamImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from arra.files import read_json

PROCESSORS = {
    "BitImageProcessor": BitImageProcessorPil,
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "ConvNextImageProcessor": ConvNextImageProcessorPil,
    "DeiTImageProcessor": DeiTImageProcessorPil,
    "SamImageProcessor": SamImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "ViTImageProcessor": ViTImageProcessorPil,
}
"""By the name in preprocessor_config.json, always with Pillow: transformers 5.17 has no
AutoImageProcessor where torchvision is absent."""

FLOAT_PROCESSORS = {"DINOv3ViTImageProcessor": (224, 224), "Sam2ImageProcessor": (1024, 1024)}
"""Those that resize floats instead of 8-bit images, with the size of files that name none. (For
SAM 2 this is what its authors do; transformers rounds to 8 bits in between.)"""

_BICUBIC = Image.Resampling.BICUBIC

_NAMES = ("image_processor_type", "feature_extractor_type", "processor_class")

Pixels = Callable[[Sequence[Image.Image]], Tensor]
"""RGB images of any sizes -> (N, 3, H, W) float32 in main memory. Ours can be sent to another
process, which is why they are classes."""


@dataclass(frozen=True)
class Preprocessing:
    """How images become pixels, and the values that say so (for the fingerprint)."""

    pixels: Pixels
    described: dict[str, Any]


def open_preprocessing(
    folder: Path, default: str, size: int | None = None, *, whole: bool = False
) -> Preprocessing:
    """The preprocessing that an encoder's folder asks for.

    Args:
        folder: holds preprocessor_config.json or processor_config.json.
        default: the image processor of files that do not name theirs.
        size: pixels of the longest side and of the square padded to, instead of the file's.
        whole: the encoder sees the whole picture, whatever its shape: what the file would cut from
            the middle (DINOv2: 224 of 256 pixels) is all there is, at that size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an image processor that is not supported.
    """
    config = _read_config(folder)
    named = config.get("image_processor_type") or config.get("feature_extractor_type")
    kind = (named or default).removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    described = {key: value for key, value in config.items() if key not in _NAMES}
    if kind in FLOAT_PROCESSORS:  # these cut nothing and pad nothing
        return Preprocessing(_float_pixels(config, FLOAT_PROCESSORS[kind], folder), described)
    if kind not in PROCESSORS:
        known = ", ".join(sorted([*PROCESSORS, *FLOAT_PROCESSORS]))
        raise ValueError(f"encoder {folder} is preprocessed by {named}; supported are {known}")
    changed: dict[str, Any] = {}
    if size is not None:
        square = {"height": size, "width": size}
        changed = {"size": {"longest_edge": size}, "pad_size": square}
    opened: Any = PROCESSORS[kind]
    processor = opened.from_pretrained(folder, local_files_only=True, **changed)
    values = processor.to_dict()
    if whole and values.get("do_center_crop"):
        crop = {side: int(values["crop_size"][side]) for side in ("height", "width")}
        changed = {"do_resize": True, "size": crop, "do_center_crop": False}
    elif whole and kind == "ConvNextImageProcessor":
        changed = {"crop_pct": 1.0}
    processor = opened.from_pretrained(folder, local_files_only=True, **changed)
    pixels = _ByProcessor(processor)
    return Preprocessing(_Squared(pixels) if whole else pixels, described | changed)


@dataclass(frozen=True)
class _Squared:
    """Long pictures become squares first, so that nothing is cut off or padded."""

    pixels: Pixels

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        sides = [max(image.size) for image in images]
        return self.pixels(
            [
                image if image.size == (side, side) else image.resize((side, side), _BICUBIC)
                for image, side in zip(images, sides, strict=True)
            ]
        )


@dataclass(frozen=True)
class _ByProcessor:
    """An image processor of transformers."""

    processor: Any

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        found = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        return found.to(torch.float32)


def _read_config(folder: Path) -> dict[str, Any]:
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


_FLOAT_SWITCHES = ("do_resize", "do_rescale", "do_normalize")
_MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _float_pixels(config: dict[str, Any], default: tuple[int, int], folder: Path) -> Pixels:
    """Of a processor that resizes floats; `default` = (H, W) of files that name no size."""
    off = [key for key in _FLOAT_SWITCHES if not config.get(key, True)]
    mode = _MODES.get(config.get("resample", Image.Resampling.BILINEAR))
    if off or config.get("do_center_crop") or mode is None:
        raise ValueError(
            f"encoder {folder}: its preprocessing must resize (bilinear or bicubic), rescale and "
            f"normalize, without a crop; its preprocessor_config.json says otherwise"
        )
    named = config.get("size") or {"height": default[0], "width": default[1]}
    side = (int(named["height"]), int(named["width"]))
    factor = float(config.get("rescale_factor", 1 / 255))
    mean_C11, std_C11 = _statistics(
        config.get("image_mean", _IMAGENET[0]), config.get("image_std", _IMAGENET[1])
    )
    return _Floats(side, factor, mode, mean_C11, std_C11)


@dataclass(frozen=True)
class _Floats:
    """0..1, then resized to `side` = (H, W) with antialiasing, then normalized."""

    side: tuple[int, int]
    factor: float
    mode: str
    mean_C11: Tensor
    std_C11: Tensor

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.stack([self._one(image) for image in images])

    def _one(self, image: Image.Image) -> Tensor:
        share_1CHW = _levels(image)[None] * self.factor
        if share_1CHW.shape[2:] != self.side:
            share_1CHW = F.interpolate(
                share_1CHW, self.side, mode=self.mode, antialias=True, align_corners=False
            )
        return (share_1CHW[0] - self.mean_C11) / self.std_C11


def whole_pictures(preprocessing: Preprocessing) -> Preprocessing:
    """The same for an encoder that must see a long picture whole; what it does to squares stays."""
    return Preprocessing(_Squared(preprocessing.pixels), preprocessing.described)


def open_clip_pixels(config: dict[str, Any], size: int, folder: Path) -> Preprocessing:
    """What open_clip does to images in evaluation (89fb801, transform.py, image_transform).

    The shortest side to `size` by Pillow (bicubic unless the file says bilinear), a crop from the
    middle (halves rounded to even, as torchvision does), 0..1, mean and deviation of the file, or
    of OpenAI's CLIP where it names none.

    Args:
        config: `preprocess_cfg` of open_clip_config.json.
    """
    interpolation = config.get("interpolation", "bicubic")
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    if config.get("resize_mode", "shortest") != "shortest" or interpolation not in filters:
        raise ValueError(
            f"encoder {folder}: open_clip_config.json asks for resize_mode "
            f"{config.get('resize_mode')!r} and interpolation {interpolation!r}; supported are "
            f"shortest with bicubic or bilinear"
        )
    mean = config.get("mean", (0.48145466, 0.4578275, 0.40821073))
    std = config.get("std", (0.26862954, 0.26130258, 0.27577711))
    described = {"mean": list(mean), "std": list(std), "size": size, "filter": interpolation}
    pixels = _ShortestSide(size, filters[interpolation], *_statistics(mean, std))
    return Preprocessing(pixels, {"kind": "open_clip", **described})


@dataclass(frozen=True)
class _ShortestSide:
    """The shortest side to `size`, the middle, then 0..1, then normalized."""

    size: int
    resample: Image.Resampling
    mean_C11: Tensor
    std_C11: Tensor

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.stack([self._one(image) for image in images])

    def _one(self, image: Image.Image) -> Tensor:
        short, size = min(image.size), self.size
        if short != size:
            width, height = (int(size * side / short) for side in image.size)
            image = image.resize((width, height), self.resample)
        left, top = (round((side - size) / 2) for side in image.size)
        image = image.crop((left, top, left + size, top + size))
        return (_levels(image) / 255 - self.mean_C11) / self.std_C11


def _levels(image: Image.Image) -> Tensor:
    """(3, H, W) float32, 0..255."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()


def _statistics(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    return torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
