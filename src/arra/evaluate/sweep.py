"""`arra evaluate sweep`: painters over scales of guidance, each then at its own best.

The real images are looked at once. Every (model, scale) is an evaluation in a folder of its own, so
a sweep that was stopped goes on where it was.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePath
from typing import Annotated, Any

import tyro

from arra.evaluate.comparison import open_report
from arra.evaluate.features import Extractor
from arra.evaluate.image_set import hash_of_texts
from arra.evaluate.outputs import REPORT, SWEEP
from arra.evaluate.painter import PaintedSet
from arra.evaluate.protocol import evaluate, generated_set
from arra.evaluate.reference import Reference
from arra.evaluate.report import versions
from arra.evaluate.settings import EvaluateConfig, MeasureConfig
from arra.evaluate.sweep_page import write_pages
from arra.evaluate.sweep_results import Point, results
from arra.evaluate.training_steps import History, history_of
from arra.files import read_json, write_json

FORMAT_VERSION = 1
NOT_THE_VALUE = ("device", "workers", "batch_size")
"""Settings under which a finished report is kept."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig(MeasureConfig):
    """Measures painters at several scales of guidance, and compares each at its own best.

    The same command again measures only what is missing. Exports of one run at several steps give
    values against training steps.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL ...")]
    """Exported models, run folders, hub ids or builtin:scenes; the others are compared with the
    first."""
    out: Path
    """Folder for sweep.json, sweep.md and sweep.html, and for a folder of each model with a report
    for each scale."""
    cfg: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 5.0)
    """Guidance scales, 1 = off."""

    def __post_init__(self) -> None:
        """Raises ValueError for a request that cannot be answered, before anything is loaded."""
        if not self.models or not self.cfg:
            raise ValueError("a sweep takes a MODEL or more, and one --cfg or more")
        for named, given in (("MODEL", self.models), ("--cfg", self.cfg)):
            if len(set(given)) < len(given):
                raise ValueError(f"{named} {' '.join(map(str, given))}: one is named twice")
        for cfg in self.cfg:
            self.at(self.models[0], cfg)

    def at(self, model: str, cfg: float) -> EvaluateConfig:
        """The evaluation of one model at one scale."""
        shared = {each.name: getattr(self, each.name) for each in fields(MeasureConfig)}
        return EvaluateConfig(**shared, model=model, cfg=cfg)


@dataclass(frozen=True)
class Opened:
    """What a model is, before it paints.

    Attributes:
        side: pixels of its pictures.
        weights: their SHA-256.
        prompts: SHA-256 of what it is going to paint.
    """

    side: int
    weights: str
    prompts: str
    history: History | None


def sweep(config: SweepConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures what is missing in `config.out`; returns what sweep.json holds.

    Raises:
        ValueError: models that cannot be compared, or a folder with other files.
    """
    kept = _kept(config.out)
    names = dict(zip(config.models, short_names(config.models), strict=True))
    reference = Reference(config.at(config.models[0], config.cfg[0]))
    opened = {model: _open(config.at(model, config.cfg[0]), reference) for model in config.models}
    _refuse_several_sizes(config, opened)
    config.out.mkdir(parents=True, exist_ok=True)
    points: list[Point] = []
    records: list[dict[str, Any]] = []
    for model in config.models:
        for cfg in sorted(config.cfg):
            folder = f"{names[model]}/cfg-{cfg:g}"
            asked = _asked(config, model, cfg)
            report = _finished(config.out, kept.get(folder), asked, opened[model], reference)
            if report is None:
                say(f"{model} with guidance {cfg:g}")
                report = evaluate(
                    replace(config.at(model, cfg), out=config.out / folder), reference
                )
                gc.collect()  # the painter, before the next one is loaded
            records.append({"model": names[model], "cfg": cfg, "folder": folder, "asked": asked})
            # What another sweep left here stays known until this one has come to it.
            left = [
                each for name, each in kept.items() if name not in {r["folder"] for r in records}
            ]
            write_json(config.out / SWEEP, _begun(config, names, opened, [*records, *left]))
            points.append(Point(names[model], cfg, open_report(str(config.out / folder))))
    found = _begun(config, names, opened, records)
    histories = {names[model]: opened[model].history for model in config.models}
    found |= results(points, histories)
    write_json(config.out / SWEEP, found)
    write_pages(config.out, found)
    return found


