"""From a name to a backbone: a fresh small model, a language model to grow, a finished painter."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from arra.config import ModelConfig
from arra.files import read_json, write_json
from arra.foreign import read_foreign
from arra.layout import Layout
from arra.models.adapted import BaseRecord, load_merged
from arra.models.base import Backbone, Grid
from arra.models.causal_lm import CausalLM, grow
from arra.models.families import family_named, family_of, open_foreign
from arra.models.folders import cast_weights, open_text_tokenizer
from arra.models.probes import check
from arra.models.quantized import Quantization, quantize_weights
from arra.models.run_folder import (
    latest_checkpoint,
    load_part,
    own_tensors,
    read_part,
    read_state,
    weights_folder,
)
from arra.resolve import resolve_folder

PIPELINE = "pipeline.json"

Precision = Literal["auto", "float32", "bfloat16"]
"""Type of a model's weights; auto = as they are stored, but float32 for float16 on a CPU."""


def load_model(
    spec: str | Path,
    device: str | torch.device = "cpu",
    *,
    dtype: Precision = "auto",
    published_format: str | None = None,
    quantization: Quantization = "off",
) -> Backbone:
    """A model that can paint: an exported folder, a run folder, a checkpoint in its family's own
    published format (a folder, or a file such as c2i_B_256.pt), or `builtin:scenes`.

    Memory: one times the files' size in the checkpoint's own type ("auto"), besides pages of the
    files that the system drops when it needs room; docs/chameleon.md has measurements.

    Args:
        dtype: type of the weights; "auto" = the one they are stored in, but for float16 on a CPU,
            which computes it at a third of float32's speed.
        published_format: where a family has several and the files do not tell which.
        quantization: smaller weights, for painting only (docs/smaller-weights.md).

    Raises:
        ValueError: a model that was never taught to paint, a missing file, a failed probe, layers
            that cannot be made smaller.
    """
    backbone = open_unchecked(spec, published_format)
    reason = backbone.cannot_paint()
    if reason is not None:
        raise ValueError(
            f"{spec} was never taught to paint: {reason}; teach it with `arra train adapt --model "
            f"{spec} --model.reset-image-head`"
        )
    on_cpu = torch.device(device).type == "cpu"
    if dtype == "auto" and on_cpu and backbone.model.dtype == torch.float16:
        dtype = "float32"
    if dtype != "auto":
        cast_weights(backbone.model, getattr(torch, dtype))
    quantize_weights(backbone, quantization, device)
    check(backbone)
    return backbone


def open_unchecked(spec: str | Path, published_format: str | None) -> Backbone:
    folder = model_place(spec)
    told = folder.is_file() or (folder / PIPELINE).is_file()
    if told and published_format is not None:
        raise ValueError(f"{spec} says its format itself: leave out {published_format!r}")
    if folder.is_file():
        backbone = open_foreign(read_foreign(folder))
    elif told:
        backbone = _ours(folder)
    elif published_format is not None:
        backbone = family_of(folder).in_format(folder, published_format)
    else:
        backbone = family_of(folder).as_published(folder)
    backbone.model.eval()
    return backbone


def _ours(folder: Path) -> Backbone:
    """The painter in a folder that this package wrote: an export or a run."""
    checkpoint = latest_checkpoint(folder)
    if (folder / "checkpoints").is_dir() and checkpoint is None:
        raise ValueError(f"{folder} has no finished checkpoint yet")
    if checkpoint is not None:
        return load_checkpoint(folder, checkpoint)
    family, tokenizer, layout, _ = read_skeleton(folder)
    return family.assemble(family.open_model(folder / "model"), tokenizer, layout)


class Skeleton(NamedTuple):
    """What a folder of ours says of a painter besides its weights and its config."""

    family: type[Backbone]
    text_tokenizer: PreTrainedTokenizerBase | None
    layout: Layout
    base: BaseRecord | None  # of an adapter


