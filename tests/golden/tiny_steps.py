"""Tiny LlamaGens for decode steps, with what their rows have painted."""

import torch
from torch import Tensor, nn

from arra.layout import Layout
from arra.models.llamagen import LlamaGen
from arra.models.llamagen_layers import LlamaGenConfig
from arra.models.llamagen_model import LlamaGenForImageGeneration
from arra.models.row_cache import RowCache

CODES, SIDE, COLUMNS = 50, 4, 17


def tiny(dtype: torch.dtype, key_heads: int = 4, head_width: int = 8) -> LlamaGen:
    """The same weights at every call, but for their rounding."""
    torch.manual_seed(0)
    config = LlamaGenConfig(
        vocab_size=CODES,
        hidden_size=4 * head_width,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=key_heads,
        grid_height=SIDE,
        grid_width=SIDE,
        num_classes=3,
    )
    model = LlamaGenForImageGeneration(config).eval().to(dtype)
    nn.init.normal_(model.output.weight)
    return LlamaGen(model, Layout("grid", tuple(range(CODES)), pad=0))


def begun(backbone: LlamaGen, rows: int) -> RowCache:
    """Rows with 8 tokens each, the same in row b of every cache."""
    cache = backbone.new_cache(rows, COLUMNS)
    ids = torch.randint(0, CODES, (rows, 8), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = CODES
    backbone.prefill(ids, cache, torch.arange(rows))
    return cache


def far(made: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((made.double() - expected.double()).abs().max() / expected.double().abs().max())
