"""Which frozen encoders a painter was aligned to, and whether one of them is about to judge it.

A painter that was pulled towards an encoder pleases that encoder: measured by it, alignment looks
better than it is. Runs, exports and painted folders say what their teachers were.

An encoder is told by its fingerprint: the same weights saved in another format are another one.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arra.files import place, read_json
from arra.resolve import resolve_folder

PIPELINE, RUN_CARD, ONLINE = "pipeline.json", "run_card.json", "online.json"


@dataclass(frozen=True)
class Teacher:
    """An encoder that a painter was aligned to.

    Attributes:
        name: as the painter's data calls it.
        fingerprint: of the encoder with its pooling.
        pooling: "" where that is not known any more.
        dtype: what it computed in.
    """

    name: str
    fingerprint: str
    pooling: str = ""
    dtype: str = "float32"


@dataclass(frozen=True)
class Painter:
    """What a painter says of its training.

    Attributes:
        aligned: whether it, or what it was trained from, was aligned at all.
        teachers: to what; empty with `aligned`: it does not say.
    """

    aligned: bool
    teachers: tuple[Teacher, ...]


def painter_of(model: str) -> Painter | None:
    """What a run, an export or a bundled model says; None where it says nothing of that kind.

    `model` was opened before: a hub id's files are here.
    """
    path = Path(model).expanduser()
    if path.exists() and not path.is_dir():
        return None
    folder = resolve_folder(model, "model", weights=False)
    if (folder / RUN_CARD).is_file():
        return _of_run(folder)
    if not (folder / PIPELINE).is_file():
        return None
    origin = read_json(folder / PIPELINE).get("origin") or {}
    aligned = float((origin.get("alignment") or {}).get("weight", 0)) > 0
    teachers = tuple(Teacher(**each) for each in origin.get("teachers", []))
    return Painter(aligned or bool(teachers), teachers)


def painter_in(settings: Mapping[str, Any]) -> Painter | None:
    """The same from the settings.json of a folder that `arra generate` painted."""
    said = settings.get("painter")
    if said is None:
        return None
    return Painter(said["aligned"], tuple(Teacher(**each) for each in said["teachers"]))


def told_by(painter: Painter | None) -> dict[str, Any] | None:
    """What painter_in reads."""
    return None if painter is None else asdict(painter)


def _of_run(run: Path) -> Painter:
    """A run's loss pulls towards the chosen targets; a baseline's towards none. What it began with
    may have been aligned before."""
    config = read_json(run / "config.json")
    base = config["model_path"] or ""
    here = base.startswith("builtin:") or (base and place(base).is_dir())
    before = painter_of(base) if here else None
    teachers = () if before is None else before.teachers
    aligned = before is not None and before.aligned
    if not config["align"]["weight"]:
        return Painter(aligned, teachers)
    chosen = config["align"]["targets"]
    known = _poolings(config, run)
    own = tuple(
        Teacher(name, fingerprint, *known.get(fingerprint, ()))
        for name, fingerprint in read_json(run / RUN_CARD)["hashes"]["encoders"].items()
        if not chosen or name in chosen
    )
    return Painter(True, tuple(dict.fromkeys((*teachers, *own))))


def recorded(run: Path) -> list[dict[str, str]]:
    """A run's teachers, for the pipeline.json of its export."""
    return [asdict(teacher) for teacher in _of_run(run).teachers]


def same_encoder(judge: Mapping[str, Any], painter: Painter | None) -> str | None:
    """A warning where a judge is a teacher of the painter, or may be; else None.

    Args:
        judge: how an encoder is described in a report (describe_encoder); other networks, which
            have no pooling, are never teachers. One that pools otherwise than the teacher did is
            loaded once more for each pooling in question.
    """
    if painter is None or not painter.aligned or not judge.get("pooling"):
        return None
    if not painter.teachers:
        return (
            f"the painter was aligned to an encoder that it does not name: if that was "
            f"{judge['name']}, what {judge['name']} says of it is circular"
        )
    for teacher in painter.teachers:
        if teacher.fingerprint in _fingerprints(judge, teacher):
            return (
                f"{judge['name']} is the encoder that the painter was aligned to ({teacher.name}): "
                f"what it says of it is circular, so judge with another one as well"
            )
    return None


def _fingerprints(judge: Mapping[str, Any], teacher: Teacher) -> set[str]:
    """The judge's, as it is and as it would be pooled like the teacher."""
    from arra.encoders import POOLINGS, load_encoder

    found = {str(judge["fingerprint"])}
    alike = (judge["pooling"], judge["dtype"]) == (teacher.pooling, teacher.dtype)
    if teacher.fingerprint in found or alike or judge["pooling"] == "own":
        return found
    for pooling in [teacher.pooling] if teacher.pooling else POOLINGS:
        try:
            encoder = load_encoder(judge["spec"], pooling, grids=True, dtype=teacher.dtype)
        except ValueError:  # a pooling that this encoder does not have
            continue
        found.add(encoder.fingerprint)
    return found


def _poolings(config: Mapping[str, Any], run: Path) -> dict[str, tuple[str, str]]:
    """Fingerprint -> (pooling, dtype), where the dataset is still in its place."""
    manifest = place(config["data_folder"]) / "manifest.json"
    infos: list[Mapping[str, Any]] = []
    if manifest.is_file():
        content = read_json(manifest)
        infos += [*content.get("features", {}).values(), *content.get("grids", {}).values()]
    if (run / ONLINE).is_file():
        infos += [v for v in read_json(run / ONLINE).values() if isinstance(v, dict)]
    return {
        info["encoder"]: (info["pooling"], info.get("dtype", "float32"))
        for info in infos
        if "encoder" in info and "pooling" in info
    }