def short_names(models: Sequence[str]) -> list[str]:
    """Names for folders and tables: the ends of paths, as short as they can be told apart."""
    paths = [PurePath(model.replace(":", "-")) for model in models]
    # "." and ".." name no folder, and results must not lie outside of --out.
    parts = [(each if each.name.strip(".") else Path(each).resolve()).parts for each in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["-".join(each[-length:]).strip("/-") or "model" for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"{' and '.join(models)} are one and the same: name a model once")


def _open(config: EvaluateConfig, reference: Reference) -> Opened:
    """Opens a painter and forgets it: what is wrong with one is told before hours of work."""
    painted = generated_set(config, reference.real)
    assert isinstance(painted, PaintedSet)
    assert painted.captions is not None
    assert config.model is not None
    prompts = hash_of_texts(painted.captions)
    return Opened(painted.side, painted.settings["weights"], prompts, history_of(config.model))


def _refuse_several_sizes(config: SweepConfig, opened: dict[str, Opened]) -> None:
    sides = {model: each.side for model, each in opened.items()}
    if config.size is None and len(set(sides.values())) > 1:
        said = ", ".join(f"{model} {side}" for model, side in sides.items())
        raise ValueError(
            f"the models paint at several sizes ({said} pixels): say with --size to which all "
            f"pictures are cropped"
        )


def _kept(out: Path) -> dict[str, dict[str, Any]]:
    """What an earlier sweep measured into this folder, by folder.

    Raises:
        ValueError: there is something else.
    """
    file = out / SWEEP
    if not file.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"--out {out} is there already and is no sweep: name a new folder")
        return {}
    before = read_json(file)
    if not isinstance(before, dict) or before.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{file} is no sweep of this version: name a new folder")
    return {each["folder"]: each for each in before["reports"]}


def _asked(config: SweepConfig, model: str, cfg: float) -> dict[str, Any]:
    """The settings of a point that decide its values, as JSON has them."""
    asked: dict[str, Any] = {"model": model, "cfg": cfg}
    for each in fields(MeasureConfig):
        value = getattr(config, each.name)
        if each.name not in NOT_THE_VALUE:
            asked[each.name] = list(value) if isinstance(value, tuple) else value
    return asked


def _finished(
    out: Path,
    record: dict[str, Any] | None,
    asked: dict[str, Any],
    opened: Opened,
    reference: Reference,
) -> dict[str, Any] | None:
    """The report of a point that was measured before in just the same way; else None."""
    if record is None or record["asked"] != asked:
        return None
    file = out / record["folder"] / REPORT
    if not file.is_file():
        return None
    report = read_json(file)
    generated = report["generated"]
    same = (
        report["versions"] == versions()
        and report.get("real") == _as_json(reference.described())
        and report["extractors"] == _as_json(_described(reference.extractors))
        and generated["painted"]["weights"] == opened.weights
        and generated["prompts_sha256"] == opened.prompts
    )
    return report if same else None


def _described(extractors: Sequence[Extractor]) -> dict[str, Any]:
    return {each.name: each.described for each in extractors}


def _as_json(value: Any) -> Any:
    """With lists in the place of tuples, as a file has it."""
    if isinstance(value, dict):
        return {key: _as_json(each) for key, each in value.items()}
    return [_as_json(each) for each in value] if isinstance(value, list | tuple) else value


def _begun(
    config: SweepConfig,
    names: dict[str, str],
    opened: dict[str, Opened],
    records: list[dict[str, Any]],
) -> dict[str, Any]:
    models = []
    for model in config.models:
        history = opened[model].history
        models.append(
            {
                "name": names[model],
                "model": model,
                "weights": opened[model].weights,
                "steps": None if history is None else history.steps,
            }
        )
    return {
        "format_version": FORMAT_VERSION,
        "models": models,
        "cfg": sorted(config.cfg),
        "reports": records,
    }
