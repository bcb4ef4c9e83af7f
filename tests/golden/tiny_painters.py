"""Tiny Janus and Emu3 folders with random weights, in the format of transformers."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from arra.models.emu3 import PARTS

JANUS_CODES, EMU3_CODES = 24, 20
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 96,
}


def byte_level_bpe(vocabulary: int, special: list[str]) -> Tokenizer:
    """Fitted on a few words, with named special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a red circle: a blue square"] * 3, trainer)
    return tokenizer


# ---- Janus ---------------------------------------------------------------------------------------

JANUS_SPECIAL = [
    *("<bos>", "<eos>", "<pad>", "<begin_of_image>", "<end_of_image>", "<image_placeholder>"),
    *("<|User|>", "<|Assistant|>"),
]


def janus_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(300, JANUS_SPECIAL),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens={
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_placeholder>",
        },
    )


def publish_janus(folder: Path, codes: int = JANUS_CODES) -> Path:
    """As deepseek-community publishes them; images of 3 x 3 codes."""
    tokenizer = janus_tokenizer()
    config = JanusConfig(
        text_config={"model_type": "llama", "vocab_size": 304, "num_key_value_heads": 2, **SIZES},
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 6,
            "patch_size": 2,
            "projection_dim": 32,
            "num_image_tokens": 9,
        },
        vq_config={
            "embed_dim": 4,
            "num_embeddings": codes,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = JanusForConditionalGeneration(config)
    _spread(model, ("language_model", "generation"))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        guidance_scale=5,
        generation_kwargs={"boi_token_id": tokenizer.convert_tokens_to_ids("<begin_of_image>")},
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ---- Emu3 ----------------------------------------------------------------------------------------

BOS, EOS, PAD = "<|extra_203|>", "<|extra_204|>", "<|endoftext|>"


def emu3_special_tokens(codes: int = EMU3_CODES) -> list[str]:
    named = [f"<|visual token {code:06d}|>" for code in range(codes)]
    return [PAD, BOS, EOS, "<image>", *(n for n in PARTS.values() if n.startswith("<|")), *named]


def emu3_tokenizer(special: list[str]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(290 + len(special), special),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
    )


def publish_emu3(folder: Path, tokenizer: PreTrainedTokenizerFast, codes: int = EMU3_CODES) -> Path:
    """As BAAI publishes them."""
    config = Emu3Config(
        text_config={
            **SIZES,
            "vocab_size": len(tokenizer) + 3,
            "num_key_value_heads": 1,
            "attention_dropout": 0.0,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vq_config={
            "codebook_size": codes,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [1],
            "hidden_size": 32,
        },
        vocabulary_map=tokenizer.get_vocab(),
    )
    torch.manual_seed(0)
    model = Emu3ForConditionalGeneration(config)
    _spread(model, ("text_model", "lm_head"))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _spread(model: PreTrainedModel, parts: tuple[str, ...]) -> None:
    """Larger weights: small ones would paint one code all over."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and any(part in name for part in parts):
            parameter.data.normal_(std=1.0 if "embed" in name else 0.3)
