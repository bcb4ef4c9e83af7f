"""Janus and Janus-Pro: a language model that paints with a table and a head of its own.

Image codes do not share the text's vocabulary: they enter through `generation_embeddings` and
`generation_aligner` and leave through `generation_head`. So ids 0..K-1 are the codes and text token
n is id K + n, and an image is nothing but its codes: `<begin_of_image>` closes the prompt. Checked
against deepseek-ai/Janus 1daa72f (generation_inference.py, janus/models/) and transformers' own
`JanusForConditionalGeneration.generate`.

Legend: B sequences, T tokens, D model width, K codes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from transformers import (
    JanusForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from arra.layout import Layout
from arra.models.base import Grid
from arra.models.causal_lm import CausalLM
from arra.models.folders import empty_as, open_as, open_tokenizer_file

BEGIN_IMAGE = "<begin_of_image>"
BEFORE, AFTER = "<|User|>: ", "\n\n<|Assistant|>:"
"""The turn around a prompt (janus/utils/conversation.py, template "deepseek")."""


class Janus(CausalLM):
    """Janus 1.3B, Janus-Pro 1B and 7B in transformers' format.

    Training moves the language model, its text table and the three `generation_*` parts. Frozen are
    the image tokenizer (`vqmodel`: it made the codes), the understanding tower with its aligner
    (`vision_model`, `aligner`: no image enters through it) and the text head (`lm_head`, unless it
    is the text table: no text is predicted).
    """

    model: JanusForConditionalGeneration
    # generation_inference.py and demo/app_januspro.py: cfg_weight 5, temperature 1.
    sampling: Mapping[str, float] = {"cfg": 5.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

    # ---- opening one ----------------------------------------------------------------------------

    @classmethod
    def open_model(cls, folder: Path) -> PreTrainedModel:
        return open_as(JanusForConditionalGeneration, folder)

    @classmethod
    def empty_model(cls, folder: Path) -> PreTrainedModel:
        return empty_as(JanusForConditionalGeneration, folder)

    @classmethod
    def as_published(cls, folder: Path) -> Self:
        tokenizer = open_tokenizer_file(folder, (BEGIN_IMAGE,))
        model = cls.open_model(folder)
        codes = model.config.vq_config.num_embeddings
        layout = Layout("grid", tuple(range(codes)), pad=codes + tokenizer.pad_token_id)
        return cls.assemble(model, tokenizer, layout)

    def __init__(
        self, model: PreTrainedModel, text_tokenizer: PreTrainedTokenizerBase, layout: Layout
    ) -> None:
        super().__init__(model, text_tokenizer, layout)
        parts = self.model.model
        self.head = parts.generation_head
        self._begin_image = len(layout.code_ids) + text_tokenizer.get_vocab()[BEGIN_IMAGE]
        side = parts.vqmodel.config.num_patches
        self.default_grid = (side, side)
        frozen: list[nn.Module] = [parts.vision_model, parts.aligner, parts.vqmodel]
        if self.model.lm_head.weight is not parts.language_model.get_input_embeddings().weight:
            frozen.append(self.model.lm_head)
        for part in frozen:
            part.requires_grad_(False)

    # ---- what it is -----------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        return len(self.layout.code_ids)

    @property
    def output_table(self) -> nn.Module:
        return self.model.model.generation_head.proj_out

    def embedded(self, ids_BT: Tensor) -> Tensor:
        """Input vectors (B, T, D): each id through its own table."""
        codes = self.vocab_size
        code_BTD = self.model.prepare_embeddings_for_image_generation(ids_BT.clamp(max=codes - 1))
        text_BTD = self.model.get_input_embeddings()((ids_BT - codes).clamp(min=0))
        return torch.where((ids_BT < codes)[..., None], code_BTD, text_BTD)

    def reference(self, ids_BT: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        output = self.model.model(
            inputs_embeds=self.embedded(ids_BT), output_hidden_states=True, use_cache=False
        )
        return self.model.model.generation_head(output.last_hidden_state), output.hidden_states

    def image_rows(self) -> list[int]:
        return []

    def image_tables(self) -> Sequence[nn.Module]:
        parts = self.model.model
        return (parts.generation_embeddings, parts.generation_aligner, parts.generation_head)

    # ---- prompts --------------------------------------------------------------------------------

    def opening(self) -> list[int]:
        return [self.vocab_size + self._start]

    def text_ids(self, text: str) -> list[int]:
        return [self.vocab_size + token for token in super().text_ids(text)]

    def wrapping(self, grid: Grid) -> tuple[list[int], list[int]]:
        before, after = self._with_names(BEFORE), self._with_names(AFTER)
        return [*self.opening(), *before], [*after, self._begin_image]

    def condition(self, text: str, grid: Grid) -> list[int]:
        # Tokenized as one string, as the originals do: pieces may join at the text's edges. A text
        # that holds the name of a special token, or is too long, is tokenized on its own.
        text = text.strip()
        if not text:
            return self.null_condition(grid)
        whole = self._with_names(BEFORE + text + AFTER)
        if self.text_ids(text) != self._with_names(text) or len(whole) + 2 > self.room(grid):
            return super().condition(text, grid)
        return [*self.opening(), *whole, self._begin_image]

    def null_condition(self, grid: Grid) -> list[int]:
        return self.without_prompt(super().null_condition(grid), grid)

    def without_prompt(self, condition: Sequence[int], grid: Grid) -> list[int]:
        """Padding tokens take the place of all but the first and the last token, and are attended
        to (generation_inference.py)."""
        return [condition[0], *[self.layout.pad] * (len(condition) - 2), condition[-1]]

    def _with_names(self, text: str) -> list[int]:
        """Ids of text of ours, in which the names of special tokens mean these tokens."""
        ids = self.text_tokenizer(text, add_special_tokens=False)["input_ids"]
        return [self.vocab_size + token for token in ids]

    # ---- painting -------------------------------------------------------------------------------

    def _inputs(self, ids_BT: Tensor) -> dict[str, Tensor]:
        return {"inputs_embeds": self.embedded(ids_BT)}


FAMILY = Janus
