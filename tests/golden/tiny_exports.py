"""Exported folders of tiny painters with random weights, one of each kind that vLLM may be given.

`python tests/golden/tiny_exports.py FOLDER` writes all of them, to try a real server on:
`vllm serve FOLDER/KIND/model --dtype float32`.
"""

import sys
from pathlib import Path

import tiny_chameleon
import torch
from tiny_painters import emu3_special_tokens, emu3_tokenizer, publish_emu3, publish_janus
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ChameleonForConditionalGeneration,
    GenerationConfig,
)

from arra.config import ModelConfig
from arra.image_tokenizers.vq import VQConfig, VQModel
from arra.models import load_model
from arra.models.base import Backbone
from arra.models.loading import fit_text_tokenizer, load_for_training, save_skeleton
from arra.models.served import save_for_servers

GROWN_CODES = 24
CAPTIONS = ["a red circle", "two blue squares left of a line"]
GROWN = {  # architecture: (fields of its own, format of an image)
    "llama": ({"tie_word_embeddings": False}, "chameleon"),
    "qwen2": ({"tie_word_embeddings": True}, "lumina"),
    "qwen3": ({"head_dim": 32}, "grid"),
    "gemma2": ({"head_dim": 32, "final_logit_softcapping": 30.0}, "chameleon"),
    "gemma3_text": ({"head_dim": 32, "sliding_window": 8}, "lumina"),
    "smollm3": ({}, "chameleon"),
}
PUBLISHED = ("chameleon", "lumina", "emu3")
SERVED = (*GROWN, *PUBLISHED)
GRID = (2, 4)


def painter(kind: str, folder: Path) -> Backbone:
    """A painter of that kind; `folder` takes what it starts from."""
    if kind == "emu3":
        published = publish_emu3(folder, emu3_tokenizer(emu3_special_tokens()))
    elif kind == "janus":
        published = publish_janus(folder)
    elif kind in PUBLISHED:
        write = {"chameleon": tiny_chameleon.publish, "lumina": tiny_chameleon.publish_lumina}
        published = write[kind](folder, _chameleon())
    else:
        return _grown(kind, folder)
    backbone = load_model(published)
    spread(backbone)
    return backbone


def _chameleon() -> ChameleonForConditionalGeneration:
    """With heads of 32, the narrowest that vLLM has on a CPU."""
    config = tiny_chameleon.tiny().config
    config.hidden_size = 32 * config.num_attention_heads
    torch.manual_seed(0)
    return ChameleonForConditionalGeneration(config)


def _grown(kind: str, folder: Path) -> Backbone:
    fields, layout = GROWN[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=300,  # more rows than the tokenizer has tokens, as in Qwen
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=96,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **fields,
    )
    model = AutoModelForCausalLM.from_config(config)
    # For writing, as Qwen2.5's own: what an export must not hand on.
    model.generation_config = GenerationConfig(
        do_sample=True, repetition_penalty=1.5, temperature=0.7, top_k=2, eos_token_id=2
    )
    model.save_pretrained(folder)
    fit_text_tokenizer(CAPTIONS, 280).save_pretrained(folder)
    backbone = load_for_training(
        folder,
        ModelConfig(layout=layout),
        codebook_KC=torch.zeros(GROWN_CODES, 3),
        captions=(),
        seed=0,
    )
    spread(backbone)
    return backbone


@torch.no_grad()
def spread(backbone: Backbone) -> None:
    """Larger weights: small ones would paint one code all over, and so would a large table that
    serves both ends."""
    tied = backbone.model.config.get_text_config().tie_word_embeddings
    for name, parameter in backbone.model.named_parameters():
        if parameter.ndim == 2 and "vqmodel" not in name and "vision" not in name:
            table = 0.1 if tied else 1.0
            parameter.normal_(std=table if "embed" in name else 0.3)


def codec(codes: int) -> VQModel:
    """An image tokenizer of that many codes; 2 pixels a code."""
    torch.manual_seed(0)
    config = VQConfig(
        image_size=16,
        base_channels=4,
        channel_multipliers=(1, 1),
        res_blocks=1,
        middle_attention=False,
        norm_groups=2,
        z_channels=4,
        codebook_size=codes,
        codebook_dim=3,
    )
    return VQModel(config).eval()


def export(kind: str, folder: Path) -> Path:
    """What `arra export` writes of a run with such a painter, but for the card."""
    backbone = painter(kind, folder / "start")
    image_tokenizer = codec(len(backbone.layout.code_ids))
    out = folder / kind
    save_skeleton(
        backbone,
        out,
        grid=GRID,
        image_tokenizer="image_tokenizer",
        fingerprint=image_tokenizer.fingerprint,
        trained_vocabulary="all",
    )
    backbone.save(out)
    save_for_servers(backbone, out / "model", GRID, backbone.sampling)
    image_tokenizer.save_pretrained(out / "image_tokenizer")
    return out


if __name__ == "__main__":
    for name in SERVED:
        print(export(name, Path(sys.argv[1]) / "of" / name))
