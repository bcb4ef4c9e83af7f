"""The ways in which evaluators bring pictures to the 299 pixels that Inception takes.

The filter changes FID by more than many methods differ (Parmar et al. 2022, arXiv 2104.11222), so
it belongs to the number: a report names it.

Legend: N pictures of one size, H, W pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image

from arra.data.images import to_uint8

SIDE = 299

Pixels = Callable[[Sequence[Image.Image]], torch.Tensor]


def tf1(images: Sequence[Image.Image]) -> torch.Tensor:
    """As the graph of the published FID does, hence TTUR's, ADM's and LlamaGen's evaluators and
    torch-fidelity: TensorFlow 1's bilinear between a pixel and its right and lower neighbours.

    Output pixel i looks at i * H / 299, not at its centre, and at two source pixels however much is
    shrunk: large pictures are aliased (tf.image.resize_bilinear with neither align_corners nor
    half_pixel_centers). Float32 (N, 3, 299, 299) about -1..1, as (x - 128) / 128.
    """
    pixels_N3HW = to_uint8(images).float()
    wide = _between(pixels_N3HW, dim=3)
    return (_between(wide, dim=2) - 128) / 128


def clean(images: Sequence[Image.Image]) -> torch.Tensor:
    """As clean-fid's mode "clean": Pillow's antialiased bicubic of each channel in float32, cut off
    at 0 and 255. Float32 (N, 3, 299, 299), (x - 128) / 128."""
    pixels_NHW3 = np.stack([_bicubic(image) for image in images])
    return (torch.from_numpy(pixels_NHW3).permute(0, 3, 1, 2).contiguous() - 128) / 128


def pytorch(images: Sequence[Image.Image]) -> torch.Tensor:
    """As pytorch-fid: bilinear at the pixels' centres, without antialiasing, of 0..1.

    Float32 (N, 3, 299, 299), 2 x - 1: its range ends at 1, where the others' ends at 127 / 128.
    """
    pixels_N3HW = to_uint8(images).float() / 255
    small = torch.nn.functional.interpolate(
        pixels_N3HW, (SIDE, SIDE), mode="bilinear", align_corners=False
    )
    return 2 * small - 1


Filter = Literal["tf1", "clean", "pytorch"]
RESIZES: Mapping[Filter, Pixels] = {"tf1": tf1, "clean": clean, "pytorch": pytorch}
PUBLISHED: Filter = "tf1"
"""What tables that do not say otherwise were made with."""


def _between(values: torch.Tensor, dim: int) -> torch.Tensor:
    side = values.shape[dim]
    # TensorFlow multiplies in float32: in float64 a few positions would round to another pixel.
    place_S = torch.arange(SIDE, dtype=torch.float32) * torch.tensor(side / SIDE)
    first_S = place_S.long()
    part = place_S - first_S
    low = values.index_select(dim, first_S)
    high = values.index_select(dim, (first_S + 1).clamp(max=side - 1))
    return low + (high - low) * (part if dim == 3 else part[:, None])


def _bicubic(image: Image.Image) -> np.ndarray:
    """(299, 299, 3) float32, 0..255."""
    channels = [
        np.asarray(
            Image.fromarray(np.asarray(channel, np.float32)).resize(
                (SIDE, SIDE), Image.Resampling.BICUBIC
            )
        )
        for channel in image.convert("RGB").split()
    ]
    return np.stack(channels, axis=2).clip(0, 255)
