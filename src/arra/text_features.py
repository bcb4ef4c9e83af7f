"""Captions as a text encoder's vectors, padded to the slots that a model keeps for them.

Legend: B rows, N slots of a caption, n tokens of one, D width of its features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextFeatures:
    """Captions as a text encoder's vectors, for models whose prompt is not made of token ids.

    They fill the first N positions of each row, whose ids are the family's placeholders. In
    painting, padding may stand before a row.
    """

    values_BND: Tensor  # left-padded
    mask_BN: Tensor  # bool, False on padding
    dropped_B: Tensor  # bool: the model puts its learned null caption in place of the values

    @staticmethod
    def of(
        captions: Sequence[Tensor | None], dropped: Sequence[bool], slots: int, width: int
    ) -> "TextFeatures":
        """Captions on the left of whose features stands padding, as LlamaGen has it.

        A dropped caption keeps its mask (FoundationVision/LlamaGen ce98ec4, models/generate.py).

        Args:
            captions: features (n, width) of each; the end of one that is longer than `slots` is
                cut. None: there is no caption. That is the null caption under the mask of an empty
                text, which is one token, the end.
            dropped: for each, whether the null caption takes its place.
        """
        values_BND = torch.zeros(len(captions), slots, width)
        mask_BN = torch.zeros(len(captions), slots, dtype=torch.bool)
        for row, caption_nD in enumerate(captions):
            count = 1 if caption_nD is None else min(len(caption_nD), slots)
            mask_BN[row, slots - count :] = True
            if caption_nD is not None:
                values_BND[row, slots - count :] = caption_nD[:count]
        null = [d or c is None for d, c in zip(dropped, captions, strict=True)]
        return TextFeatures(values_BND, mask_BN, torch.tensor(null, dtype=torch.bool))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "TextFeatures":
        """The same with `change` applied to every tensor."""
        tensors = (self.values_BND, self.mask_BN, self.dropped_B)
        return TextFeatures(*map(change, tensors))

    def to(self, device: torch.device | str) -> "TextFeatures":
        """The same features on `device`."""
        return self.mapped(lambda tensor: tensor.to(device))
