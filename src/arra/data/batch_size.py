"""`--batch-size auto`: chosen when a dataset is begun, then kept in its plan."""

import torch

from arra.data.decode import Decoded
from arra.data.encode import Models

ON_CPU = 4
"""A CPU gains nothing from more (experiments/prepare): a few pictures fill its caches."""
UNTRIED = 64
"""On a GPU that is not here to be tried, such as that of a cluster's workers."""
FIRST, LARGEST = 8, 256
GAIN = 1.05
"""Twice as many pictures at once must be so much faster, each, to be worth their memory."""


def choose_batch_size(models: Models, picture: Decoded, device: str) -> int:
    """Pictures per pass through the models.

    On a CPU always the same number, so that two datasets begun apart are equal. A GPU is tried:
    twice as many, until that gains nothing or memory ends.

    Args:
        models: on their device.
        picture: of the usual size.
        device: of those who make the dataset; not tried where the models are elsewhere here.
    """
    if not device.startswith("cuda"):
        return ON_CPU
    if not models.device.startswith("cuda"):
        return UNTRIED
    best, speed, size = FIRST, 0.0, FIRST
    while size <= LARGEST:
        tried = _speed(models, picture, size)
        if tried < speed * GAIN:
            break
        best, speed, size = size, tried, 2 * size
    torch.cuda.empty_cache()
    return best


def _speed(models: Models, picture: Decoded, size: int) -> float:
    """Pictures per second; 0 where they do not fit."""
    seconds = []
    try:
        for _ in range(3):  # the first one also prepares the device
            begun = models.begin([picture] * size)
            begun.rows()
            seconds.append(begun.seconds)
    except torch.OutOfMemoryError:
        return 0.0
    return size / min(seconds[1:])
