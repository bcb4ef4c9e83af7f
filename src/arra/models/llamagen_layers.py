"""What LlamaGen's transformer is built of: its configuration and its blocks.

Architecture: arXiv 2406.06525, section 2.2; FoundationVision/LlamaGen ce98ec4,
autoregressive/models/gpt.py. Modules have the original's names.

Legend: B rows, T tokens, N caption slots, D model width, H heads, P pairs of a
head's width, F width of a caption's features.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from arra.models.llamagen_cpu import (
    RMSNormCPU,
    TurnCPU,
    TurnedAttentionCPU,
    dropout_cpu,
    serves,
)
from arra.models.row_cache import RowCache
from arra.text_features import TextFeatures


class LlamaGenConfig(PreTrainedConfig):
    """Sizes of a LlamaGen transformer.

    Attributes:
        vocab_size: K, codes of the image tokenizer.
        intermediate_size: width inside the feed-forward layers; None = the original's rounding.
        num_key_value_heads: None = as many as heads.
        grid_height, grid_width: the image in codes. The original's are square.
        condition: "class", or "text" (a caption's features).
        num_classes: C; the table has one more row, "no class". Their names are `id2label`.
        text_slots: N, positions of a caption (120 T5 tokens in the original).
        caption_dim: F (2048: Flan-T5-XL).
        rope_base: of the rotary frequencies.
        token_dropout: of the input embeddings, in training.
        attention_dropout: of attention weights.
        residual_dropout, mlp_dropout: of what attention and the feed-forward layers add.
        drop_path: probability that a row skips the last block, rising from 0 at the first.
    """

    model_type = "llamagen"

    vocab_size: int = 16384
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    grid_height: int = 16
    grid_width: int = 16
    condition: str = "class"
    num_classes: int = 1000
    text_slots: int = 120
    caption_dim: int = 2048
    rope_base: float = 10000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    token_dropout: float = 0.1
    attention_dropout: float = 0.0
    residual_dropout: float = 0.1
    mlp_dropout: float = 0.1
    drop_path: float = 0.0

    def prefix(self) -> int:
        """S, positions before the first code."""
        return 1 if self.condition == "class" else self.text_slots

    def mlp_width(self) -> int:
        """Width inside the feed-forward layers: two thirds of four times D, up to a multiple of 256
        (gpt.py, FeedForward), unless set."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-(8 * self.hidden_size // 3) // 256) * 256


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in at least float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if serves(x) and x.dtype == self.weight.dtype == wide(x.dtype):
            # What follows is a product, or several: they need not each round it again.
            autocast = torch.is_autocast_enabled("cpu")
            dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
            return RMSNormCPU.apply(x, self.weight, self.eps, dtype)
        x_wide = x.to(wide(x.dtype))
        unit = x_wide * torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + self.eps)
        return unit.to(x.dtype) * self.weight


