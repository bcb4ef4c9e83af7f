"""LlamaGen's own checkpoint files: c2i_B/L/XL/XXL/3B (256, 384) and t2i_XL (stage 1, 2).

Layout read from FoundationVision/LlamaGen ce98ec4, autoregressive/models/gpt.py and what saves and
loads it (autoregressive/train/train_c2i.py, train_c2i_fsdp.py, train_t2i.py;
autoregressive/sample/sample_c2i.py, sample_t2i.py). Names and shapes are those of our model, so
tensors are taken over as they are: same memory, same type, and the same bytes when written again.

The shapes do not say everything: heads follow from the published sizes, the image's side from what
lies beside the tensors or from the file's name.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from arra.models.llamagen_layers import LlamaGenConfig
from arra.models.llamagen_model import LlamaGenForImageGeneration

HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 2560: 40, 3200: 32, 4096: 32}
"""Model width -> attention heads, of every size in gpt.py (GPT_models)."""

UNUSED = re.compile(r"freqs_cis|causal_mask|layers\.\d+\.attention\.kv_cache\.[kv]_cache")
"""Tables that the original computes anew, and caches of a model that was saved after painting."""

NAMED_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")
DOWNSAMPLING = 16
"""Pixels per code of vq_ds16, the tokenizer of all published checkpoints."""


def recognise(names: Collection[str]) -> bool:
    """Whether tensors of these names are a LlamaGen transformer."""
    return any(name.startswith("cls_embedding.") for name in names) and any(
        re.fullmatch(r"layers\.\d+\.attention\.wqkv\.weight", name) for name in names
    )


def from_original(
    tensors: Mapping[str, Tensor], beside: Mapping[str, Any], file_name: str = ""
) -> LlamaGenForImageGeneration:
    """The model in a checkpoint, which keeps the tensors themselves (mapped ones stay mapped).

    Args:
        beside: plain values beside the tensors; of `args`, as train_c2i.py saves them, these are
            read: image_size, downsample_size, dropout_p, token_dropout_p, drop_path_rate, and
            n_head for sizes that were not published.
        file_name: "c2i_B_256.pt" says 256 pixels.

    Raises:
        ValueError: a tensor is missing, unknown or misshapen, or the image's size is nowhere.
    """
    source = file_name or "LlamaGen's checkpoint"
    kept = {name: tensor for name, tensor in tensors.items() if not UNUSED.fullmatch(name)}
    shapes = {name: tuple(tensor.shape) for name, tensor in kept.items()}
    arguments = beside.get("args")
    settings = {**beside, **(arguments if isinstance(arguments, Mapping) else {})}
    config = _config(shapes, settings, tensors.get("freqs_cis"), file_name, source)
    with torch.device("meta"):
        model = LlamaGenForImageGeneration(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            wanted, found = expected.get(name, "nothing"), shapes.get(name, "nothing")
            raise ValueError(
                f"{source} is LlamaGen's, but not whole: expected {wanted} as {name}, found {found}"
            )
    model.load_state_dict(kept, assign=True)
    return model.eval()


def to_original(model: LlamaGenForImageGeneration) -> dict[str, Tensor]:
    """The state dict that LlamaGen's scripts load strictly, as {"model": it}.

    Raises:
        ValueError: the original cannot build such a model.
    """
    config = model.config
    if config.grid_height != config.grid_width:
        raise ValueError(
            f"LlamaGen's own code paints squares, this model {config.grid_height}x"
            f"{config.grid_width} codes: it has no original layout"
        )
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _config(
    shapes: Mapping[str, tuple[int, ...]],
    settings: Mapping[str, Any],
    freqs_cis: Tensor | None,
    file_name: str,
    source: str,
) -> LlamaGenConfig:
    def shape(name: str, axes: int) -> tuple[int, ...]:
        found = shapes.get(name, ())
        if len(found) != axes:
            wanted = f"{axes} axes of {name}"
            raise ValueError(f"{source} is LlamaGen's, but not whole: expected {wanted}")
        return found

    codes, width = shape("tok_embeddings.weight", 2)
    layers = [int(name.split(".")[1]) for name in shapes if name.startswith("layers.")]
    heads = int(settings.get("n_head", HEADS.get(width, 0)))
    if heads < 1 or width % heads:
        raise ValueError(
            f"{source}: no published LlamaGen has width {width}, so its number of heads is not "
            f"known: put n_head into the file's args"
        )
    key_rows = shape("layers.0.attention.wqkv.weight", 2)[0] - width
    table = "cls_embedding.embedding_table.weight"
    by_class = table in shapes
    classes = shape(table, 2)[0] - 1 if by_class else 0
    slots, features = (0, 0) if by_class else shape("cls_embedding.uncond_embedding", 2)
    side = _side(settings, freqs_cis, 1 if by_class else slots, file_name, source)
    config = LlamaGenConfig(
        vocab_size=codes,
        hidden_size=width,
        intermediate_size=shape("layers.0.feed_forward.w1.weight", 2)[0],
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=heads,
        num_key_value_heads=key_rows * heads // (2 * width),
        grid_height=side,
        grid_width=side,
        condition="class" if by_class else "text",
        token_dropout=float(settings.get("token_dropout_p", 0.1)),
        drop_path=float(settings.get("drop_path_rate", 0.0)),
    )
    # as train_c2i.py sets them: with drop path, the blocks' own dropouts are off
    inside = 0.0 if config.drop_path > 0 else float(settings.get("dropout_p", 0.1))
    config.residual_dropout = config.mlp_dropout = inside
    if by_class:
        config.num_classes, config.id2label = classes, {i: str(i) for i in range(classes)}
    else:
        config.text_slots, config.caption_dim = slots, features
    return config


def _side(
    settings: Mapping[str, Any],
    freqs_cis: Tensor | None,
    prefix: int,
    file_name: str,
    source: str,
) -> int:
    """Codes per side of the image."""
    if freqs_cis is not None:
        return round((len(freqs_cis) - prefix) ** 0.5)
    if "image_size" in settings:
        return int(settings["image_size"]) // int(settings.get("downsample_size", DOWNSAMPLING))
    numbers = [int(n) for n in NAMED_NUMBER.findall(file_name.replace("_", " "))]
    named = [n for n in numbers if n % DOWNSAMPLING == 0 and 32 <= n <= 1024]
    if not named:
        raise ValueError(
            f"{source} does not say how large its images are, and no tensor shows it: name the "
            f"file as it is published, with the pixels at the end (c2i_B_256.pt)"
        )
    return named[-1] // DOWNSAMPLING
