"""From a config to everything that the loop holds: data, backbone, objective, optimizer."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from arra.config import TrainConfig, differences, from_json, to_json
from arra.data.loader import Loader, MicroBatch
from arra.data.shards import Dataset, open_dataset, read_manifest
from arra.files import read_json, sha256_of, write_json
from arra.image_tokenizers import load_image_tokenizer
from arra.models.base import Backbone
from arra.models.loading import PIPELINE, load_for_training, save_skeleton
from arra.objective import Objective, Target, Terms
from arra.train import checkpoint
from arra.train.optim import Average, build_optimizer


class Step(nn.Module):
    """Backbone and objective as the one module that a parallel engine or a compiler wraps."""

    def __init__(self, backbone: Backbone, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = backbone.model, objective
        self._backbone = backbone

    def forward(self, micro: MicroBatch, factor: float) -> Terms:
        """The terms of one micro-batch; `factor` scales every lambda at this step."""
        layers = self.objective.layers if factor > 0 else ()
        with self._backbone.tap(layers) as taps:
            last_BTD = self._backbone.last_hidden(micro.batch.ids_BT)
        return self.objective(
            taps, last_BTD, self._backbone.head, micro.batch, micro.features, factor
        )


@dataclass
class Run:
    """What the loop holds."""

    config: TrainConfig
    folder: Path
    device: torch.device
    backbone: Backbone
    step: Step
    state: checkpoint.State
    loader: Loader
    validation: Loader | None
    tokenizer_spec: str


def set_up(config: TrainConfig, folder: Path) -> Run:
    """Loads or builds all that the loop needs and writes what a painter is but its weights.

    Raises:
        ValueError: data, image tokenizer, features and model do not fit one another.
    """
    device = torch.device(pick_device(config.device))
    if config.dtype == "bfloat16" and device.type == "cpu" and not cpu_has_bfloat16():
        raise ValueError("this CPU has no bfloat16 instructions: use --dtype float32")
    manifest = read_manifest(Path(config.data_folder))
    names = _target_names(config, list(manifest.features))
    dataset = open_dataset(config.data_folder, "train", features=names)
    spec = config.image_tokenizer or manifest.tokenizer.spec
    tokenizer = load_image_tokenizer(spec)
    if tokenizer.fingerprint != manifest.tokenizer.fingerprint:
        raise ValueError(
            f"the dataset's codes were made by another image tokenizer than {spec}: pass the "
            f"right one as --image-tokenizer, or prepare the data again"
        )
    backbone = load_for_training(
        config.model_path,
        config.model,
        codebook_KC=tokenizer.codebook.detach(),
        captions=dataset.texts,
        seed=config.seed,
        grid=(int(dataset.grids[0][0]), int(dataset.grids[0][1])),
        class_names=manifest.class_names,
    )
    backbone.to(device).model.train()
    if config.model.gradient_checkpointing:
        backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    objective = _objective(config, backbone, dataset).to(device)
    step = Step(backbone, objective)
    average = (
        Average(backbone.model.named_parameters(), config.optim.ema) if config.optim.ema else None
    )
    optimizer = build_optimizer(backbone.model, objective, config.optim)
    if not (folder / PIPELINE).exists():
        height, width = (int(n) for n in dataset.grids[0])
        save_skeleton(
            backbone,
            folder,
            grid=(height, width),
            image_tokenizer=spec,
            fingerprint=tokenizer.fingerprint,
            trained_vocabulary=config.loss.vocab,
        )
    state = checkpoint.State(backbone.model, objective, optimizer, average)
    loader, validation = _loaders(config, backbone, dataset, names, list(manifest.splits))
    return Run(config, folder, device, backbone, step, state, loader, validation, spec)


def _loaders(
    config: TrainConfig, backbone: Backbone, dataset: Dataset, names: list[str], splits: list[str]
) -> tuple[Loader, Loader | None]:
    micro = config.micro_batch or config.batch_size
    passages = _passages(config.data.text) if config.data.text else []
    loader = Loader(
        dataset,
        backbone,
        batch_size=config.batch_size,
        micro_batch=micro,
        seed=config.seed,
        prompt_dropout=config.data.prompt_dropout,
        train_text=config.loss.text,
        centred=config.align.centred,
        passages=passages,
        text_rows=config.text_rows if passages else 0,
    )
    if "val" not in splits:
        return loader, None
    held_out = open_dataset(config.data_folder, "val", features=names)
    return loader, Loader(
        held_out,
        backbone,
        batch_size=micro,
        micro_batch=micro,
        seed=config.seed,
        train_text=config.loss.text,
        centred=config.align.centred,
    )


def _target_names(config: TrainConfig, available: list[str]) -> list[str]:
    if config.align.weight == 0:
        return []
    wanted = list(config.align.targets) or available
    missing = [name for name in wanted if name not in available]
    if missing or not wanted:
        have = ", ".join(available) or "none"
        raise ValueError(
            f"the dataset has no feature {missing[0] if missing else 'to align to'!r} (it has: "
            f"{have}): prepare it with --encoder, or train the baseline with --align.weight 0"
        )
    return wanted


def _objective(config: TrainConfig, backbone: Backbone, dataset: Dataset) -> Objective:
    align = config.align
    if align.positions == "rep" and backbone.layout.rep is None:
        raise ValueError("--align.positions rep needs --model.rep: the sequence has no such token")
    targets = [
        Target(
            name,
            dim=values.shape[-1],
            layers=align.layer,
            weight=align.weight,
            positions=align.positions,
            centred=align.centred,
            kind="patch" if values.ndim == 3 else "global",
        )
        for name, values in dataset.features.items()
    ]
    vocabulary = backbone.layout.image_vocabulary() if config.loss.vocab == "image" else None
    if vocabulary and (config.loss.text or config.data.text):
        raise ValueError("--loss.vocab image leaves text out of the softmax: it cannot be trained")
    return Objective(
        backbone.hidden_size,
        targets,
        z_loss=config.loss.z,
        vocabulary=vocabulary,
        chunk=config.loss.chunk,
        seed=config.seed,
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


def claim(config: TrainConfig, folder: Path) -> TrainConfig:
    """Makes `folder` this run's own, or finds that it already is; sets the number of threads.

    Returns the config with `auto` types resolved, as config.json has it. That is written first, so
    that a run killed at any later moment can be resumed.

    Raises:
        ValueError: the folder holds something else, or a run with other settings or data.
    """
    file = folder / "config.json"
    dataset = manifest_hash(config)
    if not file.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no run: choose another --out")
        config = dataclasses.replace(config, dtype=_pick_dtype(config))
        torch.set_num_threads(config.threads or torch.get_num_threads())
        run = {"dataset": dataset, "threads": torch.get_num_threads()}
        write_json(file, {**to_json(config), "run": run})
        return config
    written = read_json(file)
    run = written.pop("run")
    before = from_json(TrainConfig, written)
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype=before.dtype)
    changed = differences(before, config)
    if changed:
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}): resume it with its "
            f"own, or choose another --out"
        )
    if run["dataset"] != dataset:
        raise ValueError(
            f"{folder} was trained on another dataset than {config.data_folder}: resume it with "
            f"the same data, or choose another --out"
        )
    torch.set_num_threads(run["threads"])
    return config


def manifest_hash(config: TrainConfig) -> str:
    """SHA-256 of the dataset's manifest, which holds those of all its files."""
    file = Path(config.data_folder) / "manifest.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"--data {config.data_folder} is no prepared dataset (it has no manifest.json): write "
            f"one with `arra prepare`"
        )
    return sha256_of(file)


def pick_device(device: str) -> str:
    """`auto` = cuda if there is one, else cpu."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _pick_dtype(config: TrainConfig) -> Literal["float32", "bfloat16"]:
    """`auto` = bfloat16 where it is native: a third faster on a CPU that has it."""
    if config.dtype != "auto":
        return config.dtype
    native = pick_device(config.device) != "cpu" or cpu_has_bfloat16()
    return "bfloat16" if native else "float32"


def cpu_has_bfloat16() -> bool:
    """Whether bf16 products are native (AVX-512 BF16 or AMX) rather than emulated."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
