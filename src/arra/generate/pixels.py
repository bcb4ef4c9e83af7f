"""From codes to pictures, beside the painting where a GPU can do both.

Legend: N images, h and w codes per side, `NCHW` = channels first, uint8 pixels 0..255.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from arra.image_tokenizers.interface import ImageTokenizer

CODES_TOGETHER = 256
"""Codes whose pixels are computed in one pass: one image of 16 x 16, four of 8 x 8."""

Batch = TypeVar("Batch")
Pictures = TypeVar("Pictures")


def to_pixels(image_tokenizer: ImageTokenizer, codes_Nhw: Tensor) -> Tensor:
    """Uint8 NCHW on the CPU.

    A pass always has so many images as follows from their size, so that none depends on how many
    there are.
    """
    together = max(1, CODES_TOGETHER // max(1, codes_Nhw[0].numel()))
    parts = []
    for part_Nhw in codes_Nhw.split(together):
        full_Nhw = torch.zeros(together, *part_Nhw.shape[1:], dtype=part_Nhw.dtype)
        full_Nhw[: len(part_Nhw)] = part_Nhw
        parts.append(image_tokenizer.decode(full_Nhw)[: len(part_Nhw)].cpu())
    return torch.cat(parts)


def decoded(
    batches: Iterable[Batch], decode: Callable[[Batch], Pictures], device: torch.device
) -> Iterator[Pictures]:
    """`decode` of every batch, in order; on a GPU while the next ones are painted, in a thread and
    a stream of its own. On a CPU both would share the same cores, and take turns."""
    if device.type != "cuda":
        yield from map(decode, batches)
        return
    stream = torch.cuda.Stream(device)

    def beside(batch: Batch) -> Pictures:
        with torch.cuda.stream(stream):
            return decode(batch)

    coming: deque[Future[Pictures]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="pixels") as pool:
        for batch in batches:
            coming.append(pool.submit(beside, batch))
            while coming and coming[0].done():
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
