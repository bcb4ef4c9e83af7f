"""`arra study`: a pair of arms on any dataset, trained, asked the same, measured and reported.

Both arms start from the same weights and see the same images in the same order. The one thing that
differs is the weight of the alignment term: 0, or what the recipe says.
"""

import dataclasses
import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from arra.config import TrainConfig
from arra.device import pick_device
from arra.files import read_json, write_json
from arra.models.run_folder import latest_checkpoint, step_name
from arra.recipes import RECIPES
from arra.study.processes import Job, python, run_jobs
from arra.study.results import ARMS
from arra.study.stages import Stages


@dataclass(frozen=True)
class StudyConfig:
    """Train a plain and an aligned arm, paint the same prompts with both, compare, report."""

    data: tyro.conf.Positional[str]
    """A dataset that `arra prepare` wrote, or a SOURCE that is prepared first."""
    out: str
    """Folder of the study; the same command again goes on where it was."""
    recipe: str = "scenes"
    """Recipe of both arms (see arra train)."""
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = ()
    """Options of `arra train` for both arms as NAME=VALUE, such as steps=4000 align.layer=3."""
    image_tokenizer: str | None = None
    """To prepare a SOURCE: image tokenizer."""
    encoder: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """To prepare a SOURCE: encoders to align to, as for `arra prepare`."""
    size: int = 64
    """To prepare a SOURCE: pixels per side."""
    text_column: str = "text"
    """To prepare a SOURCE: column of the captions."""
    limit: int | None = None
    """To prepare a SOURCE: rows to read of each split; default: all."""
    judge: str | None = None
    """Encoder of the distances, E or E@pooling; none given = no distances. Take another one than
    the arms are aligned to."""
    distances: tuple[str, ...] = ("fd", "kid")
    """Which distances: fd, kid."""
    seeds: tuple[int, ...] = (0,)
    """One pair of runs for each seed (of weights and order)."""
    split: str = "test"
    """Held-out split whose captions are painted."""
    prompts: int = 512
    """How many of its captions."""
    unseen: int = 0
    """Besides, so many of its captions that no training image has, each once: a group of their own.
    Class names and other captions that repeat are never unseen."""
    more_splits: tuple[str, ...] = ()
    """Further splits that are painted, half as many captions each."""
    points: int = 5
    """Checkpoints measured along the way, the last one included."""
    point_prompts: int = 96
    """Captions painted at each of them."""
    guidances: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0)
    """Guidance scales to choose from, for each arm, on captions of the validation split."""
    guidance_prompts: int = 96
    """Captions painted for the choice."""
    validation_images: int = 512
    """Images of the validation split whose loss is compared."""
    parallel: int = 2
    """Processes at a time."""
    threads: int = 0
    """CPU threads of each process; 0 = cores / parallel."""
    slots: int = 128
    """Rows per forward pass when painting; a picture takes two with guidance, one without."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu."""
    title: str = ""
    """Heading of the report."""

    def __post_init__(self) -> None:
        _require(self.recipe in RECIPES, f"--recipe must be one of {', '.join(RECIPES)}")
        _require(len(self.seeds) > 0, "--seeds needs at least one")
        _require(len(set(self.seeds)) == len(self.seeds), "--seeds must differ")
        _require(len(self.guidances) > 0, "--guidances needs at least one")
        _require(set(self.distances) <= {"fd", "kid"}, "--distances can be fd and kid")
        for name in ("prompts", "points", "point_prompts", "guidance_prompts", "parallel", "slots"):
            flag = name.replace("_", "-")
            _require(getattr(self, name) >= 1, f"--{flag} must be at least 1")
        _require(self.prompts >= 2, "--prompts must be at least 2")
        _require(self.unseen >= 0, "--unseen must not be negative")
        _require(self.point_prompts >= 2, "--point-prompts must be at least 2")
        _require(self.guidance_prompts >= 2, "--guidance-prompts must be at least 2")
        _require(self.validation_images >= 1, "--validation-images must be at least 1")

    @property
    def device_name(self) -> str:
        return pick_device(self.device)

    @property
    def threads_each(self) -> int:
        return self.threads or max(1, cores() // self.parallel)


CHANGEABLE = {"title", "parallel", "out"}
"""What may differ when a study is continued; anything else would mix two studies."""


@dataclass(frozen=True)
class Arm:
    """One training run of the study."""

    name: str  # plain or aligned
    seed: int
    run: Path
    base: Path  # folder of this seed's pair
    config: TrainConfig
    argv: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.name} (seed {self.seed})"

    @property
    def painted(self) -> Path:
        """Where this arm's answers lie."""
        return self.base / "painted" / self.name

    @property
    def finished(self) -> bool:
        """A stop in the last validation leaves the last checkpoint, but not its log line."""
        last, lines = latest_checkpoint(self.run), self.log_lines()
        saved = last is not None and last.name == step_name(self.config.steps)
        return saved and bool(lines) and lines[-1]["step"] == self.config.steps

    def log_lines(self) -> list[dict[str, Any]]:
        """The lines of log.jsonl so far; one that is being written is left out."""
        file = self.run / "log.jsonl"
        if not file.exists():
            return []
        text = file.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def progress(self) -> str:
        lines = self.log_lines()
        if not lines or not lines[-1]["images_per_s"]:
            return "starting"
        last = lines[-1]
        left = (self.config.steps - last["step"]) * self.config.batch_size / last["images_per_s"]
        return (
            f"step {last['step']}/{self.config.steps}  loss_ar {last['loss_ar']:.3f}  "
            f"{int(left) // 60}:{int(left) % 60:02d} left"
        )


