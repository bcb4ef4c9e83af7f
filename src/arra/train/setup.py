"""From a config to everything that the loop holds: data, backbone, objective, optimizer."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arra.batch import LOOKING_AHEAD
from arra.config import TrainConfig
from arra.data.loader import Loader, MicroBatch
from arra.data.manifest import Manifest, read_manifest
from arra.data.shards import Dataset
from arra.data.split import Split
from arra.data.targets import TargetValues
from arra.data.views import common_grid
from arra.device import cpu_has_bfloat16
from arra.files import read_json
from arra.image_tokenizers import load_image_tokenizer
from arra.models.adapted import Adapter
from arra.models.base import Backbone
from arra.models.loading import (
    PIPELINE,
    load_for_training,
    save_skeleton,
)
from arra.objective import Objective, Terms
from arra.resolve import resolve_folder
from arra.train.adapters import Opened, adapted_backbone
from arra.train.alignment import objective_of, online_targets, target_names
from arra.train.blocks import engage
from arra.train.contrast import (
    ContrastiveStep,
    check_contrast,
    contrastive_step,
    without_guidance,
)
from arra.train.first_weights import FirstWeights, open_on_main
from arra.train.guard import Guard
from arra.train.optim import Average, build_optimizer
from arra.train.parallel import Engine, after_wrapping, engine_of, is_sharded
from arra.train.signs import Signs
from arra.train.splits import open_splits
from arra.train.state import State, trained_tensors
from arra.train.world import World


class Step(nn.Module):
    """Backbone and objective as the one module that a parallel engine or a compiler wraps."""

    more_blocks: Sequence[nn.Module] = ()  # beside the backbone's
    used: Sequence[nn.Parameter] = ()  # frozen ones that a forward pass needs
    frozen: Sequence[Tensor] = ()  # all that lies beside the model

    def __init__(self, backbone: Backbone, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = backbone.model, objective
        self._backbone = backbone

    def counts(self, micro: MicroBatch) -> dict[str, int]:
        """How many things each term of a micro-batch averages over."""
        return self.objective.counts(micro.batch)

    def forward(self, micro: MicroBatch, factor: float) -> Terms:
        """The terms of one micro-batch; `factor` scales every lambda at this step."""
        layers = self.objective.layers if factor > 0 else ()
        with self._backbone.tap(layers) as taps:
            last_BTD = self._backbone.last_hidden(micro.batch.ids_BT, micro.text)
        return self.objective(
            taps, last_BTD, self._backbone.head, micro.batch, micro.features, factor
        )


@dataclass
class Run:
    """What the loop holds."""

    config: TrainConfig
    folder: Path
    world: World
    backbone: Backbone
    step: Step | ContrastiveStep
    engine: Engine
    guard: Guard
    state: State
    loader: Loader
    validation: Loader | None
    tokenizer_spec: str
    signs: Signs = field(default_factory=Signs)


def set_up(config: TrainConfig, folder: Path, world: World) -> Run:
    """Loads or builds all that the loop needs; process 0 writes what a painter is but its weights.

    Raises:
        ValueError: data, image tokenizer, features and model do not fit one another.
    """
    device = world.device
    if config.dtype == "bfloat16" and device.type == "cpu" and not cpu_has_bfloat16():
        raise ValueError("this CPU has no bfloat16 instructions: use --dtype float32")
    manifest = read_manifest(config.data_folder)
    names, online = target_names(config, list(manifest.aligned()))
    dataset, held_out = open_splits(config, names)
    if config.objective == "cca":
        check_contrast(config, [dataset, *([held_out] if held_out else [])])
    spec = config.image_tokenizer or manifest.tokenizer.spec
    tokenizer = load_image_tokenizer(spec)
    if tokenizer.fingerprint != manifest.tokenizer.fingerprint:
        raise ValueError(
            f"the dataset's codes were made by another image tokenizer than {spec}: pass the "
            f"right one as --image-tokenizer, or prepare the data again"
        )
    codebook_KC = tokenizer.codebook.detach()

    def describe(found: Opened) -> None:
        if (folder / PIPELINE).exists():
            return
        if config.objective == "cca":
            without_guidance(found.backbone)
        save_skeleton(
            found.backbone,
            folder,
            grid=common_grid(dataset.first.grids),
            image_tokenizer=spec,
            fingerprint=tokenizer.fingerprint,
            trained_vocabulary=config.loss.vocab,
            adapter=asdict(found.base) if found.base else None,
            text_encoder=_text_encoder(config, found.backbone, manifest),
        )

    first = None
    if is_sharded(config, world):
        # The types that a run keeps its weights in are set where they arrive.
        stored = config if config.lora.rank else _as_stored(config)
        load = partial(_opened, stored, folder, World(device), codebook_KC, dataset)
        opened, first = open_on_main(config, folder, world, load, describe)
    else:
        opened = _opened(config, folder, world, codebook_KC, dataset)
        world.on_main(lambda: describe(opened))
    if opened.backbone.model.dtype == torch.bfloat16 and config.dtype == "float32":
        raise ValueError(
            "--model.dtype auto keeps the checkpoint's bfloat16 weights: use --dtype bfloat16"
        )
    seen = online_targets(online, dataset.first, held_out, device, folder)
    run = assemble(
        *(config, folder, world, opened.backbone, dataset, held_out, spec),
        *(opened.adapter, seen, first),
    )
    run.state.base_name = opened.base.name(folder) if opened.base else ""
    return run


def assemble(
    config: TrainConfig,
    folder: Path,
    world: World,
    backbone: Backbone,
    dataset: Split,
    held_out: Dataset | None,
    tokenizer_spec: str,
    adapter: Adapter | None = None,
    online: Sequence[Mapping[str, TargetValues]] = ({}, {}),
    first: FirstWeights | None = None,
) -> Run:
    """Puts together what trains: nothing is read and nothing written (`arra doctor` does this too,
    with a backbone that has no memory behind its tensors).

    Args:
        online: the targets, of train and of val, that the dataset does not hold.
        first: the weights, if they come only after the backbone was sharded.
    """
    if first is None:
        backbone.to(world.device)
    backbone.model.train()
    # The copy of what it starts from is made before anything is wrapped around its blocks.
    contrastive = config.objective == "cca" and contrastive_step(config, backbone, adapter)
    engage(backbone, config.engine)
    loader, validation = _loaders(config, world, backbone, dataset, held_out, online)
    step = contrastive or Step(
        backbone, objective_of(config, backbone, loader.targets, world.device)
    )
    objective = step.objective.to(world.device)
    if first is not None:
        first.take("objective", objective)
        objective.to("meta")
    names = {id(p): name for name, p in backbone.model.named_parameters()}
    engine = engine_of(
        *(step, [*backbone.blocks, *step.more_blocks], objective, config, world, step.used)
    )
    if first is not None:
        if step.used:
            first.take_again("model", "start")
        step.to_empty(device=world.device)
        first.fill(step)
    adapter = adapter and after_wrapping(adapter, names, backbone.model)
    trained = trained_tensors(backbone.model, adapter)
    average = Average(trained.items(), config.optim.ema) if config.optim.ema else None
    optimizer = build_optimizer(backbone.model, objective, config.optim)
    state = State(backbone.model, objective, optimizer, average, adapter)
    guard = Guard(config, folder, world, loader)
    return Run(
        *(config, folder, world, backbone, step, engine, guard, state),
        *(loader, validation, tokenizer_spec),
    )


def _text_encoder(
    config: TrainConfig, backbone: Backbone, manifest: Manifest
) -> dict[str, Any] | None:
    """What pipeline.json says of the encoder of the prompts, if they are features.

    Raises:
        ValueError: --model names a painter that was trained with another encoder.
    """
    if not backbone.text_slots or len(manifest.text_features) != 1:
        return None  # the loader says what is wrong with the latter
    ((name, info),) = manifest.text_features.items()
    known = None
    if config.model_path is not None and not Path(config.model_path).expanduser().is_file():
        before = resolve_folder(config.model_path, "model") / PIPELINE
        known = read_json(before).get("text_encoder") if before.is_file() else None
    if known is not None and known["fingerprint"] not in (None, info.encoder):
        raise ValueError(
            f"{config.model_path} was trained with another text encoder or length than the "
            f"dataset's text features {name!r}: prepare the data with --text-encoder "
            f"{known['spec']} and {known['length']} tokens"
        )
    return {"spec": info.spec, "length": info.length, "fingerprint": info.encoder}


def _opened(
    config: TrainConfig, folder: Path, world: World, codebook_KC: Tensor, dataset: Split
) -> Opened:
    texts = dataset.manifest.text_features.values()

    def whole() -> Backbone:
        return load_for_training(
            config.model_path,
            config.model,
            codebook_KC=codebook_KC,
            captions=dataset.first.texts,
            seed=config.seed,
            grid=common_grid(dataset.first.grids),
            class_names=dataset.manifest.class_names,
            text_width=max((t.dim for t in texts), default=0),
            text_slots=max((t.length for t in texts), default=0),
        )

    if config.lora.rank:
        return adapted_backbone(config, folder, world, whole)
    return Opened(whole())


def _as_stored(config: TrainConfig) -> TrainConfig:
    return replace(config, model=replace(config.model, dtype="auto"))


def _loaders(
    config: TrainConfig,
    world: World,
    backbone: Backbone,
    dataset: Split,
    held_out: Dataset | None,
    online: Sequence[Mapping[str, TargetValues]],
) -> tuple[Loader, Loader | None]:
    accumulate = config.accumulate(world.size)
    slices = world.size * accumulate
    if config.batch_size < slices:
        raise ValueError(
            f"--batch-size {config.batch_size} cannot be split into {slices} parts, one for each "
            f"of {world.size} processes: start fewer processes"
        )
    contrasting = config.objective == "cca"
    passages = _passages(config.data.text) if config.data.text else []
    predicting = not config.align.weight or config.align.positions in LOOKING_AHEAD
    loader = Loader(
        dataset,
        backbone,
        batch_size=config.batch_size,
        accumulate=accumulate,
        rank=world.rank,
        ranks=world.size,
        seed=config.seed,
        prompt_dropout=config.data.prompt_dropout,
        train_text=config.loss.text,
        centred=config.align.centred,
        passages=passages,
        text_rows=config.text_rows if passages else 0,
        online=online[0],
        predicting=predicting,
        contrasting=contrasting,
    )
    if held_out is None:
        return loader, None
    return loader, Loader(
        held_out,
        backbone,
        batch_size=-(-config.batch_size // slices),
        rank=world.rank,
        ranks=world.size,
        seed=config.seed,
        train_text=config.loss.text,
        centred=config.align.centred,
        online=online[1],
        predicting=predicting,
        contrasting=contrasting,
    )


def _passages(file: str) -> list[str]:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"--data.text {file} does not exist") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--data.text {file} is not UTF-8 ({error}): convert it first") from None
    passages = [line.strip() for line in lines if line.strip()]
    if not passages:
        raise ValueError(f"--data.text {file} has no text in it")
    return passages
