"""How fast a machine reads memory: the limit of painting, where every step reads all weights.

A working set that fits a cache reads faster, so the limit is measured with one of the weights'
size.
"""

import torch

from arra.bench.paired import timed
from arra.device import in_large_pages


def read_bandwidth(size: int, device: torch.device, repeats: int = 8) -> float:
    """Bytes a second at which `size` bytes are read, by the fastest of a few plain readers."""
    numbers_N = in_large_pages(max(size // 8, 1), torch.long).fill_(1).to(device)
    halves_N = numbers_N.view(torch.float32)
    readers = (numbers_N.sum, numbers_N.amax, halves_N.sum)
    for read in readers:
        read()
    best = min(timed(read, device) for _ in range(repeats) for read in readers)
    return numbers_N.numel() * numbers_N.element_size() / best