def run_study(
    config: StudyConfig,
    *,
    data_label: str | None = None,
    depth: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Runs every stage that is not finished; returns the report's path.

    Args:
        data_label: what the report calls the data.
        depth: what other alignment layers gave (see results.py), for the report.
    """
    from arra.study import questions, writing

    out = Path(config.out)
    refuse_another(out, config)
    stages = Stages(out, say)
    data = out / "data" if not is_prepared(config.data) else Path(config.data)
    stages.run("prepare", is_prepared(str(data)), lambda: prepare_source(config, data))
    arms = make_arms(config, data)
    asked = questions.Asked.of(config, data, arms)
    stages.run("train", all(arm.finished for arm in arms), lambda: train_arms(config, arms, say))
    stages.run("choose guidance", asked.chosen, lambda: asked.choose_guidance(say))
    stages.run("paint", asked.answered, lambda: asked.paint(say))
    writer = writing.Writer(asked, data_label, depth)
    stages.run("measure", writer.measured, writer.measure)
    report = writer.report(stages.seconds)
    say(f"== report: {report}   (all stages {stages.total / 60:.1f} minutes)")
    return report


def refuse_another(out: Path, config: StudyConfig) -> None:
    """Writes study.json, or compares it with the one that is there."""
    file = out / "study.json"
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    if not file.exists():
        write_json(file, now)
        return
    before = read_json(file)
    changed = [
        f"--{name.replace('_', '-')}: {before.get(name)} -> {value}"
        for name, value in now.items()
        if name not in CHANGEABLE and before.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{out} holds a study with other settings ({'; '.join(changed)}): go on with its own, "
            f"or choose another --out"
        )


def is_prepared(data: str) -> bool:
    """Whether `data` is a finished prepared dataset (its manifest is written last)."""
    return (Path(data) / "manifest.json").is_file()


def prepare_source(config: StudyConfig, data: Path) -> None:
    """Makes the dataset from a SOURCE."""
    from arra.data.prepare import prepare
    from arra.data.prepare_config import PrepareConfig

    if config.image_tokenizer is None or not config.encoder:
        raise ValueError(
            f"{config.data} is no prepared dataset; to prepare it as a source, give "
            f"--image-tokenizer and --encoder"
        )
    prepare(
        PrepareConfig(
            source=config.data,
            out=data,
            image_tokenizer=config.image_tokenizer,
            encoder=config.encoder,
            size=config.size,
            text_column=config.text_column,
            limit=config.limit,
            threads=cores(),
            device=config.device,
        )
    )


# ---- training ------------------------------------------------------------------------------------


def make_arms(config: StudyConfig, data: Path) -> list[Arm]:
    """The arms of every seed, plain before aligned. ValueError for flags that make no pair."""
    arms = []
    for seed in config.seeds:
        base = Path(config.out) if seed == config.seeds[0] else Path(config.out) / f"seed-{seed}"
        for name in ARMS:
            run = base / name
            flags = train_flags(config.settings) + ["--seed", str(seed), "--device", config.device]
            steps = _parse(config.recipe, data, run, flags).steps
            every = math.ceil(steps / config.points)
            flags += ["--threads", str(config.threads_each)]
            flags += ["--checkpoint.every", str(every), "--checkpoint.keep", "0"]
            flags += ["--log.validate-every", str(math.ceil(every / 2))]
            flags += ["--log.validate-images", str(config.validation_images)]
            if name == "plain":
                flags += ["--align.weight", "0"]
            train = _parse(config.recipe, data, run, flags)
            if name == "aligned" and train.align.weight == 0:
                raise ValueError("the aligned arm has --align.weight 0: take it out of --set")
            argv = ("train", config.recipe, "--data", str(data), "--out", str(run), *flags)
            arms.append(Arm(name, seed, run, base, train, argv))
    return arms


def train_flags(settings: tuple[str, ...]) -> list[str]:
    """NAME=VALUE as `arra train` takes it: --NAME VALUE, or --NAME and --no-NAME for true, false.

    Several values of one option stand behind one another: "align.layer=1 3".
    """
    flags: list[str] = []
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name.startswith("-"):
            raise ValueError(f"--set {setting}: write NAME=VALUE, such as steps=4000")
        if value in ("true", "false"):
            group, _, last = name.rpartition(".")
            negated = last if value == "true" else f"no-{last}"
            flags.append(f"--{group}.{negated}" if group else f"--{negated}")
        else:
            flags += [f"--{name}", *shlex.split(value)]
    return flags


def _parse(recipe: str, data: Path, run: Path, flags: list[str]) -> TrainConfig:
    """What `arra train RECIPE ... flags` would run; a wrong flag ends here, not after an hour."""
    default = RECIPES[recipe](str(data), str(run))
    return tyro.cli(TrainConfig, args=flags, prog=f"arra train {recipe}", default=default)


def train_arms(config: StudyConfig, arms: list[Arm], say: Callable[[str], None]) -> None:
    """Trains what is not finished, each arm in its own process."""
    jobs = [
        Job(
            arm.label,
            python("arra.cli", *arm.argv),
            arm.base / f"{arm.name}.log",
            arm.progress,
        )
        for arm in arms
        if not arm.finished
    ]
    run_jobs(jobs, parallel=config.parallel, threads=config.threads_each, say=say)


def checkpoint_steps(config: StudyConfig, train: TrainConfig) -> list[int]:
    """Steps at which an arm is measured; the last is the end of the run."""
    every = math.ceil(train.steps / config.points)
    return [*range(every, train.steps, every), train.steps]


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise ValueError(rule)
