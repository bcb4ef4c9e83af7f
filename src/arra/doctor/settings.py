"""What can be asked of the doctor. Light: the command line reads it before torch loads."""

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True)
class PlanConfig:
    """Predicts memory and time of a training run before anything starts.

    Any flag of `arra train RECIPE` may follow, --data, --model and --batch-size among them; weights
    are never read.
    """

    plan: Annotated[str, tyro.conf.arg(metavar="RECIPE")]
    """A recipe of `arra train`, or the config.json of a run."""
    gpus: int = 1
    """Devices; --batch-size is split over them. --micro-batch is per device."""
    gpu: str | None = None
    """Plan for rtx3090, rtx4090, l4, a100-40gb, l40s, a100-80gb, h100 or h200. Default: for what is
    here."""
    memory: float | None = None
    """GiB of each device, instead of what is known of it."""
    tflops: float | None = None
    """10^12 operations per second of each device in the run's dtype, instead of what is known."""
    mfu: float | None = None
    """Fraction of those that training reaches, in (0, 1]."""
    grid: tuple[int, int] | None = None
    """Without --data: codes of an image, rows and columns. Default: the model's, or 16 16."""
    codebook_size: int | None = None
    """Without --data: codes of the image tokenizer. Default: the model's, or 16384."""
    prompt_tokens: int = 64
    """Without --data: text tokens of a caption."""
    feature_size: int = 512
    """Without --data: values of the feature that is aligned to."""
    classes: int = 0
    """Without --data: classes of the dataset; 0 = it has captions."""
    json: bool = False
    """Print JSON instead of a table."""
    out: str | None = None
    """Also write the JSON to this file."""

    def __post_init__(self) -> None:
        _require(self.gpus >= 1, "--gpus must be at least 1", self.gpus)
        for flag, value in (("--memory", self.memory), ("--tflops", self.tflops)):
            _require(value is None or value > 0, f"{flag} must be more than 0", value)
        _require(self.mfu is None or 0 < self.mfu <= 1, "--mfu must be in (0, 1]", self.mfu)
        _require(self.grid is None or min(self.grid) >= 1, "--grid must be at least 1 1", self.grid)
        for name in ("prompt_tokens", "feature_size", "codebook_size"):
            value = getattr(self, name)
            flag = f"--{name.replace('_', '-')}"
            _require(value is None or value >= 1, f"{flag} must be at least 1", value)
        _require(self.classes >= 0, "--classes must be at least 0", self.classes)


@dataclass(frozen=True)
class AuditConfig:
    """Looks for damage, duplicates and leakage in a prepared dataset.

    Exit code 0: fine, 1: damaged, 2: wrong use. Nothing is written but --out.
    """

    dataset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")]
    """What `arra prepare --out` wrote."""
    against: str | None = None
    """Another prepared dataset of the same source: compares the two instead of looking into one
    (docs/cluster.md). Exit code 1: rows differ, or features by more than a float16 step."""
    out: str | None = None
    """Folder for report.html, audit.json and pictures; default: none are made."""
    json: bool = False
    """Print JSON instead of text."""
    strict: bool = False
    """Warnings are errors: exit code 1."""
    near: float = 0.99
    """Centred cosine from which two pictures are near-duplicates."""
    samples: int = 12
    """Rows that are decoded and compared with their originals."""
    source: str | None = None
    """Where the source is now, if not where the manifest says."""
    image_tokenizer: str | None = None
    """Where the image tokenizer is now, if not where the manifest says."""
    device: str = "auto"
    """Computes near-duplicates: cpu, cuda, cuda:N, or auto = cuda where there is one."""

    def __post_init__(self) -> None:
        _require(0 < self.near <= 1, "--near must be in (0, 1]", self.near)
        _require(self.samples >= 0, "--samples must be at least 0", self.samples)


@dataclass(frozen=True)
class RunConfig:
    """Says what became of a training run, and how to go on.

    Exit code 0: fine, 1: something is wrong, 2: wrong use. Nothing is written but --out.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """What `arra train --out` wrote."""
    data: str | None = None
    """Where the run's dataset is now, if not where config.json says."""
    out: str | None = None
    """Folder for report.html with the curves, and run.json; default: none are made."""
    json: bool = False
    """Print JSON instead of text."""
    strict: bool = False
    """Warnings are errors: exit code 1."""


@dataclass(frozen=True)
class ModelCheckConfig:
    """Says whether a model opens, how it paints, and what in its folder is missing or wrong.

    Every weight is looked at once. Exit code 0: fine, 1: something is wrong, 2: wrong use. Nothing
    is written.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """What `arra export` made, or a published checkpoint: folder, hub id or builtin:scenes."""
    format: str | None = None
    """How a published checkpoint writes images, where its files do not tell (docs/chameleon.md)."""
    image_tokenizer: str | None = None
    """Where the image tokenizer is, if not inside or where the model says."""
    json: bool = False
    """Print JSON instead of text."""
    strict: bool = False
    """Warnings are errors: exit code 1."""


def _require(condition: bool, rule: str, found: object) -> None:
    if not condition:
        raise ValueError(f"{rule}, got {found}")
