"""From a whole backbone to one of which only an adapter trains (LoRA, QLoRA).

Trained: a low-rank adapter on the linear layers of the decoder blocks, the rows of image tokens in
the input and output tables (or the family's own tables of codes), and the projectors. The frozen
base is written once, as RUN/base, unless it is a folder that a user already has.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from arra.config import LoraConfig, TrainConfig
from arra.files import atomic_dir, read_json
from arra.models.adapted import (
    OWN_BASE,
    Adapter,
    BaseRecord,
    import_peft,
    put_on,
    task_type,
)
from arra.models.base import Backbone
from arra.models.folders import cast_weights, without_progress_bar
from arra.models.four_bits import Compute, linear_layers, quantize, require_bitsandbytes
from arra.models.loading import PIPELINE, read_skeleton
from arra.models.run_folder import latest_checkpoint
from arra.resolve import resolve_folder
from arra.train.world import World


@dataclass
class Opened:
    """What a run trains: a backbone, whole or by an adapter around it, whose base is on record."""

    backbone: Backbone
    adapter: Adapter | None = None
    base: BaseRecord | None = None


def adapted_backbone(
    config: TrainConfig, run: Path, world: World, load: Callable[[], Backbone]
) -> Opened:
    """The backbone that an adapter run trains, its base read from where a resume will read it.

    Args:
        world: the processes that call this; on its device 4-bit layers are made. The caller moves
            what is not quantised.
        load: the backbone as a full run would start from it; called only when the run is new.

    Raises:
        ValueError: a library is missing, the base is gone, or a name in --lora.targets fits none.
    """
    import_peft()
    if config.lora.quantize != "none":
        require_bitsandbytes("--lora.quantize 4bit")
    if world.on_main((run / PIPELINE).is_file):
        family, tokenizer, layout, record = read_skeleton(run)
        assert record is not None, "the run was begun with an adapter"
    else:
        backbone = load()
        family, tokenizer, layout = type(backbone), backbone.text_tokenizer, backbone.layout
        record = world.on_main(lambda: _record(config, run, backbone))
        del backbone
    whole = family.assemble(family.open_model(record.folder(run)), tokenizer, layout)
    whole.set_attention(config.model.attention)
    if record.four_bits is not None:
        quantize(whole, record.four_bits, world.device)
    if config.model.dtype == "float32":
        cast_weights(whole.model, torch.float32)
    adapted, adapter = put_on(whole, peft_config(whole, config.lora), config.seed)
    moving = sum(t.numel() for t in adapter.tensors.values())
    where = record.name(run)
    if world.is_main:
        print(f"adapter of rank {config.lora.rank}: {moving:,} parameters train, base {where}")
    return Opened(adapted, adapter, record)


def peft_config(backbone: Backbone, config: LoraConfig) -> Any:
    """peft's LoraConfig for a backbone, its modules named relative to the backbone's model.

    Raises:
        ValueError: a name in --lora.targets fits no linear layer of the blocks.
    """
    peft = import_peft()
    model = backbone.model
    names = {id(module): name for name, module in model.named_modules()}
    linears = linear_layers(backbone)
    short = sorted({name.rpartition(".")[2] for name in linears})
    unknown = [target for target in config.targets if target not in short]
    if unknown:
        raise ValueError(
            f"--lora.targets {unknown[0]}: the blocks have no such linear layer, only "
            f"{', '.join(short)}"
        )
    wanted = [n for n in linears if not config.targets or n.rpartition(".")[2] in config.targets]
    transposed = {isinstance(linears[name], Conv1D) for name in wanted}
    if len(transposed) > 1:
        raise ValueError("--lora.targets mixes layers that peft cannot adapt together")
    rows = backbone.image_rows()
    tables: dict[int, nn.Module] = {}
    if rows:
        # Tied tables are one parameter: peft carries the rows of the first over to the second.
        for table in (model.get_input_embeddings(), backbone.output_table):
            tables.setdefault(id(table.weight), table)
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or 2 * config.rank,
        lora_dropout=config.dropout,
        target_modules=wanted,
        fan_in_fan_out=transposed == {True},
        trainable_token_indices={names[id(t)]: rows for t in tables.values()} or None,
        modules_to_save=[names[id(m)] for m in backbone.image_tables()] or None,
        task_type=task_type(model),
    )


# ---- the frozen base -----------------------------------------------------------------------------


def _record(config: TrainConfig, run: Path, backbone: Backbone) -> BaseRecord:
    """Finds or writes the base of a new run."""
    assert config.model_path is not None, "checked by the config"
    base = _standing(config.model_path, backbone.model)
    if base is None:
        base = OWN_BASE
        if not (run / OWN_BASE).exists():  # a run killed here has written the same
            _write_base(run / OWN_BASE, config.model_path, backbone)
    four_bits: Compute = "float32" if config.dtype == "float32" else "bfloat16"
    return BaseRecord(base, four_bits if config.lora.quantize == "4bit" else None)


def _standing(spec: str, model: PreTrainedModel) -> str | None:
    """The place, if any, that already holds exactly these weights as a standard folder."""
    if Path(spec).expanduser().is_file():
        return None  # in a layout of its own
    folder = resolve_folder(spec, "model")
    if (folder / PIPELINE).is_file():
        inner = folder / "model"
        named = latest_checkpoint(folder) is None and Path(spec).expanduser().is_dir()
        return str(inner.resolve()) if named and _holds(inner, model) else None
    if not _holds(folder, model):
        return None
    return str(folder.resolve()) if Path(spec).expanduser().is_dir() else spec


def _holds(folder: Path, model: PreTrainedModel) -> bool:
    """Whether `folder` holds every parameter of `model`, value by value, and its classes' names.

    A dataset may have named the classes: the base must know what its prompts were called.
    """
    if type(model.config).from_pretrained(folder).id2label != model.config.id2label:
        return False
    wanted = dict(model.named_parameters())
    found = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            names = list(stored.keys())
            for name in names:
                parameter = wanted.get(name)
                if parameter is None:
                    continue
                if not torch.equal(stored.get_tensor(name).to(parameter.dtype), parameter.cpu()):
                    return False
                found.add(name)
    return found == set(wanted)


def _write_base(folder: Path, spec: str, backbone: Backbone) -> None:
    """Writes the grown model and its tokenizer in the precision that the start was stored in.

    New rows are rounded by that; they are read back from here, also by this very run.
    """
    cast_weights(backbone.model, _stored_dtype(spec))
    with atomic_dir(folder) as temporary, without_progress_bar():
        backbone.model.save_pretrained(temporary)
        if backbone.text_tokenizer is not None:
            backbone.text_tokenizer.save_pretrained(temporary)


def _stored_dtype(spec: str) -> torch.dtype:
    if Path(spec).expanduser().is_file():
        return torch.float32
    folder = resolve_folder(spec, "model")
    folder = folder / "model" if (folder / PIPELINE).is_file() else folder
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    stored = str(config.get("dtype", config.get("torch_dtype")))
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(stored, torch.float32)