def read_skeleton(folder: Path) -> Skeleton:
    """The inverse of `save_skeleton`.

    Raises:
        ValueError, OSError: a file is missing or damaged.
    """
    described = read_json(folder / PIPELINE)
    texts, adapted = folder / "tokenizer", described.get("adapter")
    return Skeleton(
        family_of(folder / "model"),
        open_text_tokenizer(texts) if texts.is_dir() else None,
        Layout.from_json(described["layout"]),
        None if adapted is None else BaseRecord(**adapted),
    )


def load_checkpoint(
    run: Path, checkpoint: Path, weights: Literal["best", "raw", "ema"] = "best"
) -> Backbone:
    """The painter of one checkpoint of a run; an adapter is merged into its base.

    Args:
        weights: raw = those of that step, ema = their moving average, best = the latter where a
            run keeps one.

    Raises:
        ValueError: no averaged weights were kept, or a file is missing, damaged or does not fit.
    """
    part = weights_of(checkpoint, weights)
    family, tokenizer, layout, record = read_skeleton(run)
    if record is not None:
        return load_merged(family, run, record, read_part(part), checkpoint, tokenizer, layout)
    model = family.empty_model(run / "model")
    load_part(part, own_tensors(model))
    return family.assemble(model, tokenizer, layout)


def weights_of(checkpoint: Path, weights: Literal["best", "raw", "ema"]) -> Path:
    """The part of a checkpoint that holds these weights; best = the average, where there is one.

    Raises:
        ValueError: no averaged weights were kept, or the checkpoint is not whole.
    """
    averaged = any(name.startswith("ema/") for name in read_state(checkpoint)["sha256"])
    if weights == "ema" and not averaged:
        run = checkpoint.parent.parent
        raise ValueError(f"{run} kept no averaged weights (--optim.ema 0): use --weights raw")
    raw = weights == "raw" or not averaged
    return weights_folder(checkpoint) if raw else checkpoint / "ema"


def model_place(spec: str | Path) -> Path:
    """The checkpoint file, or the folder, that is meant."""
    path = Path(spec).expanduser()
    return path if path.is_file() else resolve_folder(spec, "model")


def paints(spec: str | Path) -> bool:
    """Whether this is a painter, ours or a published one; else it is a language model to grow."""
    folder = model_place(spec)
    return folder.is_file() or (folder / PIPELINE).is_file() or family_of(folder) is not CausalLM


def load_for_training(
    spec: str | Path | None,
    config: ModelConfig,
    *,
    codebook_KC: torch.Tensor,
    captions: Iterable[str],
    seed: int,
    grid: Grid | None = None,
    class_names: Sequence[str] = (),
    text_width: int = 0,
    text_slots: int = 120,
) -> Backbone:
    """The backbone that a run starts from.

    Args:
        spec: a painter to go on with, a causal language model to grow, or None for a fresh model.
        codebook_KC: the image tokenizer's codebook: its length is K.
        captions: text that a fresh model's byte-level BPE is fitted on.
        grid: of the dataset's images, for a fresh model of a family whose positions know it.
        class_names: of the dataset, if it has any: the prompts of a fresh class-conditional model.
        text_width: of the dataset's features of captions, if it has any: the prompts likewise.
        text_slots: the most tokens that they have.
    """
    if spec is None:
        torch.manual_seed(seed)
        text_shape = (text_width, text_slots)
        backbone = _fresh(config, codebook_KC, captions, seed, grid, class_names, text_shape)
    else:
        backbone = _backbone(spec, config, codebook_KC, seed)
        backbone.name_classes(class_names)
    if config.dtype != "auto":
        cast_weights(backbone.model, getattr(torch, config.dtype))
    backbone.set_attention(config.attention)
    return backbone


