"""A key/value cache that keeps nothing: what a decoder gets where it reads whole sequences.

Without a cache and without a mask, transformers looks in the positions for sequences that are
packed into one row (`masking_utils.find_packed_sequence_indices`): it reads the device in every
forward pass, and launching stands still meanwhile. Ours never are packed, and with a cache it does
not look. What depends on lengths beyond a model's own (dynamic and longrope rotary embeddings)
still reads: they look at the largest position.
"""

from torch import Tensor
from transformers import Cache


class NoCache(Cache):
    """Hands keys and values on as they come; the mask stays the plain causal one."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: object,
        **more: object,
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0
