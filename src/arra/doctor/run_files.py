"""What a run folder holds: its files, its dataset, its checkpoints, its pictures."""

import shutil
from pathlib import Path
from typing import Any

from arra.data.manifest import FILE as MANIFEST
from arra.doctor.findings import Check, Finding, Level, counted, first
from arra.doctor.run import Evidence
from arra.files import is_abandoned, place, reached, sha256_of
from arra.models.run_folder import Damaged, read_state

GB = 1e9


def files_check(seen: Evidence) -> Check:
    """Whether the run's own records can be read."""
    findings = list(seen.trouble)
    for name, numbers in seen.garbled.items():
        what = f"{counted(len(numbers), 'line')} cannot be read"
        last = numbers == [len(seen.lines) + len(numbers)]
        level: Level = "note" if last else "warning"
        why = "the last one was cut off by a kill; resuming drops it" if last else ""
        findings.append(
            Finding(
                level,
                what,
                name,
                len(numbers),
                first(f"line {n}" for n in numbers),
                why,
            )
        )
    return Check("files", f"{counted(len(seen.lines), 'log line')}", findings)


def data_check(seen: Evidence, data: str | None) -> Check:
    """Whether the dataset is still there, and still the same."""
    if seen.config is None:
        return Check("data", "", [Finding("not checked", "config.json names the dataset", "data")])
    named = data or seen.config.data_folder
    manifest = place(named) / MANIFEST
    level: Level = "note" if seen.done else "damage"
    if not reached(manifest):
        where = "nothing goes on without it: say where it is now with --data"
        what = f"the dataset is not there ({named})"
        return Check("data", "", [Finding(level, what, "data", remedy="" if seen.done else where)])
    found, expected = sha256_of(manifest), seen.claimed.get("dataset")
    if expected is None:
        why = "config.json does not record which dataset it was trained on"
        return Check("data", str(named), [Finding("not checked", why, "data")])
    if found != expected:
        what = f"{named} holds another dataset than the run was begun with"
        remedy = "say where the run's own is with --data; resuming with this one is refused"
        return Check("data", "", [Finding(level, what, "data", remedy=remedy)])
    return Check("data", f"{named}: as the run was begun with", facts={"manifest": found})


# ---- checkpoints ---------------------------------------------------------------------------------


def checkpoints_check(seen: Evidence) -> Check:
    """Every byte of every checkpoint, what is left over, and whether there is room for the next."""
    folder = seen.folder / "checkpoints"
    findings: list[Finding] = []
    facts: list[dict[str, Any]] = []
    sizes: list[int] = []
    whole: list[Path] = []
    for checkpoint in seen.checkpoints:
        why, level = _fault(checkpoint)
        size = _bytes(checkpoint)
        facts.append({"name": checkpoint.name, "bytes": size, "fault": why})
        sizes.append(size)
        if why is None:
            whole.append(checkpoint)
        else:
            findings.append(Finding(level, why, checkpoint.name))
    if findings and seen.checkpoints[-1] not in whole and findings[-1].level == "warning":
        last = findings[-1]
        findings[-1] = Finding("damage", last.what, last.where, remedy=_falls_back(whole))
    findings += _leftovers(folder)
    if not seen.checkpoints and seen.last_step:
        what = f"none, after {counted(seen.last_step, 'step')}"
        remedy = "a run that ends now starts anew: lower --checkpoint.every"
        findings.append(Finding("warning", what, "checkpoints", remedy=remedy))
    findings += _room(seen, sizes)
    newest = f", the last after step {seen.saved_step:,}" if whole else ""
    said = f"{len(whole)} whole of {len(seen.checkpoints)}{newest}; {sum(sizes) / GB:.3g} GB"
    return Check("checkpoints", said, findings, {"checkpoints": facts})


def _fault(checkpoint: Path) -> tuple[str | None, Level]:
    """What is wrong with a checkpoint, and how bad that is."""
    try:
        state = read_state(checkpoint)
    except Damaged as error:
        return f"damaged: {_without(error, checkpoint)}", "warning"
    except ValueError as error:
        return str(error), "not checked"
    for name, expected in state["sha256"].items():
        if sha256_of(checkpoint / name) != expected:
            return f"damaged: {name} is not as it was written (its SHA-256 differs)", "warning"
    return None, "note"


def _falls_back(whole: list[Path]) -> str:
    kept = f"goes on from {whole[-1].name}" if whole else "starts anew"
    return f"the same command puts it aside and {kept}"


def _without(error: Exception, folder: Path) -> str:
    return str(error).replace(f"{folder}/", "")


def _leftovers(folder: Path) -> list[Finding]:
    """Checkpoints that were being written when the process died, and damaged ones put aside."""
    partial = [path for path in folder.glob(".*.partial") if is_abandoned(path)]
    aside = sorted(folder.glob("damaged-*"))
    findings = []
    for paths, what in ((partial, "never finished"), (aside, "damaged, put aside")):
        if paths:
            size = sum(map(_bytes, paths)) / GB
            findings.append(
                Finding(
                    "note",
                    f"{counted(len(paths), 'folder')} {what}, {size:.3g} GB",
                    "checkpoints",
                    len(paths),
                    first(path.name for path in paths),
                    "may be removed",
                )
            )
    return findings


def _room(seen: Evidence, sizes: list[int]) -> list[Finding]:
    """A new checkpoint is written whole before an old one goes."""
    if not sizes or seen.done:
        return []
    free = shutil.disk_usage(seen.folder).free
    left = seen.config.steps - seen.saved_step if seen.config else 0
    every = seen.config.checkpoint.every if seen.config else 1
    keeps_all = seen.config is not None and seen.config.checkpoint.keep == 0
    needed = sizes[-1] * (-(-left // every) if keeps_all else 1)
    if free >= 1.1 * needed:
        return []
    what = f"{free / GB:.3g} GB are free, and {needed / GB:.3g} GB will be written before any goes"
    return [Finding("warning", what, "disk", remedy="free some, or resume with --checkpoint.keep")]


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


# ---- pictures ------------------------------------------------------------------------------------


def pictures_check(seen: Evidence) -> Check:
    """Whether the sample grids and probes that were asked for are there."""
    findings, said = [], []
    if seen.config is None:
        return Check("pictures", "")
    every, log = seen.config.log.sample_every, seen.config.log
    asked = {"samples": every, "probes": log.probe_every}
    for folder, period in asked.items():
        there = {path.stem for path in (seen.folder / folder).glob("step-*.png")}
        said += [f"{len(there)} {folder}"] if there or period else []
        if folder == "probes":  # on log lines only
            due = {line["step"] for line in seen.lines if "probe/chance" in line}
        else:
            due = set(range(period, seen.saved_step + 1, period)) if period else set()
        missing = sorted(step for step in due if f"step-{step:08d}" not in there)
        if missing:
            what = f"{counted(len(missing), 'picture')} missing"
            steps = first(f"step {step}" for step in missing)
            findings.append(Finding("warning", what, folder, len(missing), steps))
    return Check("pictures", ", ".join(said) or "none asked for (--log.sample-every)", findings)
