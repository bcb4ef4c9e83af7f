"""Emu3: a language model whose vocabulary holds the codes; sizes are written in digits.

    bos text | <|image start|> h * w <|image token|> [code x w, eol] x h eof <|image end|>

Checked against baaivision/Emu3 f6ea9aa (emu3/mllm/processing_emu3.py, emu3/train/datasets.py) and
transformers' `Emu3Processor` and `Emu3ForConditionalGeneration.decode_image_tokens`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from transformers import Emu3ForConditionalGeneration, PreTrainedModel, PreTrainedTokenizerBase

from arra.layout import Layout
from arra.models.base import Grid
from arra.models.causal_lm import CausalLM
from arra.models.folders import empty_as, open_as, open_tokenizer_file

PARTS = {
    "begin": "<|image start|>",
    "grid_begin": "<|image token|>",
    "row_end": "<|extra_200|>",
    "grid_end": "<|extra_201|>",
    "end": "<|image end|>",
    "times": "*",
}
"""What stands around the codes, and its name in the tokenizer."""

MAX_SIDE = 512
"""Codes: up to this side the digits are compared with what the text tokenizer writes."""

CODE = re.compile(r"<\|visual token (\d{6})\|>")


class Emu3(CausalLM):
    """Emu3-Gen and Emu3-Chat in transformers' format.

    The unguided row is begin-of-text alone, as where the authors' training drops a prompt. Their
    demo guides away from a prompt of unwanted things instead, and appends words of praise to every
    prompt (image_generation.py). Frozen is the image tokenizer (`vqmodel`): it made the codes.
    """

    model: Emu3ForConditionalGeneration
    default_grid: Grid | None = (90, 90)  # 720 pixels: `image_area` of the published configuration
    # image_generation.py: classifier_free_guidance 3, top_k 2048, temperature left at 1.
    sampling: Mapping[str, float] = {"cfg": 3.0, "temperature": 1.0, "top_k": 2048, "top_p": 1.0}

    @classmethod
    def open_model(cls, folder: Path) -> PreTrainedModel:
        return open_as(Emu3ForConditionalGeneration, folder)

    @classmethod
    def empty_model(cls, folder: Path) -> PreTrainedModel:
        return empty_as(Emu3ForConditionalGeneration, folder)

    @classmethod
    def as_published(cls, folder: Path) -> Self:
        tokenizer = open_tokenizer_file(folder, [*PARTS.values(), *"0123456789"])
        model = cls.open_model(folder)
        layout = _layout(model.config.vocabulary_map or {}, tokenizer, folder)
        expected = model.config.vq_config.codebook_size
        if len(layout.code_ids) != expected:
            raise ValueError(
                f"{folder}: config.json's vocabulary_map has {len(layout.code_ids)} visual tokens, "
                f"but its image tokenizer has {expected} codes"
            )
        return cls.assemble(model, tokenizer, layout)

    def __init__(
        self, model: PreTrainedModel, text_tokenizer: PreTrainedTokenizerBase, layout: Layout
    ) -> None:
        super().__init__(model, text_tokenizer, layout)
        self.model.model.vqmodel.requires_grad_(False)


def _layout(names: Mapping[str, int], tokenizer: PreTrainedTokenizerBase, folder: Path) -> Layout:
    """The format in the ids of config.json's vocabulary map, which tokenizer.json must share."""
    codes = {int(code[1]): token for name, token in names.items() if (code := CODE.fullmatch(name))}
    if not codes or sorted(codes) != list(range(len(codes))):
        raise ValueError(
            f"{folder}: config.json's vocabulary_map does not number its visual tokens from 0 on"
        )
    known = tokenizer.get_vocab()
    for name in (*PARTS.values(), "<|visual token 000000|>"):
        if names.get(name) != known.get(name):
            raise ValueError(
                f"{folder}: {name} is {names.get(name)} in config.json's vocabulary_map but "
                f"{known.get(name)} in tokenizer.json: they belong to different models"
            )
    parts = {part: known[name] for part, name in PARTS.items()}
    digits = tuple(known[digit] for digit in "0123456789")
    sides = [str(side) for side in range(1, MAX_SIDE + 1)]
    spelled = [id for side in sides for id in [*(digits[int(d)] for d in side), parts["times"]]]
    if tokenizer("*".join(sides), add_special_tokens=False)["input_ids"] != spelled[:-1]:
        raise ValueError(f"{folder}: its text tokenizer does not spell numbers digit by digit")
    every_code = tuple(codes[code] for code in range(len(codes)))
    return Layout(
        *("written", every_code, tokenizer.pad_token_id),
        *(parts["begin"], parts["end"], parts["row_end"]),
        digits=digits,
        times=parts["times"],
        grid_begin=parts["grid_begin"],
        grid_end=parts["grid_end"],
    )


FAMILY = Emu3
