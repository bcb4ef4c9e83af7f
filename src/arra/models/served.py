"""What a stock text server (vLLM, SGLang) must find in a folder to paint with the model in it.

Such a server runs the model's own output table over the tokenizer's ids and nothing else: it can
paint with a model whose image codes are tokens of its tokenizer, and with no other.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from arra.models.base import Backbone, Grid

MASKS_CODES_BEFORE = {"ChameleonForConditionalGeneration": (0, 29)}
"""Architecture -> the first vLLM that lets it paint. vLLM's own class sets the logits of image
codes to the lowest number (0.13.0, model_executor/models/chameleon.py, `compute_logits`), so that
every code is equally likely among the codes. It was taken out after 0.28 (0.32.0, registry.py,
`_PREVIOUSLY_SUPPORTED_MODELS`); since then transformers' own layers are run, with no such mask."""


UNUSED_PARTS = "parts_not_stored.safetensors"
"""Zeros for parts of the architecture that the model does not have (Lumina-mGPT was published
without its image encoder). Painting never reads them, but vLLM opens no folder that lacks tensors
of the class it makes. It reads every *.safetensors beside a model.safetensors; transformers and
this package read that one only."""


def codes_are_tokens(backbone: Backbone) -> bool:
    """Whether image codes are tokens of the text tokenizer, told apart by the one output table."""
    shared = backbone.output_table is backbone.model.get_output_embeddings()
    return backbone.text_tokenizer is not None and shared


def save_for_servers(
    backbone: Backbone, folder: Path, grid: Grid, sampling: Mapping[str, float]
) -> None:
    """Writes what a server reads beside the weights in `folder`: the text tokenizer, how to paint
    (generation_config.json), and `UNUSED_PARTS` where it takes them.

    Servers take their defaults from there. A language model's own file may hold a repetition
    penalty or a top-k for writing (Qwen's have both), which would spoil pictures silently: it is
    replaced. Guidance is not in it, as no such server has any.
    """
    if not codes_are_tokens(backbone):
        return
    assert backbone.text_tokenizer is not None
    backbone.text_tokenizer.save_pretrained(folder)
    absent = _absent(backbone.model)
    if absent:
        save_file(absent, folder / UNUSED_PARTS, {"format": "pt"})
    layout = backbone.layout
    GenerationConfig(
        bos_token_id=backbone.text_tokenizer.bos_token_id,
        pad_token_id=layout.pad,
        eos_token_id=layout.end,  # a picture without an end token ends by its length
        max_new_tokens=layout.image_length(*grid),
        do_sample=sampling["temperature"] > 0,
        temperature=sampling["temperature"] or 1.0,
        top_k=int(sampling["top_k"]),
        top_p=sampling["top_p"],
    ).save_pretrained(folder)


def _absent(model: PreTrainedModel) -> dict[str, Tensor]:
    """Zeros for the tensors of the model's class that the model itself does not have."""
    with torch.device("meta"):
        whole = type(model)(model.config).state_dict()
    present = model.state_dict()
    return {
        name: torch.zeros(tensor.shape, dtype=model.dtype)
        for name, tensor in whole.items()
        if name not in present
    }
