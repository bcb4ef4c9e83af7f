"""Chameleon, Anole, Lumina-mGPT and ARRA's release: one architecture, three formats.

transformers' class has no image decoder and forbids image codes in its own logits. The decoder is
an image tokenizer here (Meta's vqgan.ckpt); the head is the model's output table, without the mask.

Legend: B sequences, T tokens, K codes, D model width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    ChameleonForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from arra.layout import Layout
from arra.models.base import Grid
from arra.models.causal_lm import CausalLM, rows_from_codebook, rows_like
from arra.models.chameleon_vocabulary import BEGIN, BOS, END, TURN, Vocabulary
from arra.models.chameleon_weights import (
    ADAPTOR,
    describes_lumina,
    empty_chameleon,
    open_chameleon,
    read_config,
    stored_names,
    vocabulary_map,
)

PIXELS_PER_CODE = 16
SAMPLE_OF_ROWS = 4096
"""Text rows whose mean and covariance new image rows get; all 57,000 would need 4 GB of scratch."""


class Format(NamedTuple):
    """How a published checkpoint writes images and words prompts."""

    sized: bool  # with sizes and row ends
    wording: str
    told: str


FORMATS = {
    "chameleon": Format(False, "", "Meta's Chameleon and Anole: begin, codes, end"),
    "lumina": Format(
        True,
        # Alpha-VLLM/Lumina-mGPT, lumina_mgpt/generate_examples/generate.py
        "Generate an image of {width}x{height} according to the following prompt:\n",
        "Lumina-mGPT: sizes and row ends; prompts say the image's size",
    ),
    # xiexing0916/ARRA, arra/inference_vision.py
    "arra": Format(True, "", "ARRA's release: as Lumina-mGPT, prompts as they are"),
}


class Chameleon(CausalLM):
    """Chameleon and Anole: prompt, end of turn, then begin, codes, end.

    The unguided row is begin-of-text alone (facebookresearch/chameleon and GAIR-NLP/anole,
    chameleon/inference/chameleon.py, `_split_inputs_for_cfg`).
    """

    model: ChameleonForConditionalGeneration
    default_grid: Grid | None = (32, 32)  # 512 pixels
    formats: ClassVar[Mapping[str, str]] = {name: form.told for name, form in FORMATS.items()}
    # Guidance by text, temperature and top-p of `Options.Image` in the file named above. Its other
    # guidance, by images in the prompt, does nothing without one.
    sampling: Mapping[str, float] = MappingProxyType(
        {"cfg": 3.0, "temperature": 0.7, "top_k": 0, "top_p": 0.9}
    )

    # ---- opening one ----------------------------------------------------------------------------

    @classmethod
    def open_model(cls, folder: Path) -> PreTrainedModel:
        return open_chameleon(folder)

    @classmethod
    def empty_model(cls, folder: Path) -> PreTrainedModel:
        return empty_chameleon(folder)

    @classmethod
    def assemble(
        cls, model: PreTrainedModel, text_tokenizer: PreTrainedTokenizerBase | None, layout: Layout
    ) -> "Chameleon":
        if text_tokenizer is None:
            raise ValueError("Chameleon reads text, but no tokenizer came with it")
        kind = LuminaMGPT if layout.style == "lumina" else Chameleon
        return kind(model, text_tokenizer, layout)

    @classmethod
    def as_published(cls, folder: Path) -> "Chameleon":
        """Tells the format by content: ARRA's release leaves its projector in the weights,
        Lumina-mGPT its own class in config.json; transformers' class is Meta's or Anole's."""
        if any(name.startswith(ADAPTOR) for name in stored_names(folder)):
            return cls.in_format(folder, "arra")
        if describes_lumina(folder):
            return cls.in_format(folder, "lumina")
        architectures = read_config(folder).architectures or []
        if architectures != ["ChameleonForConditionalGeneration"]:
            known = "; ".join(f"{name} ({form.told})" for name, form in FORMATS.items())
            raise ValueError(
                f"{folder / 'config.json'} names the architecture {', '.join(architectures) or '-'}"
                f", so its image format cannot be told: say which with --format: {known}"
            )
        return cls.in_format(folder, "chameleon")

    @classmethod
    def in_format(cls, folder: Path, name: str) -> "Chameleon":
        form = FORMATS.get(name)
        if form is None:
            raise ValueError(
                f"there is no Chameleon format {name!r}; there is {', '.join(FORMATS)}"
            )
        vocabulary = Vocabulary.of(vocabulary_map(read_config(folder)), f"{folder / 'config.json'}")
        if form.sized and not vocabulary.has_sizes:
            raise ValueError(
                f"{folder / 'config.json'}: the vocabulary map has no tokens for sizes and row "
                f"ends, so its images are not in the format {name!r}"
            )
        text_tokenizer = _open_tokenizer(folder, vocabulary)
        layout = vocabulary.sized(form.wording) if form.sized else vocabulary.plain()
        return cls.assemble(cls.open_model(folder), text_tokenizer, layout)

    def __init__(
        self, model: PreTrainedModel, text_tokenizer: PreTrainedTokenizerBase, layout: Layout
    ) -> None:
        super().__init__(model, text_tokenizer, layout)
        self._turn = text_tokenizer.get_vocab()[TURN]
        self._image_ids = frozenset(layout.image_vocabulary())
        # Meta's image encoder is not part of the language model: it never trains.
        for name, parameter in self.model.named_parameters():
            if name.startswith("model.vqmodel."):
                parameter.requires_grad_(False)

    # ---- what it is -----------------------------------------------------------------------------

    def reference(self, ids_BT: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """As the base says; image logits are those before the model's own mask over them."""
        before: list[Tensor] = []

        def keep(module: nn.Module, args: object, output: Tensor) -> None:
            before.append(output.clone())  # the mask is written into it

        handle = self.model.lm_head.register_forward_hook(keep)
        try:
            logits_BTV, hidden_states = super().reference(ids_BT)
        finally:
            handle.remove()
        codes = torch.tensor(self.layout.code_ids, device=logits_BTV.device)
        return logits_BTV.index_copy(-1, codes, before[0][..., codes]), hidden_states

    @torch.no_grad()
    def cannot_paint(self) -> str | None:
        table_VD = self.model.lm_head.weight
        rows_KD = table_VD[torch.tensor(self.layout.code_ids, device=table_VD.device)].float()
        if not rows_KD.isfinite().all():
            return "the output rows of its image codes are not finite"
        spread = float((rows_KD - rows_KD[0]).abs().max())
        if spread <= 1e-6 * float(table_VD.abs().max()):
            kind = "all zero" if float(rows_KD.abs().max()) == 0 else "all the same"
            return f"the output rows of its image codes are {kind}"
        return None

    @torch.no_grad()
    def reset_image_head(self, codebook_KC: Tensor | None, seed: int) -> None:
        table_VD = self.model.lm_head.weight
        codes = torch.tensor(self.layout.code_ids, device=table_VD.device)
        text = torch.ones(len(table_VD), dtype=torch.bool, device=table_VD.device)
        text[codes] = False
        known_ND = table_VD[text]
        known_ND = known_ND[:: -(-len(known_ND) // SAMPLE_OF_ROWS)]
        generator = torch.Generator().manual_seed(seed)
        if codebook_KC is None:
            rows_KD = rows_like(known_ND, len(codes), generator)
        else:
            rows_KD = rows_from_codebook(known_ND, codebook_KC, generator)
        table_VD[codes] = rows_KD.to(table_VD)

    def _set_attention(self, name: str) -> None:
        # "": not that of the image encoder, which may be absent: transformers would warn.
        self.model.set_attn_implementation({"": name})

    # ---- prompts --------------------------------------------------------------------------------

    def text_ids(self, text: str) -> list[int]:
        ids = super().text_ids(text)
        if not self._image_ids.isdisjoint(ids):
            raise ValueError(f"the text {text[:60]!r} holds the name of an image token: reword it")
        return ids

    def wrapping(self, grid: Grid) -> tuple[list[int], list[int]]:
        return [self._start, *self.text_ids(self._words(grid))], [self._turn]

    def null_condition(self, grid: Grid) -> list[int]:
        return [self._start]

    def condition(self, text: str, grid: Grid) -> list[int]:
        # Wording and text are tokenized as one, as the originals do: pieces may join.
        if not text:
            return self.null_condition(grid)
        ids = self.text_ids(self._words(grid) + text)
        return [self._start, *ids[: self.room(grid) - 2], self._turn]

    def _words(self, grid: Grid) -> str:
        height, width = grid
        return self.layout.wording.format(
            width=PIXELS_PER_CODE * width, height=PIXELS_PER_CODE * height
        )


class LuminaMGPT(Chameleon):
    """Lumina-mGPT and ARRA's release: the image's size and row ends are tokens.

    The unguided row has nothing before its image, not even begin-of-text (both repositories,
    inference_solver.py, `get_unconditional_logits`).
    """

    # README of Alpha-VLLM/Lumina-mGPT ("Simple Inference") and ARRA's inference_vision.py.
    sampling: Mapping[str, float] = MappingProxyType(
        {"cfg": 4.0, "temperature": 1.0, "top_k": 2000, "top_p": 1.0}
    )

    def null_condition(self, grid: Grid) -> list[int]:
        return []


def _open_tokenizer(folder: Path, vocabulary: Vocabulary) -> PreTrainedTokenizerBase:
    """The tokenizer as tokenizer.json has it.

    transformers 5 opens it as a Llama tokenizer, which splits text in Llama's way whatever the file
    says: other ids than the model was trained on.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{folder} has no tokenizer.json: place the one that was published with the weights "
            f"there (Meta calls it text_tokenizer.json)"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.bos_token = BOS
    known = {BOS: vocabulary.bos, BEGIN: vocabulary.begin, END: vocabulary.end}
    for token, expected in {**known, TURN: vocabulary.turn}.items():
        found = tokenizer.get_vocab().get(token)
        if found != expected:
            raise ValueError(
                f"{folder}: {token} is {found} in tokenizer.json but {expected} in config.json's "
                f"vocabulary_map: they belong to different models"
            )
    return tokenizer


FAMILY = Chameleon
