"""Prompts as a text encoder's features, for painters that are prompted by those.

The encoder may be larger than the painter (flan-t5-xl: 4.9 GB in float32), so it is opened when the
first prompt comes, and can be let go before painting.

Legend: n tokens of a prompt, F width of its features.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arra.models import Backbone

if TYPE_CHECKING:
    from arra.encoders.text import TextEncoder

PromptFeatures = Callable[[Sequence[str]], Sequence[Tensor]]
"""Prompts, none of them empty, to features (n, F) each."""

REMEMBERED = 4096
"""Prompts whose features are kept: 0.5 GB of 30 tokens x 2048 in float16."""


@dataclass(frozen=True)
class TextEncoderRecord:
    """What a painter says of the text encoder that it was trained with.

    Attributes:
        spec: where it was.
        length: the most tokens of a caption.
        fingerprint: None where nobody recorded it, as in published checkpoints.
    """

    spec: str
    length: int
    fingerprint: str | None


class EncodedPrompts:
    """Encodes each prompt alone, so that its features depend on nothing else, and once.

    Args:
        record: the encoder that the painter was trained with.
        width: F that the painter takes.
        device: where the encoder computes.
        place: where it is now, if not where it was.
    """

    def __init__(
        self,
        record: TextEncoderRecord,
        width: int,
        device: str | torch.device,
        place: str | None = None,
    ) -> None:
        self.record, self.width, self.device = record, width, device
        self.spec = place or record.spec
        self._encoder: TextEncoder | None = None
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def identity(self) -> str:
        """What decides the features, as far as it is known before the encoder is opened."""
        return self.record.fingerprint or f"{self.spec} at {self.record.length} tokens"

    def __call__(self, prompts: Sequence[str]) -> list[Tensor]:
        """Features (n, F) float16 of each, in main memory.

        Raises:
            ValueError: the encoder cannot be opened, is another than the painter's, or gives what
                cannot be used.
        """
        found: list[Tensor] = []
        for prompt in prompts:
            text_nF = self._known.get(prompt)
            if text_nF is None:
                text_nF = self._encoded(prompt)
                self._known[prompt] = text_nF
                if len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
            found.append(text_nF)
        return found

    def release(self) -> None:
        """Frees the encoder's memory; it is opened again if a new prompt comes."""
        if self._encoder is None:
            return
        self._encoder = None
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()

    def _encoded(self, prompt: str) -> Tensor:
        if self._encoder is None:
            self._encoder = self._opened()
        (text_nF,) = self._encoder([prompt])
        if not text_nF.isfinite().all():
            raise ValueError(
                f"text encoder {self.spec} gives NaN or infinite features for {prompt[:60]!r}: its "
                f"weights are damaged"
            )
        return text_nF

    def _opened(self) -> "TextEncoder":
        from arra.encoders.text import load_text_encoder

        encoder = load_text_encoder(self.spec, self.record.length, self.device)
        known = self.record.fingerprint
        if known is not None and encoder.fingerprint != known:
            raise ValueError(
                f"{self.spec} is not the text encoder that the model was trained with (another "
                f"fingerprint): name the right one with --text-encoder"
            )
        if encoder.dim != self.width:
            raise ValueError(
                f"text encoder {self.spec} gives {encoder.dim} values a token, the model takes "
                f"{self.width}: name the one that it was trained with, --text-encoder"
            )
        return encoder


def encoded_prompts(
    backbone: Backbone,
    described: Mapping[str, Any],
    device: str | torch.device,
    place: str | None = None,
) -> EncodedPrompts | None:
    """How a painter's prompts become features; None for one that reads ids.

    Args:
        described: the painter's pipeline.json, empty where it has none.
        place: where the text encoder is, if not where the painter says.

    Raises:
        ValueError: `place` is given for a painter that reads ids, or nobody says which encoder.
    """
    if not backbone.text_slots:
        if place is not None:
            raise ValueError("--text-encoder: this model reads its prompts itself; leave it out")
        return None
    recorded = described.get("text_encoder")
    if recorded is not None:
        record = TextEncoderRecord(**recorded)
    else:
        spec = place or backbone.text_encoder
        if spec is None:
            raise ValueError(
                f"the model is prompted by a text encoder's features ({backbone.text_width} values "
                f"a token) and does not say which: name it with --text-encoder"
            )
        record = TextEncoderRecord(spec, backbone.text_slots, None)
    return EncodedPrompts(record, backbone.text_width, device, place)
