"""What a stock text server (vLLM, SGLang) must find in a folder to paint with the model in it.

Such a server runs the model's own output table over the tokenizer's ids and nothing else: it can
paint with a model whose image codes are tokens of its tokenizer, and with no other.
"""

from collections.abc import Mapping
from pathlib import Path

from transformers import GenerationConfig

from arra.models.base import Backbone, Grid

MASKS_CODES_BEFORE = {"ChameleonForConditionalGeneration": (0, 29)}
"""Architecture -> the first vLLM that lets it paint. vLLM's own class sets the logits of image
codes to the lowest number (0.13.0, model_executor/models/chameleon.py, `compute_logits`), so that
every code is equally likely among the codes. It was taken out after 0.28 (0.32.0, registry.py,
`_PREVIOUSLY_SUPPORTED_MODELS`); since then transformers' own layers are run, with no such mask."""


def codes_are_tokens(backbone: Backbone) -> bool:
    """Whether image codes are tokens of the text tokenizer, told apart by the one output table."""
    shared = backbone.output_table is backbone.model.get_output_embeddings()
    return backbone.text_tokenizer is not None and shared


def save_for_servers(
    backbone: Backbone, folder: Path, grid: Grid, sampling: Mapping[str, float]
) -> None:
    """Writes what a server reads beside the weights in `folder`: the text tokenizer, and how to
    paint (generation_config.json).

    Servers take their defaults from there. A language model's own file may hold a repetition
    penalty or a top-k for writing (Qwen's have both), which would spoil pictures silently: it is
    replaced. Guidance is not in it, as no such server has any.
    """
    if not codes_are_tokens(backbone):
        return
    assert backbone.text_tokenizer is not None
    backbone.text_tokenizer.save_pretrained(folder)
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
