"""Does a painted scene show what its caption says? Measured by reading the pixels back.

Legend: N images.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from arra.data.builtin import judge, parse, read
from arra.evaluate.intervals import bootstrap_mean

FIELDS = ("shape", "colour", "size", "count", "relation", "background", "all_right")
"""What the judge answers yes or no to; a field that the caption leaves open does not count."""


def scene_verdicts(
    images: Sequence[Image.Image | np.ndarray], captions: Sequence[str]
) -> dict[str, np.ndarray]:
    """Per image (N,) float64: 1 right, 0 wrong, NaN not asked for; and `fragments`, a count.

    Images are 64x64 RGB, PIL or uint8 HWC. ValueError for a caption outside the scene grammar or
    for an image of another size: neither can be judged.
    """
    if len(images) != len(captions):
        raise ValueError(
            f"{len(images)} images cannot be judged against {len(captions)} captions: each image "
            f"needs the prompt that it was painted from."
        )
    rows: dict[str, list[float]] = {name: [] for name in (*FIELDS, "fragments")}
    for image, caption in zip(images, captions, strict=True):
        pixels = np.asarray(image)
        if pixels.shape != (64, 64, 3) or pixels.dtype != np.uint8:
            raise ValueError(
                f"scenes are judged on 64x64 RGB images, not {pixels.shape} {pixels.dtype}: leave "
                f"the metric 'scenes' out for other pictures."
            )
        verdict = judge(read(pixels), parse(caption))
        for name in FIELDS:
            answer: bool | None = getattr(verdict, name)
            rows[name].append(np.nan if answer is None else float(answer))
        rows["fragments"].append(float(verdict.fragments))
    return {name: np.array(values) for name, values in rows.items()}


def summarise(verdicts: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means with 95 % bootstrap intervals, JSON-ready: {field: {mean, low, high, n} | None}."""
    summary: dict[str, Any] = {}
    for name, values_N in verdicts.items():
        interval = bootstrap_mean(values_N, proportion=name in FIELDS)
        summary[name] = interval.to_json() if interval else None
    return summary


def scene_accuracy(
    images: Sequence[Image.Image | np.ndarray], captions: Sequence[str]
) -> dict[str, Any]:
    """Shares of images that are right per field, and mean fragments, with intervals."""
    return summarise(scene_verdicts(images, captions))