class ClassEmbedder(nn.Module):
    """A row per class, and one for "no class"."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.hidden_size)

    def forward(self, classes_BT: Tensor) -> Tensor:
        return self.embedding_table(classes_BT)


class Projection(nn.Module):
    """Linear - GELU (tanh) - Linear, no biases."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, outputs, bias=False)
        self.fc2 = nn.Linear(outputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Features of captions into the model's width; a learned caption where there is none."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.cap_proj = Projection(config.caption_dim, config.hidden_size)
        # The original keeps it as a buffer, which its optimizer never saw; here it is learned.
        self.uncond_embedding = nn.Parameter(torch.empty(config.text_slots, config.caption_dim))

    def forward(self, text: TextFeatures) -> Tensor:
        """(B, N, D)."""
        null_NF = self.uncond_embedding
        values_BNF = text.values_BND.to(null_NF.dtype)
        return self.cap_proj(torch.where(text.dropped_B[:, None, None], null_NF, values_BNF))


class Dropout(nn.Dropout):
    """PyTorch's, drawn faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and 0 < self.p < 1 and serves(x):
            return dropout_cpu(x, self.p)
        return super().forward(x)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        width, inside = config.hidden_size, config.mlp_width()
        self.w1 = nn.Linear(width, inside, bias=False)
        self.w3 = nn.Linear(width, inside, bias=False)
        self.w2 = nn.Linear(inside, width, bias=False)
        self.dropout = Dropout(config.mlp_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class LlamaGenAttention(nn.Module):
    """Causal self-attention; one matrix makes queries, keys and values."""

    def __init__(self, config: LlamaGenConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.heads = config.num_attention_heads
        self.key_heads = config.num_key_value_heads or self.heads
        self.head_width = config.hidden_size // self.heads
        self.num_key_value_groups = self.heads // self.key_heads  # transformers reads these three
        self.scaling = self.head_width**-0.5
        self.is_causal = True
        total = (self.heads + 2 * self.key_heads) * self.head_width
        self.wqkv = nn.Linear(config.hidden_size, total, bias=False)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.dropout = Dropout(config.residual_dropout)

    def forward(
        self,
        x_BTD: Tensor,
        turns: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: RowCache | None,
    ) -> Tensor:
        qkv_BTE = self.wqkv(x_BTD)
        if cache is None and self._by_hand(qkv_BTE, mask):
            cos, sin = (turn[:, 0] for turn in turns)
            mixed_BTD = TurnedAttentionCPU.apply(qkv_BTE, cos, sin, self.heads, self.scaling)
            return self.dropout(self.wo(mixed_BTD))
        heads = qkv_BTE.unflatten(-1, (-1, self.head_width))
        parts = heads.split([self.heads, self.key_heads, self.key_heads], dim=2)
        query, key, value = (part.transpose(1, 2) for part in parts)
        query, key = _turn(query, turns), _turn(key, turns)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        mixed = self._attend(query, key, value, mask)
        return self.dropout(self.wo(mixed.flatten(2)))

    def _by_hand(self, qkv_BTE: Tensor, mask: Tensor | None) -> bool:
        """Plain causal attention in bfloat16 on a CPU."""
        dropout = self.config.attention_dropout if self.training else 0.0
        causal = mask is None and dropout == 0 and self.heads == self.key_heads
        fused = self.config._attn_implementation == "sdpa"
        return fused and causal and qkv_BTE.dtype == torch.bfloat16 and serves(qkv_BTE)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, H, 2P)."""
        name = self.config._attn_implementation
        dropout = self.config.attention_dropout if self.training else 0.0
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        mixed, _ = attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling)
        return mixed


class Block(GradientCheckpointingLayer):
    """x + attention(norm(x)), then the same with the feed-forward layer."""

    def __init__(self, config: LlamaGenConfig, layer: int) -> None:
        super().__init__()
        self.attention = LlamaGenAttention(config, layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.drop_path = config.drop_path * layer / max(config.num_hidden_layers - 1, 1)

    def forward(
        self,
        x_BTD: Tensor,
        turns: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: RowCache | None = None,
    ) -> Tensor:
        added = self.attention(self.attention_norm(x_BTD), turns, mask, cache)
        x_BTD = x_BTD + self._skipped(added).to(x_BTD.dtype)
        return x_BTD + self._skipped(self.feed_forward(self.ffn_norm(x_BTD))).to(x_BTD.dtype)

    def _skipped(self, added_BTD: Tensor) -> Tensor:
        """Stochastic depth: whole rows are left out, the others scaled up."""
        if self.drop_path == 0 or not self.training:
            return added_BTD
        keep = 1 - self.drop_path
        return added_BTD * added_BTD.new_empty(len(added_BTD), 1, 1).bernoulli_(keep).div_(keep)


def _turn(x_BHTw: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Turns neighbouring pairs of a head's width, in at least float32."""
    cos, sin = turns
    if serves(x_BHTw):
        return TurnCPU.apply(x_BHTw, cos, sin)
    even, odd = x_BHTw.to(wide(x_BHTw.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).to(x_BHTw.dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def eager_attention_forward(
    module: LlamaGenAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float,
    scaling: float,
) -> tuple[Tensor, None]:
    """Plain products, in the form of transformers' attention functions: (B, T, H, 2P), None."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3)) * scaling
    if attention_mask is None:
        columns_T = torch.arange(query.shape[2], device=query.device)
        attention_mask = columns_T[:, None] >= columns_T
    scores = scores.masked_fill(~attention_mask, float("-inf"))
    weights = scores.softmax(-1, dtype=wide(scores.dtype)).to(value.dtype)
    mixed = F.dropout(weights, dropout, training=module.training) @ value
    return mixed.transpose(1, 2), None
