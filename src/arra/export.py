"""From a run to an ordinary checkpoint of its own architecture: nothing of ARRA remains in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors.torch import save_file

from arra.files import atomic_dir, read_json, write_json
from arra.image_tokenizers import load_image_tokenizer
from arra.model_card import Exported, model_card
from arra.models.adapted import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BaseRecord
from arra.models.folders import open_text_tokenizer, without_progress_bar
from arra.models.loading import PIPELINE, load_checkpoint, weights_of
from arra.models.run_folder import latest_checkpoint, read_part, read_state
from arra.models.served import save_for_servers
from arra.teachers import recorded


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's painter as standard folders (model, tokenizer, image tokenizer) with a model
    card, README.md."""

    run: Annotated[str, tyro.conf.Positional]
    """The run folder."""
    out: str
    """The new folder."""
    weights: Literal["raw", "ema"] = "raw"
    """Which weights: those of the last step or their moving average."""
    adapter_only: bool = False
    """Write the adapter as a peft folder that points to its base, instead of a merged model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the stored weights."""


def export(config: ExportConfig) -> Path:
    """Writes `out/{model,tokenizer,image_tokenizer,pipeline.json,README.md}`; returns `out`.

    `out/model` opens with transformers' own classes, without this package, and stock servers that
    know its architecture open it as it is (docs/stock-servers.md).
    """
    run = Path(config.run)
    if not (run / PIPELINE).is_file():
        raise ValueError(f"{run} is no run folder: it has no {PIPELINE}")
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise ValueError(f"{run} has no finished checkpoint yet")
    pipeline = read_json(run / PIPELINE)
    adapted = pipeline.pop("adapter", None)
    if config.adapter_only:
        return _export_adapter(config, checkpoint, adapted, pipeline)
    backbone = load_checkpoint(run, checkpoint, config.weights)
    if adapted is not None:
        print("merged the adapter into its base: what is written is a plain model")
    tokenizer = load_image_tokenizer(pipeline["image_tokenizer"]["spec"])
    if tokenizer.fingerprint != pipeline["image_tokenizer"]["fingerprint"]:
        raise ValueError(
            f"{pipeline['image_tokenizer']['spec']} is no longer the image tokenizer that {run} "
            f"was trained with: put the original back in its place"
        )
    out = Path(config.out)
    with atomic_dir(out) as temporary, without_progress_bar():
        _write_card(config, checkpoint, pipeline, temporary)
        backbone.model.to(getattr(torch, config.dtype)).save_pretrained(temporary / "model")
        height, width = pipeline["grid"]
        save_for_servers(backbone, temporary / "model", (height, width), pipeline["sampling"])
        if (run / "tokenizer").is_dir():
            open_text_tokenizer(run / "tokenizer").save_pretrained(temporary / "tokenizer")
        tokenizer.save_pretrained(temporary / "image_tokenizer")
        written = read_json(run / "config.json")
        origin = {
            "recipe": written["recipe"],
            "objective": written["objective"],
            "step": read_state(checkpoint)["step"],
            "weights": config.weights,
            "alignment": written["align"],
            "teachers": recorded(run),
            **({} if adapted is None else {"adapter": written["lora"]}),
        }
        pipeline["image_tokenizer"]["spec"] = "image_tokenizer"
        write_json(temporary / PIPELINE, {**pipeline, "origin": origin})
    return out


def _write_card(
    config: ExportConfig, checkpoint: Path, pipeline: Mapping[str, Any], folder: Path
) -> None:
    step = read_state(checkpoint)["step"]
    exported = Exported(
        Path(config.run), step, config.weights, config.dtype, pipeline, config.adapter_only
    )
    text = model_card(exported, Path(config.out).name)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _export_adapter(
    config: ExportConfig,
    checkpoint: Path,
    adapted: dict[str, Any] | None,
    pipeline: Mapping[str, Any],
) -> Path:
    run, out = Path(config.run), Path(config.out)
    if adapted is None:
        raise ValueError(f"{run} trained the whole model: there is no adapter to write")
    tensors = read_part(weights_of(checkpoint, config.weights))
    described = read_json(checkpoint / ADAPTER_CONFIG)
    described["base_model_name_or_path"] = BaseRecord(**adapted).name(run)
    with atomic_dir(out) as temporary:
        _write_card(config, checkpoint, pipeline, temporary)
        write_json(temporary / ADAPTER_CONFIG, described)
        save_file(tensors, temporary / ADAPTER_WEIGHTS, {"format": "pt"})
    return out
