"""Whole sequences through a cache that keeps nothing: what the decoder computes without one."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from arra.models.no_cache import NoCache

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4},
}


def decoder_of(family: str, attention: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=50,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=32,
        attn_implementation=attention,
        **FAMILIES[family],
    )
    return AutoModelForCausalLM.from_config(config).double().eval().get_decoder()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_else_is_computed(family: str, attention: str) -> None:
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no such")
    decoder = decoder_of(family, attention)
    ids_BT = torch.randint(0, 50, (2, 9))
    plain_BTD = decoder(input_ids=ids_BT, use_cache=False).last_hidden_state
    for _ in range(2):  # nothing is left behind
        kept = decoder(input_ids=ids_BT, past_key_values=NoCache(), use_cache=False)
        off = (kept.last_hidden_state - plain_BTD).abs().max()
        assert off <= 1e-12


def test_attention_stays_causal_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """No mask is made, so that a fused kernel may be used."""
    seen = []
    fused = F.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((kwargs["attn_mask"], kwargs["is_causal"]))
        return fused(*args, **kwargs)

    decoder = decoder_of("llama", "sdpa")
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    decoder(input_ids=torch.zeros(2, 9, dtype=torch.long), past_key_values=NoCache())
    assert seen == [(None, True)] * 2
