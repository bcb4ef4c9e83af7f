"""Tiny Chameleon folders as Meta, Anole and Lumina-mGPT publish them, with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, PreTrainedTokenizerFast

CODES = 16
PERMUTED = [(5 * k + 3) % CODES for k in range(CODES)]
"""Image code k is the PERMUTED[k]-th image token."""
FIRST_RESERVED, LAST_RESERVED = 8700, 8815


def vocabulary_map() -> dict[str, int]:
    """A vocabulary as Meta's: specials, image tokens (permuted), reserved tokens, bytes."""
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    image = [""] * CODES
    for code, place in enumerate(PERMUTED):
        letters = "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code))
        image[place] = f"IMGIMG{letters}Z"
    names += [*image, "<eoss>", "<racm3:break>"]
    names += [
        "<image>" if n == 8707 else f"<reserved{n:05d}>"
        for n in range(FIRST_RESERVED, LAST_RESERVED)
    ]
    names += sorted(pre_tokenizers.ByteLevel.alphabet())
    names += ["Ġa", "Ċa"]
    return {name: token for token, name in enumerate(names)}


NAMES = vocabulary_map()
CODE_IDS = [4 + place for place in PERMUTED]


def write_tokenizer(folder: Path, hub: bool = True) -> None:
    """Byte-level BPE with two merges, one of which joins a newline to what follows.

    The hub's folders say LlamaTokenizer, which transformers 5 takes for Llama's splitting of text.
    """
    tokenizer = Tokenizer(models.BPE(NAMES, [("Ġ", "a"), ("Ċ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [n for n in NAMES if n.startswith("<") and len(n) > 1]
    tokenizer.add_tokens([AddedToken(n, special=True, normalized=False) for n in special])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    if hub:
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text()) | {"tokenizer_class": "LlamaTokenizer"}
        file.write_text(json.dumps(settings))


def tiny(swin: bool = False, kv_heads: int = 4) -> ChameleonForConditionalGeneration:
    torch.manual_seed(0)
    config = ChameleonConfig(
        vocab_size=len(NAMES) + 5,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        swin_norm=swin,
        vocabulary_map=NAMES,
        vq_config={
            "embed_dim": 8,
            "num_embeddings": CODES,
            "latent_channels": 8,
            "resolution": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
        },
    )
    model = ChameleonForConditionalGeneration(config)
    for name, tensor in model.state_dict().items():
        if "norm" in name:  # fresh norms are ones and zeros, which hide a wrong order
            tensor.add_(0.3 * torch.randn_like(tensor))
    return model.eval()


def publish(folder: Path, model: ChameleonForConditionalGeneration | None = None) -> Path:
    """A folder as Meta's and Anole's on the hub."""
    (tiny() if model is None else model).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def publish_lumina(folder: Path, model: ChameleonForConditionalGeneration | None = None) -> Path:
    """A folder as Lumina-mGPT's: its own class in config.json, no image encoder in the weights."""
    publish(folder, model)
    change_config(
        folder,
        architectures=["ChameleonXLLMXForConditionalGeneration"],
        mask_image_logits=False,
        dropout=0.05,
        z_loss_weight=1e-5,
    )
    keep_tensors(folder, lambda name: not name.startswith("model.vqmodel."))
    return folder


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def keep_tensors(folder: Path, wanted: Any, **more: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if wanted(name)} | more
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
