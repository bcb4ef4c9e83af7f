"""The backbone that a run would start from, without its weights: for planning.

To be called where tensors have no memory (`FakeTensorMode`). Configs and text tokenizers are read,
weights are neither read nor drawn; `probes.check` has nothing to compare and lets it pass.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from arra.config import ModelConfig
from arra.files import read_json
from arra.models.base import Backbone, Grid
from arra.models.causal_lm import CausalLM, grow
from arra.models.families import family_of
from arra.models.folders import cast_weights, open_text_tokenizer
from arra.models.loading import PIPELINE, load_for_training, read_skeleton
from arra.resolve import resolve_folder

ASSUMED_CODES = 16384
"""Codes of LlamaGen's image tokenizers, where nothing says how many there are."""


def outline_for_training(
    spec: str | Path | None,
    config: ModelConfig,
    *,
    codebook_size: int | None,
    captions: Iterable[str],
    grid: Grid,
    class_names: Sequence[str],
    text_width: int,
    text_slots: int,
) -> Backbone:
    """What `load_for_training` would return.

    Args:
        codebook_size: K of the image tokenizer; None = whatever a painter was trained with.
        captions, grid, class_names, text_width, text_slots: as there.

    Raises:
        ValueError: a config or a text tokenizer is missing, or the codebook is another.
    """
    codebook_KC = torch.zeros(codebook_size or ASSUMED_CODES, 8)
    if spec is None:
        return load_for_training(
            None,
            config,
            codebook_KC=codebook_KC,
            captions=captions,
            seed=0,
            grid=grid,
            class_names=class_names,
            text_width=text_width,
            text_slots=text_slots,
        )
    if Path(spec).expanduser().is_file():
        raise ValueError(
            f"{spec} is a file, of which nothing is known without reading its weights: make a "
            f"folder of it with `arra convert`, and plan with that"
        )
    folder = resolve_folder(spec, "model", weights=False)
    ours = (folder / PIPELINE).is_file()
    inner = folder / "model" if ours else folder
    family = family_of(inner)
    if ours:
        _, tokenizer, layout, _ = read_skeleton(folder)
        backbone: Backbone = family.assemble(family.empty_model(inner), tokenizer, layout)
    elif family is not CausalLM:
        outlined = _without_weights(family)
        if config.format is not None:
            backbone = outlined.in_format(folder, config.format)
        else:
            backbone = outlined.as_published(folder)
    else:
        backbone = _grown(folder, config, codebook_KC)
    codes = len(backbone.layout.code_ids)
    if codebook_size is not None and codes != codebook_size:
        raise ValueError(
            f"{spec} paints with {codes} codes, the image tokenizer has {codebook_size}: use the "
            f"one that the model was trained with"
        )
    kept = stored_dtype(inner) if config.dtype == "auto" else torch.float32
    cast_weights(backbone.model, kept)
    backbone.set_attention(config.attention)
    return backbone


def stored_dtype(folder: Path) -> torch.dtype:
    """The type that a standard folder's config.json says its weights are stored in."""
    config = read_json(folder / "config.json")
    name = config.get("dtype", config.get("torch_dtype"))
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)


def _without_weights(family: type[Backbone]) -> type[Backbone]:
    """The family, but a folder opens as the architecture that its config.json describes."""

    def open_model(folder: Path) -> PreTrainedModel:
        return family.empty_model(folder)

    return type(f"Outlined{family.__name__}", (family,), {"open_model": staticmethod(open_model)})


def _grown(folder: Path, config: ModelConfig, codebook_KC: torch.Tensor) -> Backbone:
    try:
        model = CausalLM.empty_model(folder)
        tokenizer = open_text_tokenizer(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder} cannot be planned with: {reason}") from None
    return grow(
        model,
        tokenizer,
        len(codebook_KC),
        style=config.layout,
        rep=config.rep,
        codebook_KC=codebook_KC if config.new_rows == "codebook" else None,
    )
