"""A T5 small enough for tests, as the whole model is published: decoder and head included."""

from pathlib import Path

import torch
from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

WORDS = "a photo of red circle blue square left two small green triangle line the".split()  # noqa: SIM905
WIDTH = 16


def save_tiny_t5(folder: Path, *, seed: int = 0, width: int = WIDTH) -> T5ForConditionalGeneration:
    """Writes config, safetensors weights and tokenizer; returns the model."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0 - i / 10) for i, word in enumerate(WORDS)]
    pieces += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789,.;"]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(tokenizer) + 3,  # T5 pads its table
        d_model=width,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    model = T5ForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