def _backbone(
    spec: str | Path, config: ModelConfig, codebook_KC: torch.Tensor, seed: int
) -> Backbone:
    folder = model_place(spec)
    if paints(spec):
        backbone = open_unchecked(spec, config.format)
        if len(backbone.layout.code_ids) != len(codebook_KC):
            raise ValueError(
                f"{spec} paints with {len(backbone.layout.code_ids)} codes, the image tokenizer "
                f"has {len(codebook_KC)}: use the one that the model was trained with"
            )
        _prepare_image_head(backbone, str(spec), config, codebook_KC, seed)
        check(backbone)
        return backbone
    _refuse_published_options(config)
    try:
        model = CausalLM.open_model(folder)
        tokenizer = open_text_tokenizer(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{spec} cannot be loaded as a causal language model: {reason}") from None
    return _grown(model, tokenizer, config, codebook_KC, seed)


def _refuse_published_options(config: ModelConfig) -> None:
    if config.reset_image_head or config.format is not None:
        flag = "--model.reset-image-head" if config.reset_image_head else "--model.format"
        raise ValueError(
            f"{flag} is for a published model that paints: this one starts its image rows anew and "
            f"takes its format from --model.layout"
        )


def _prepare_image_head(
    backbone: Backbone, spec: str, config: ModelConfig, codebook_KC: torch.Tensor, seed: int
) -> None:
    """Resets the output rows of the codes if asked, and only then."""
    if config.reset_image_head:
        backbone.reset_image_head(codebook_KC if config.new_rows == "codebook" else None, seed)
        return
    reason = backbone.cannot_paint()
    if reason is not None:
        raise ValueError(
            f"{spec} was never taught to paint: {reason}; start them anew with "
            f"--model.reset-image-head"
        )


def _fresh(
    config: ModelConfig,
    codebook_KC: torch.Tensor,
    captions: Iterable[str],
    seed: int,
    grid: Grid | None,
    class_names: Sequence[str],
    text_shape: tuple[int, int],
) -> Backbone:
    _refuse_published_options(config)
    architecture = config.architecture
    if architecture == "auto":
        architecture = "llamagen" if class_names or text_shape[0] else "llama"
    elif config.dropout and family_named(architecture) is CausalLM:
        raise ValueError(f"--model.dropout: a fresh {architecture} has none, leave it out")
    family = family_named(architecture)
    if family is not CausalLM:
        if grid is None:
            raise ValueError(f"a fresh {architecture} must know the image's size in codes")
        backbone = family.fresh(config, len(codebook_KC), grid, class_names, *text_shape)
        check(backbone)
        return backbone
    tokenizer = fit_text_tokenizer(captions, config.text_vocabulary)
    hf_config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.mlp_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        head_dim=config.hidden_size // config.heads,  # some architectures have a width of their own
        max_position_embeddings=config.max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(hf_config)
    return _grown(model, tokenizer, config, codebook_KC, seed)


def _grown(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: ModelConfig,
    codebook_KC: torch.Tensor,
    seed: int,
) -> Backbone:
    backbone = grow(
        model,  # type: ignore[arg-type]
        tokenizer,
        len(codebook_KC),
        style=config.layout,
        rep=config.rep,
        codebook_KC=codebook_KC if config.new_rows == "codebook" else None,
        seed=seed,
    )
    check(backbone)
    return backbone


def fit_text_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text can be written, and fitting is deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|pad|>", "<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
    )


def save_skeleton(
    backbone: Backbone,
    folder: Path,
    *,
    grid: tuple[int, int],
    image_tokenizer: str,
    fingerprint: str,
    trained_vocabulary: str,
    adapter: dict[str, Any] | None = None,
    text_encoder: dict[str, Any] | None = None,
) -> None:
    """Writes all that a painter is but its weights: config, tokenizer, layout, sampling.

    Args:
        adapter: the record of an adapter's frozen base, if only an adapter trains.
        text_encoder: its spec, length and fingerprint, if prompts are its features.
    """
    backbone.model.config.save_pretrained(folder / "model")
    if backbone.model.can_generate() and backbone.model.generation_config is not None:
        backbone.model.generation_config.save_pretrained(folder / "model")
    if backbone.text_tokenizer is not None:
        backbone.text_tokenizer.save_pretrained(folder / "tokenizer")
    write_json(
        folder / PIPELINE,
        {
            "format_version": 1,
            "layout": backbone.layout.to_json(),
            "grid": list(grid),
            "image_tokenizer": {"spec": image_tokenizer, "fingerprint": fingerprint},
            "trained_vocabulary": trained_vocabulary,
            "sampling": dict(backbone.sampling),
            **({} if adapter is None else {"adapter": adapter}),
            **({} if text_encoder is None else {"text_encoder": text_encoder}),
        },
    )
