"""Features of a set of images under a frozen encoder.

Legend: N images, D feature width.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from PIL import Image

BATCH = 64


def image_features(
    images: Iterable[Image.Image],
    encoder: Callable[[list[Image.Image]], torch.Tensor],
    *,
    batch_size: int = BATCH,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Features (N, D) float64 of images, in order, `batch_size` at a time.

    `encoder` maps a list of PIL images to (n, D) float32 (see arra.encoders.load_encoder); it does
    its own preprocessing. `progress` is told how many more are done. ValueError for no images.
    """
    parts: list[np.ndarray] = []
    batch: list[Image.Image] = []

    def flush() -> None:
        parts.append(encoder(batch).cpu().double().numpy())
        if progress is not None:
            progress(len(batch))
        batch.clear()

    for image in images:
        batch.append(image)
        if len(batch) == batch_size:
            flush()
    if batch:
        flush()
    if not parts:
        raise ValueError("There are no images to take features of.")
    return np.concatenate(parts)
