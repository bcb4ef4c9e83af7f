"""A tiny language model of any architecture, grown to paint."""

import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from arra.models.causal_lm import CausalLM, grow
from arra.models.loading import fit_text_tokenizer

GRID = (3, 3)
CODES = 8
TOKENIZER = fit_text_tokenizer(["hello world, a circle"] * 3, 280)


def grown(architecture: str, **extra: object) -> CausalLM:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=96,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **extra,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    backbone = grow(model, copy.deepcopy(TOKENIZER), CODES, style="lumina")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)
    return backbone
