"""What a backbone offers the objective, the loop and the painter. One file per family beside this.

Legend: B sequences, T tokens, C columns of the key/value cache, D model width, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arra.layout import Layout


class Backbone(ABC):
    """A model that paints, seen through the one protocol that the rest of the package knows.

    Attributes:
        model: the ordinary Hugging Face model; saving it is the export.
        layout: the family's image format in its own token ids.
        text_tokenizer: the family's text tokenizer, image tokens included.
        head: module, hidden (N, D) -> logits (N, V): all that the model does after its last norm.
    """

    model: PreTrainedModel
    layout: Layout
    text_tokenizer: PreTrainedTokenizerBase
    head: nn.Module

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> "Backbone":
        """Moves the model in place."""
        nn.Module.to(self.model, device)
        return self

    @property
    @abstractmethod
    def hidden_size(self) -> int: ...

    @property
    @abstractmethod
    def max_length(self) -> int:
        """The longest sequence the model takes, in tokens."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Rows of the token table: V."""

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks in order; block i's output is layer i + 1."""

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @abstractmethod
    def last_hidden(self, ids_BT: Tensor) -> Tensor:
        """Final hidden states (B, T, D), after the final norm, of right-padded sequences.

        No attention mask: the model is causal and padding comes last, so no real token sees it.
        """

    @abstractmethod
    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text, without the token that opens a sequence."""

    @abstractmethod
    def null_condition(self) -> list[int]:
        """Ids of the empty prompt: for prompt dropout in training and for the unguided row."""

    def condition(self, text: str) -> list[int]:
        """Token ids that stand before the image of `text`."""
        return [*self.null_condition(), *self.text_ids(text)]

    @abstractmethod
    def new_cache(self, length: int) -> Any:
        """A static key/value cache for up to `length` tokens a row."""

    @abstractmethod
    def step(self, ids_BT: Tensor, positions_BT: Tensor, mask_BC: Tensor, cache: Any) -> Tensor:
        """Appends T tokens a row to `cache`; returns their final hidden states (B, T, D).

        Args:
            positions_BT: each token's position in its own row (left padding not counted).
            mask_BC: bool, which columns of the whole cache hold real tokens, these T included.
        """

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Around steps of a few tokens a row: a family may set what makes them fast.

        It may change rounding, and nothing else.
        """
        yield

    @contextmanager
    def tap(self, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Collects the output of the given blocks (1 = the first) during a forward pass."""
        for layer in layers:
            if not 1 <= layer <= self.num_layers:
                raise ValueError(
                    f"align.layer {layer} does not exist: the model has blocks 1 to "
                    f"{self.num_layers}"
                )
        taps: dict[int, Tensor] = {}

        def hook_of(layer: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                taps[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [self.blocks[layer - 1].register_forward_hook(hook_of(layer)) for layer in layers]
        try:
            yield taps
        finally:
            for handle in handles:
                handle.remove()

    def save(self, folder: Path) -> None:
        """Writes `model/` and `tokenizer/` as standard Hugging Face folders (safetensors)."""
        self.model.save_pretrained(folder / "model")
        self.text_tokenizer.save_pretrained(folder / "tokenizer")
