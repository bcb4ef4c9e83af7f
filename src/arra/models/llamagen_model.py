"""LlamaGen's transformer as a Hugging Face model; classes and captions in one.

FoundationVision/LlamaGen ce98ec4, autoregressive/models/gpt.py (arXiv 2406.06525, section 2.2):
Llama's decoder with rotary positions in two dimensions. Parameters have the original's names: its
state dict is this one's.

Ids: codes 0..K-1; then the classes K..K+C-1 and "no class" K+C; or the slots K..K+N-1 of a caption.
Positions of a row: first S for the condition (one class, or N slots), then cells in raster order.

Legend: B rows, T tokens, S condition positions, N caption slots, D model width,
P pairs of a head's width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from arra.models.llamagen_layers import (
    Block,
    CaptionEmbedder,
    ClassEmbedder,
    Dropout,
    LlamaGenConfig,
    RMSNorm,
    wide,
)
from arra.models.row_cache import RowCache
from arra.text_features import TextFeatures


class LlamaGenForImageGeneration(PreTrainedModel):
    """The transformer with its head: ids (or a caption's features) to the logits of codes."""

    config_class = LlamaGenConfig
    config: LlamaGenConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: set[str] | list[str] | None = ["Block"]  # noqa: RUF012

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__(config)
        _check(config)
        self.cls_embedding = (
            ClassEmbedder(config) if config.condition == "class" else CaptionEmbedder(config)
        )
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.tok_dropout = Dropout(config.token_dropout)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """As the original: N(0, 0.02) everywhere, zero for the head."""
        if module is self.output:
            nn.init.zeros_(module.weight)
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, CaptionEmbedder):
            nn.init.normal_(module.uncond_embedding, std=self.config.caption_dim**-0.5)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.tok_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.tok_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.output = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        text: TextFeatures | None = None,
        output_hidden_states: bool = False,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, K) of what follows each of the ids (B, T)."""
        layers: list[Tensor] | None = [] if output_hidden_states else None
        hidden_BTD = self.hidden(input_ids, position_ids, text, layers=layers)
        return CausalLMOutputWithPast(
            logits=self.output(hidden_BTD),  # type: ignore[arg-type]
            hidden_states=None if layers is None else (*layers, hidden_BTD),  # type: ignore
        )

    def hidden(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor | None = None,
        text: TextFeatures | None = None,
        *,
        cache: RowCache | None = None,
        mask_B1TC: Tensor | None = None,
        layers: list[Tensor] | None = None,
    ) -> Tensor:
        """Final hidden states (B, T, D), after the final norm.

        Args:
            positions_BT: in the row; None: 0, 1, ... (padding, if any, on the right).
            text: what the caption slots among the ids stand for.
            cache: where keys and values are stored, and come from.
            mask_B1TC: what is seen, where it is not just the tokens before.
            layers: collects the embeddings and every block's output but the last.
        """
        if positions_BT is None:
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        x_BTD = self.tok_dropout(self._embedded(ids_BT, text))
        turns = rotations(self.config, positions_BT, x_BTD.dtype)
        mask = _causal(self.padding(ids_BT, text)) if mask_B1TC is None else mask_B1TC
        for block in self.layers:
            if layers is not None:
                layers.append(x_BTD)
            x_BTD = block(x_BTD, turns, mask, cache)
        return self.norm(x_BTD)

    def _embedded(self, ids_BT: Tensor, text: TextFeatures | None) -> Tensor:
        codes, classes = self.config.vocab_size, self.config.num_classes + 1
        is_code_BT1 = (ids_BT < codes)[..., None]
        if self.config.condition == "class":
            # Remainders, not clamps: at codes the class row is not used, and its zero gradients
            # spread over the table instead of queueing for one row.
            class_BTD = self.cls_embedding((ids_BT - codes).remainder(classes))
            return torch.where(is_code_BT1, self.tok_embeddings(ids_BT % codes), class_BTD)
        if text is None:
            return self.tok_embeddings(ids_BT)  # only codes; the caption, if any, is in the cache
        caption_BND = self.cls_embedding(text)
        slot_BT1 = (ids_BT - codes).clamp(min=0)[..., None]
        caption_BTD = caption_BND.gather(1, slot_BT1.expand(-1, -1, caption_BND.shape[2]))
        code_BTD = self.tok_embeddings(ids_BT % codes)
        return torch.where(is_code_BT1, code_BTD, caption_BTD.to(code_BTD.dtype))

    def padding(self, ids_BT: Tensor, text: TextFeatures | None) -> Tensor | None:
        """Which tokens are slots that no word of the caption fills, (B, T)."""
        if text is None:
            return None
        slots_BT = ids_BT - self.config.vocab_size
        return (slots_BT >= 0) & ~text.mask_BN.bool().gather(1, slots_BT.clamp(min=0))


def _check(config: LlamaGenConfig) -> None:
    width, heads = config.hidden_size, config.num_attention_heads
    if config.condition not in ("class", "text"):
        raise ValueError(f"condition is class or text, got {config.condition!r}")
    if width % (4 * heads):
        raise ValueError(
            f"a head's width must be a multiple of 4, for row and column: {width} / {heads} is not"
        )
    if heads % (config.num_key_value_heads or heads):
        raise ValueError("num_key_value_heads must divide num_attention_heads")


def rotations(
    config: LlamaGenConfig, positions_BT: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 1, T, P) of rotary positions in two dimensions.

    The first half of the pairs turns by the row, the second by the column. At the condition's
    positions both are zero (gpt.py, precompute_freqs_cis_2d): their queries and keys vanish, and
    with them every score that they are part of.
    """
    quarter = config.hidden_size // config.num_attention_heads // 4
    steps = torch.arange(quarter, device=positions_BT.device, dtype=wide(dtype))
    rates = 1.0 / config.rope_base ** (steps / quarter)
    cell_BT = positions_BT - config.prefix()
    place_BT = cell_BT.clamp(min=0)
    row_BT1 = (place_BT // config.grid_width)[..., None]
    column_BT1 = (place_BT % config.grid_width)[..., None]
    angles_BTP = torch.cat([row_BT1 * rates, column_BT1 * rates], dim=-1)
    is_cell_BT1 = (cell_BT >= 0)[..., None]
    cos_BTP, sin_BTP = angles_BTP.cos() * is_cell_BT1, angles_BTP.sin() * is_cell_BT1
    return cos_BTP[:, None], sin_BTP[:, None]


def _causal(padding_BT: Tensor | None) -> Tensor | None:
    """Who sees whom, (B, 1, T, T) bool; None: everybody what came before."""
    if padding_BT is None:
        return None
    columns_T = torch.arange(padding_BT.shape[1], device=padding_BT.device)
    # Padding sees itself, as in the original: a softmax over nothing would be NaN.
    itself_TT = columns_T[:, None] == columns_T
    before_TT = columns_T[:, None] >= columns_T
    return ((before_TT & ~padding_BT[:, None]) | itself_TT)[:, None]


AutoConfig.register(LlamaGenConfig.model_type, LlamaGenConfig, exist_ok=True)
AutoModel.register(LlamaGenConfig, LlamaGenForImageGeneration, exist_ok=True)
