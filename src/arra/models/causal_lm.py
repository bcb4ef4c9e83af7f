"""Any transformers causal language model with a key/value cache, grown by image tokens.

The model stays an ordinary checkpoint of its own architecture: image codes and separators become
named tokens of its tokenizer and rows of its tables, nothing else is added.

Legend: B sequences, T tokens, C columns that are attended to, N positions, D model width, V
vocabulary, K codes.
"""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arra.layout import Layout, Style
from arra.models.base import Backbone
from arra.models.decoding import Decoding
from arra.models.folders import empty_causal_lm, open_causal_lm
from arra.models.no_cache import NoCache
from arra.models.row_cache import RowCache, visible
from arra.text_features import TextFeatures

_SEPARATORS = {
    "grid": (),
    "chameleon": ("<|image|>", "<|/image|>"),
    "lumina": ("<|image|>", "<|/image|>", "<|row|>"),
}
FULL, SLIDING = "full_attention", "sliding_attention"
"""Layers that keep nothing but keys and values, by transformers' names (`layer_types`)."""
_MAX_SIDE = 128  # codes; how many size tokens the "lumina" style gets


class CausalLMHead(nn.Module):
    """hidden -> logits: the output table with its bias, then the model's scale and soft-cap.

    Scale: Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`. Soft-cap:
    cap * tanh(logits / cap), Gemma 2's `final_logit_softcapping`, RecurrentGemma's
    `logits_soft_cap`. `check_head` compares the whole with the model's own logits at load.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        config = model.config.get_text_config()
        table = model.get_output_embeddings()
        if table is None:
            raise ValueError(f"{type(model).__name__} has no output table: it predicts no tokens")
        self.table = table
        self.scale = float(getattr(config, "logit_scale", None) or 1.0)
        self.scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        self.soft_cap = getattr(config, "final_logit_softcapping", None) or getattr(
            config, "logits_soft_cap", None
        )

    def forward(self, hidden_ND: Tensor) -> Tensor:
        logits_NV = self.table(hidden_ND)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.soft_cap:
            logits_NV = self.soft_cap * torch.tanh(logits_NV / self.soft_cap)
        return logits_NV


class CausalLM(Backbone):
    """The backbone of any `AutoModelForCausalLM` whose vocabulary holds the layout's tokens."""

    text_tokenizer: PreTrainedTokenizerBase

    @classmethod
    def open_model(cls, folder: Path) -> PreTrainedModel:
        return open_causal_lm(folder)

    @classmethod
    def empty_model(cls, folder: Path) -> PreTrainedModel:
        return empty_causal_lm(folder)

    @classmethod
    def assemble(
        cls, model: PreTrainedModel, text_tokenizer: PreTrainedTokenizerBase | None, layout: Layout
    ) -> Self:
        if text_tokenizer is None:
            raise ValueError(f"{type(model).__name__} reads text, but no tokenizer came with it")
        return cls(model, text_tokenizer, layout)

    @classmethod
    def as_published(cls, folder: Path) -> Self:
        raise ValueError(
            f"{folder} is a language model that can only write: it learns to paint with "
            f"`arra train llm --model {folder}`"
        )

    def __init__(
        self, model: PreTrainedModel, text_tokenizer: PreTrainedTokenizerBase, layout: Layout
    ) -> None:
        self.model, self.text_tokenizer, self.layout = model, text_tokenizer, layout
        self._decoder: Any = model.get_decoder()
        self._blocks = _find_blocks(model)
        head = CausalLMHead(model)
        # Bare, where there is nothing else to it: a fused loss takes no other.
        self.head = head if head.scale != 1.0 or head.soft_cap else head.table
        self._start = start_id(text_tokenizer)

    @property
    def hidden_size(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @property
    def max_length(self) -> int:
        return self.model.config.get_text_config().max_position_embeddings

    @property
    def vocab_size(self) -> int:
        # Not the table's own attribute: an adapter may stand around the table.
        return self.model.config.get_text_config().vocab_size

    @property
    def blocks(self) -> nn.ModuleList:
        return self._blocks

    def last_hidden(self, ids_BT: Tensor, text: TextFeatures | None = None) -> Tensor:
        return self._decoder(
            **self._inputs(ids_BT), past_key_values=NoCache(), use_cache=False
        ).last_hidden_state

    def text_ids(self, text: str) -> list[int]:
        # An image token's name inside a caption must stay text: a caption cannot paint.
        ids = self.text_tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return ids["input_ids"]

    def opening(self) -> list[int]:
        return [self._start]

    @property
    def has_cache(self) -> bool:
        """Keys and values alone: a recurrent layer's state cannot be taken back row by row."""
        kinds = set(getattr(self.model.config.get_text_config(), "layer_types", None) or ())
        known = kinds <= {FULL, SLIDING} and not getattr(self.model, "_is_stateful", False)
        return known and "past_key_values" in inspect.signature(self._decoder.forward).parameters

    def prefill(
        self, ids_BT: Tensor, cache: RowCache, rows_B: Tensor, text: TextFeatures | None = None
    ) -> Tensor:
        tokens = ids_BT.shape[1]
        cache.begin(rows_B, tokens)
        positions_BT = torch.arange(tokens, device=ids_BT.device).expand(len(rows_B), -1)
        seen = partial(visible, positions_BT, tokens)
        return self._decoded(ids_BT, positions_BT, seen, cache)

    def step(self, ids_BT: Tensor, positions_BT: Tensor, cache: RowCache) -> Tensor:
        cache.go_on(positions_BT)
        return self._decoded(ids_BT, positions_BT, partial(cache.seen, positions_BT), cache)

    def _inputs(self, ids_BT: Tensor) -> dict[str, Tensor]:
        """The decoder's arguments that stand for these ids."""
        return {"input_ids": ids_BT}

    def _decoded(
        self, ids_BT: Tensor, positions_BT: Tensor, seen: Callable[..., Tensor], cache: RowCache
    ) -> Tensor:
        return self._decoder(
            **self._inputs(ids_BT),
            attention_mask=self._masks(seen),
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def _masks(self, seen: Callable[..., Tensor]) -> Tensor | dict[str, Tensor]:
        """Which columns are seen, in the form that the attention in use wants, (B, 1, T, C); by
        kind of layer, where a model has two."""
        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or ())
        kinds = kinds or {FULL if window is None else SLIDING}
        masks = {
            kind: self._mask(seen(window=window if kind == SLIDING else None)) for kind in kinds
        }
        return masks if len(masks) > 1 else masks.popitem()[1]

    def _mask(self, seen_BTC: Tensor) -> Tensor:
        seen_B1TC = seen_BTC[:, None]
        if self.model.config._attn_implementation != "eager":
            return seen_B1TC
        lowest = torch.finfo(self.model.dtype).min
        return torch.zeros_like(seen_B1TC, dtype=self.model.dtype).masked_fill(~seen_B1TC, lowest)

    def decoding(self) -> Decoding:
        return Decoding(self)


def start_id(text_tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that opens a sequence: begin-of-text, or end-of-text where a family has no other."""
    for token in (text_tokenizer.bos_token_id, text_tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError("the text tokenizer has neither a begin nor an end token to open a sequence")


def _find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        module
        for module in model.get_decoder().modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise ValueError(f"{type(model).__name__}: cannot find its {count} decoder blocks")
    return lists[0]


# ---- growing a language model that can only write ------------------------------------------------


def grow(
    model: PreTrainedModel,
    text_tokenizer: PreTrainedTokenizerBase,
    codebook_size: int,
    *,
    style: Style = "chameleon",
    rep: bool = False,
    codebook_KC: Tensor | None = None,
    seed: int = 0,
) -> CausalLM:
    """Adds image codes and separators to `model` and its tokenizer, both in place.

    The tables get max(old rows, last new id + 1) rows: many models pad theirs, and a naive resize
    to the tokenizer's length would shrink them. The logits of old text tokens do not change.

    Args:
        codebook_size: K of the image tokenizer.
        rep: also add the extra token of the paper's ablation.
        codebook_KC: start the rows of the codes from the image tokenizer's codebook, by a random
            projection scaled to the old rows' spread; otherwise from their mean and covariance.
    """
    names = [*_SEPARATORS[style], *(["<|rep|>"] if rep else [])]
    sizes = [f"<|size_{n}|>" for n in range(_MAX_SIDE + 1)] if style == "lumina" else []
    width = len(str(codebook_size - 1))
    codes = [f"<|code_{k:0{width}}|>" for k in range(codebook_size)]
    known = text_tokenizer.get_vocab()  # made anew by each call: half a minute for 16,384 codes
    taken = [name for name in (*names, *sizes, *codes) if name in known]
    if taken:
        raise ValueError(f"the tokenizer already has {taken[0]}: it was grown before")
    text_tokenizer.add_tokens([*names, *sizes, *codes], special_tokens=True)
    to_id = text_tokenizer.get_vocab().__getitem__
    first_code = to_id(codes[0])
    new_ids = list(range(to_id([*names, *sizes, *codes][0]), first_code + codebook_size))
    _grow_tables(model, new_ids, first_code, codebook_KC, seed)
    separators = [to_id(name) for name in _SEPARATORS[style]] + [None] * 3
    pad = text_tokenizer.pad_token_id
    layout = Layout(
        style=style,
        code_ids=tuple(range(first_code, first_code + codebook_size)),
        pad=start_id(text_tokenizer) if pad is None else pad,
        begin=separators[0],
        end=separators[1],
        row_end=separators[2],
        first_size=to_id(sizes[0]) if sizes else None,
        num_sizes=len(sizes),
        rep=to_id("<|rep|>") if rep else None,
    )
    return CausalLM(model, text_tokenizer, layout)


@torch.no_grad()
def _grow_tables(
    model: Any,  # transformers types its tables as Tensor | Module
    new_ids: list[int],
    first_code: int,
    codebook_KC: Tensor | None,
    seed: int,
) -> None:
    old_rows = model.get_input_embeddings().num_embeddings
    rows = max(old_rows, new_ids[-1] + 1)
    model.resize_token_embeddings(rows, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    output = model.get_output_embeddings()
    tables = [model.get_input_embeddings().weight]
    if output.weight is not tables[0]:
        tables.append(output.weight)
    known = min(old_rows, new_ids[0])
    for table in tables:
        table[new_ids] = rows_like(table[:known], len(new_ids), generator).to(table)
        if codebook_KC is not None:
            codes = slice(first_code, first_code + len(codebook_KC))
            table[codes] = rows_from_codebook(table[:known], codebook_KC, generator).to(table)
    if getattr(output, "bias", None) is not None:
        output.bias[new_ids] = output.bias[:known].mean()


def rows_like(old_VD: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Samples rows with the mean and covariance of the old ones, so that logits stay in range."""
    old = old_VD.double().cpu()
    mean = old.mean(0)
    # Drawn as random combinations of centred rows: their covariance, without a D x D factor.
    mix = torch.randn(count, len(old), generator=generator, dtype=torch.float64)
    return mean + mix @ (old - mean) / max(len(old) - 1, 1) ** 0.5


def rows_from_codebook(old_VD: Tensor, codebook_KC: Tensor, generator: torch.Generator) -> Tensor:
    """A random projection of the codebook, so that similar codes start with similar rows."""
    old, codes = old_VD.double().cpu(), codebook_KC.double().cpu()
    codes = (codes - codes.mean(0)) / codes.std().clamp(min=1e-12)
    project = torch.randn(codes.shape[1], old.shape[1], generator=generator, dtype=torch.float64)
    rows = codes @ project / codes.shape[1] ** 0.5
    return old.mean(0) + rows * old.std(0)
