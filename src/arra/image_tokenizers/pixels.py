"""Batches of squares from any source, in an order that depends on the seed and the step only.

Rows are read in blocks and kept as bytes. A source larger than the memory given to it is shuffled
within windows of blocks: the windows differ in every pass, so that no two passes repeat batches.

Legend: N images, H and W pixels; uint8 NCHW, 0..255.
"""

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

from arra.data.images import BadImage, load_rgb, square, to_uint8
from arra.data.sources import Reject, Source

BLOCK = 256
"""Rows that are read together."""


class PixelPool:
    """Squares of `size` pixels of every readable row of a source.

    Args:
        source: what is read.
        size: pixels of a side.
        seed: of the order, and of what is cut and mirrored.
        memory_gb: GiB of images kept.
        crop_from: side of the squares that are read, of which random ones of `size` are cut.
        flip: mirror every other image, left to right, at random.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        *,
        seed: int,
        memory_gb: float,
        crop_from: int | None = None,
        flip: bool = False,
    ) -> None:
        self.source, self.cut, self.seed, self.flip = source, size, seed, flip
        self.size = size = crop_from or size
        self.rows = len(source)
        if self.rows == 0:
            raise ValueError(f"{source.name} has no rows to read")
        fitting = int(memory_gb * 2**30) // (3 * size * size * BLOCK)
        # Two windows may be in use at once, where a batch crosses from one to the next.
        self.window = max(1, fitting if fitting * BLOCK >= self.rows else fitting // 2)
        self.capacity = max(2, fitting)
        self.rejected: dict[int, str] = {}
        self._blocks: OrderedDict[int, tuple[Tensor, np.ndarray]] = OrderedDict()
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def batch(self, step: int, count: int) -> Tensor:
        """uint8 (N, 3, size, size), N = `count` less the rows that cannot be read."""
        images = []
        # down, across and mirrored, for every position, whether its row can be read or not
        chance = np.random.default_rng((self.seed, step, 1)).random((count, 3))
        for position in range(step * count, (step + 1) * count):
            row = int(self._epoch(position // self.rows)[position % self.rows])
            pixels_NCHW, place = self._block(row // BLOCK)
            if place[row % BLOCK] >= 0:
                image_CHW = pixels_NCHW[place[row % BLOCK]]
                images.append(self._varied(image_CHW, chance[position - step * count]))
        if not images:
            row, reason = next(iter(self.rejected.items()))
            raise ValueError(
                f"{self.source.name}: none of {count} images can be read; row {row}: {reason}"
            )
        return torch.stack(images)

    def _varied(self, image_CHW: Tensor, chance: np.ndarray) -> Tensor:
        """Cut and mirrored as three numbers in 0..1 say."""
        top, left = (int(c * (self.size - self.cut + 1)) for c in chance[:2])
        image_CHW = image_CHW[:, top : top + self.cut, left : left + self.cut]
        return image_CHW.flip(2) if self.flip and chance[2] < 0.5 else image_CHW

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            generator = np.random.default_rng((self.seed, epoch))
            blocks = generator.permutation(-(-self.rows // BLOCK))
            windows = [
                np.concatenate(
                    [
                        np.arange(b * BLOCK, min((b + 1) * BLOCK, self.rows))
                        for b in blocks[start : start + self.window]
                    ]
                )
                for start in range(0, len(blocks), self.window)
            ]
            order = np.concatenate([generator.permutation(rows) for rows in windows])
            self._order = (epoch, order)
        return self._order[1]

    def _block(self, index: int) -> tuple[Tensor, np.ndarray]:
        if index in self._blocks:
            self._blocks.move_to_end(index)
            return self._blocks[index]
        start = index * BLOCK
        stop = min(start + BLOCK, self.rows)
        images, place = [], np.full(BLOCK, -1)
        for offset, record in enumerate(self.source.read(start, stop)):
            if isinstance(record, Reject):
                self.rejected[start + offset] = record.reason
                continue
            try:
                images.append(square(load_rgb(record.image), self.size))
            except BadImage as error:
                self.rejected[start + offset] = error.reason
                continue
            place[offset] = len(images) - 1
        empty = torch.empty((0, 3, self.size, self.size), dtype=torch.uint8)
        self._blocks[index] = (to_uint8(images) if images else empty, place)
        while len(self._blocks) > self.capacity:
            self._blocks.popitem(last=False)
        return self._blocks[index]
