"""Weights by formula for torchxrayvision's DenseNet-121, and pictures for it to look at."""

import numpy as np
import torch
from formula import fill, ints
from PIL import Image

SIZES = ((96, 80), (224, 224), (300, 320))
"""Height and width: one is enlarged, one left alone, one reduced."""
UNTRAINED = (2, 5, 17)
"""Outputs whose operating point is NaN, as those that a data set has no labels for."""


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Convolutions keep the scale of what they see; running variances are positive."""
    found = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            found[name] = torch.tensor(0)
        elif name.endswith("running_var"):
            found[name] = fill(name, shape).abs() + 0.5
        elif len(shape) > 1:
            inputs = int(np.prod(shape[1:]))
            found[name] = fill(name, shape, (2 / inputs) ** 0.5)
        else:
            found[name] = fill(name, shape)
    found["features.conv0.weight"] /= 512  # it sees values up to 1024
    return found


def thresholds() -> torch.Tensor:
    values = torch.linspace(0.01, 0.2, 18)
    values[list(UNTRAINED)] = torch.nan
    return values


def pictures() -> list[Image.Image]:
    """RGB, smooth enough that a resize filter matters and coloured enough that grey does."""
    found = []
    for height, width in SIZES:
        coarse = ints(f"xrv {height}", (height // 8, width // 8, 3), 256).numpy().astype(np.uint8)
        found.append(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return found
