"""`arra doctor --plan RECIPE`: memory and time of a training run, before anything starts."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arra.config import TrainConfig
from arra.data.manifest import read_manifest
from arra.data.shards import open_dataset
from arra.device import cpu_has_bfloat16, pick_device
from arra.doctor.devices import GIB, GPUS, Device, gpu_named, this_device
from arra.doctor.made_up import Material, default_codebook
from arra.doctor.rehearsal import Rehearsal, rehearse
from arra.doctor.settings import PlanConfig
from arra.files import write_json

RESERVE = GIB
"""What a process needs besides tensors: a CUDA context and the workspaces of its libraries, or
Python and its libraries on a CPU (0.4 GiB there: a margin is in it)."""
RECOMPUTING = "--engine.activation-checkpointing full"
FRAGMENTATION = 0.05
"""Of the peak; assumed for a GPU's caching allocator. On a CPU the system gives single pages."""


@dataclass(frozen=True)
class Alternative:
    """The same run with other flags."""

    flags: str
    needed: int
    fits: bool
    seconds_per_step: float


@dataclass(frozen=True)
class Plan:
    """What a run needs on each device, in bytes, and how long it takes, in seconds.

    Attributes:
        needed: the peak with what comes on top of tensors.
        fits: whether that is within the device's memory.
        fitting: GPU of the table -> whether its memory is enough.
        assumptions: sentences.
        alternatives: what else to try, if it does not fit.
    """

    config: TrainConfig
    gpus: int
    micro: int
    accumulate: int
    device: Device
    step: Rehearsal
    needed: int
    fits: bool
    seconds_per_step: float
    fitting: dict[str, bool]
    assumptions: list[str]
    alternatives: list[Alternative] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.seconds_per_step * self.config.steps

    @property
    def seconds_per_1000_images(self) -> float:
        return self.seconds_per_step * 1000 / self.config.batch_size

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values; bytes and seconds."""
        values = dataclasses.asdict(self)
        values["step"]["parts"]["total"] = self.step.parts.total
        values["seconds"] = self.seconds
        values["seconds_per_1000_images"] = self.seconds_per_1000_images
        return values


def make_plan(options: PlanConfig, config: TrainConfig) -> Plan:
    """Plans a run; nothing is written but `--out`.

    Args:
        options: what is asked of the doctor.
        config: the run, as `arra train` would get it.

    Raises:
        ValueError: parts do not fit one another, as in training; the batch cannot be split.
    """
    config = dataclasses.replace(config, dtype=_dtype(options, config))
    material = _material(options, config)
    micro, accumulate = _split(config, options.gpus)
    device = _device(options, config)
    step = rehearse(config, micro, accumulate, material)
    needed = _needed(step, config, device)
    fits = needed <= device.memory
    plan = Plan(
        config=config,
        gpus=options.gpus,
        micro=micro,
        accumulate=accumulate,
        device=device,
        step=step,
        needed=needed,
        fits=fits,
        seconds_per_step=_seconds(step, device),
        fitting={name: needed <= sheet.memory * GIB for name, sheet in GPUS.items()},
        assumptions=_assumptions(options, config, device, step),
        alternatives=[] if fits else _alternatives(config, options.gpus, device, material),
    )
    if options.out is not None:
        write_json(Path(options.out), plan.to_json())
    return plan


# ---- the run -------------------------------------------------------------------------------------


def _dtype(options: PlanConfig, config: TrainConfig) -> Any:
    """As training resolves `auto`, on the device that is planned for."""
    if config.dtype != "auto":
        return config.dtype
    gpu = options.gpu is not None or pick_device(config.device) != "cpu"
    return "bfloat16" if gpu or cpu_has_bfloat16() else "float32"


def _split(config: TrainConfig, gpus: int) -> tuple[int, int]:
    """(images per forward pass, forward passes per step) of one device."""
    if config.batch_size % gpus:
        raise ValueError(
            f"--batch-size {config.batch_size} cannot be split over {gpus} GPUs: make it a multiple"
        )
    share = config.batch_size // gpus
    micro = config.micro_batch or share
    if share % micro:
        raise ValueError(
            f"each of {gpus} GPUs gets {share} of {config.batch_size} images, which --micro-batch "
            f"{micro} does not divide"
        )
    return micro, share // micro


def _material(options: PlanConfig, config: TrainConfig) -> Material:
    """The dataset, or what is assumed in its place."""
    if config.align.online:
        raise ValueError("the plan knows nothing of --align.online: leave it out")
    if config.data_folder:
        manifest = read_manifest(config.data_folder)
        known = manifest.aligned()
        names = list(config.align.targets) or list(known)
        missing = [name for name in names if name not in known]
        if config.align.weight and (missing or not names):
            raise ValueError(
                f"the dataset has no feature {missing[0] if missing else 'to align to'!r}: prepare "
                f"it with --encoder, or plan the baseline with --align.weight 0"
            )
        dataset = open_dataset(
            config.data_folder, "train", features=names if config.align.weight else []
        )
        height, width = (int(n) for n in dataset.grids[0])
        return Material(dataset, (height, width), manifest.tokenizer.codebook_size)
    return Material(
        grid=options.grid,
        codebook_size=options.codebook_size or default_codebook(config),
        prompt_tokens=options.prompt_tokens,
        feature_size=options.feature_size,
        classes=options.classes,
    )


def _device(options: PlanConfig, config: TrainConfig) -> Device:
    if options.gpu is not None:
        device = gpu_named(options.gpu, config.dtype)
    elif options.memory is not None and options.tflops is not None:
        device = Device("a device as given", 0, 0.0, 0.35, "")
    else:
        device = this_device(pick_device(config.device), config.dtype, config.threads)
    if options.memory is not None:
        device = dataclasses.replace(device, memory=round(options.memory * GIB))
    if options.tflops is not None:
        device = dataclasses.replace(device, tflops=options.tflops, source="--tflops")
    if options.mfu is not None:
        device = dataclasses.replace(device, utilisation=options.mfu)
    return device


def _needed(step: Rehearsal, config: TrainConfig, device: Device) -> int:
    """Bytes with all that comes on top of tensors."""
    peak = step.memory.peak
    if config.log.sample_every and step.painting is not None:
        held = step.memory.optimizer + step.memory.average
        peak = max(peak, step.painting.peak + held)
    on_cpu = device.name == "this CPU"
    return round(peak * (1.0 if on_cpu else 1 + FRAGMENTATION)) + RESERVE


def _seconds(step: Rehearsal, device: Device) -> float:
    return step.flops / (device.tflops * 1e12 * device.utilisation)


def _data(options: PlanConfig, config: TrainConfig, step: Rehearsal) -> str:
    if config.data_folder:
        return f"data: every row is as long as the longest sample of {config.data_folder}"
    height, width = step.grid
    prompts = f"captions of {options.prompt_tokens} text tokens"
    prompts = f"{options.classes} classes" if options.classes else prompts
    said = f"data: none given (--data); images of {height} x {width} codes out of {step.codes:,}"
    aligned = f", features of {options.feature_size} values" if config.align.weight else ""
    return f"{said}, {prompts}{aligned}"


def _assumptions(
    options: PlanConfig, config: TrainConfig, device: Device, step: Rehearsal
) -> list[str]:
    gpus = options.gpus
    said = [
        _data(options, config, step),
        f"time: {device.tflops:.4g} TFLOPS ({device.source}) x {device.utilisation:.2g} utilisation"
        f" (assumed; --mfu), an estimate; loading data, checkpoints and painting are not in it",
        f"memory: weights {step.weight_dtype}, "
        + ("products in bfloat16 (autocast)" if config.dtype == "bfloat16" else "all in float32"),
    ]
    if gpus > 1:
        said.append(
            f"{gpus} GPUs: assumed are replicas (--engine.parallel ddp, gradients as views of its "
            f"buckets), each with everything and 1/{gpus} of the batch, at no cost of communication"
        )
    if config.lora.quantize == "4bit" or config.optim.bits == 8:
        said.append("bitsandbytes: sizes by formula; its kernels' scratch is not in them")
    return said


# ---- what to change ------------------------------------------------------------------------------


def _alternatives(
    config: TrainConfig, gpus: int, device: Device, material: Material
) -> list[Alternative]:
    """The same run with flags that save memory, first those that leave what it computes alone; the
    next stage is tried where nothing of the one before fits."""
    found: list[Alternative] = []
    for stage in _stages(config):
        for flags, changed in stage.items():
            if changed == config:
                continue
            step = rehearse(changed, *_split(changed, gpus), material, paint=False)
            needed = _needed(step, changed, device)
            fits = needed <= device.memory
            found.append(Alternative(flags, needed, fits, _seconds(step, device)))
        if any(other.fits for other in found):
            break
    return found


def _stages(config: TrainConfig) -> list[dict[str, TrainConfig]]:
    """Flags -> the config that they make of this one."""
    replace, less, one = dataclasses.replace, RECOMPUTING, "--micro-batch 1"
    engine = replace(config.engine, activation_checkpointing="full")
    recomputing = replace(config, engine=engine)
    lean = replace(recomputing, micro_batch=1)
    optim = replace(config.optim, bits=8, ema=0.0)
    states = "--optim.bits 8" + (" --optim.ema 0" if config.optim.ema else "")
    stages = [
        {less: recomputing, one: replace(config, micro_batch=1), f"{less} {one}": lean},
        {
            f"{less} {states}": replace(recomputing, optim=optim),
            f"{less} {one} {states}": replace(lean, optim=optim),
        },
    ]
    if config.model_path is not None:
        adapter = replace(config.lora, rank=config.lora.rank or 16)
        lora = f"{less} {one} --lora.rank {adapter.rank}"
        packed = replace(adapter, quantize="4bit")
        stages += [
            {lora: replace(lean, lora=adapter)},
            {f"{lora} --lora.quantize 4bit": replace(lean, lora=packed)},
        ]
    return stages
