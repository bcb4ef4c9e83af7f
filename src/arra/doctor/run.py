"""`arra doctor RUN`: what became of a training run, and what to do now.

Read is what the run wrote of itself: config.json, run_card.json, log.jsonl, incidents.jsonl,
checkpoints, pictures. Each may be missing or broken, for a run that ended badly is the usual case.
"""

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from arra.config import TrainConfig
from arra.config_json import from_json
from arra.doctor.findings import Audit, Check, Finding, Level, counted, first
from arra.doctor.settings import RunConfig
from arra.files import place, read_json
from arra.models.run_folder import finished_checkpoints
from arra.train.guard import FILE as INCIDENTS
from arra.train.progress import clock
from arra.train.run_card import FILE as CARD
from arra.train.run_card import Session, is_alive

QUIET = 180.0
"""Seconds without a sign of life after which a run on another machine is taken for dead, at least;
a slower run has three of its own log intervals."""

SHORT = 160
"""Characters of an error that its line shows; run.json and the page have all of it."""

AGAIN = "the same command goes on from the last checkpoint"


@dataclass
class Evidence:
    """What a run folder says.

    Attributes:
        config: None if config.json is missing or of another version; `trouble` says why.
        claimed: the dataset's hash and the threads that config.json records.
        card: run_card.json, empty if there is none.
        sessions: of the card, oldest first.
        lines, incidents: those of log.jsonl and incidents.jsonl that can be read.
        garbled: file -> numbers of the lines that cannot.
    """

    folder: Path
    config: TrainConfig | None = None
    claimed: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    sessions: list[Session] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    incidents: list[dict[str, Any]] = field(default_factory=list)
    garbled: dict[str, list[int]] = field(default_factory=dict)
    trouble: list[Finding] = field(default_factory=list)

    @property
    def checkpoints(self) -> list[Path]:
        return finished_checkpoints(self.folder)

    @property
    def saved_step(self) -> int:
        """Steps of the newest checkpoint, 0 if there is none."""
        return int(self.checkpoints[-1].name.removeprefix("step-")) if self.checkpoints else 0

    @property
    def last_step(self) -> int:
        """The last step that anything tells of."""
        logged = self.lines[-1]["step"] if self.lines else 0
        return max(logged, self.saved_step)

    @property
    def done(self) -> bool:
        """Whether the last step was trained and saved."""
        return self.config is not None and self.saved_step >= self.config.steps

    def column(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of the log lines that have a number of that name."""
        pairs = [(line["step"], line.get(name)) for line in self.lines]
        return [(s, float(v)) for s, v in pairs if isinstance(v, int | float)]


def is_run(folder: Path) -> bool:
    """Whether a folder holds a training run, be it broken."""
    try:
        if "data_folder" in read_json(folder / "config.json"):
            return True
    except (OSError, ValueError, TypeError):
        pass
    return (folder / CARD).is_file() or (
        (folder / "log.jsonl").is_file() and (folder / "checkpoints").is_dir()
    )


def read_run(folder: Path) -> Evidence:
    """Reads what can be read; what cannot is in `trouble` and `garbled`."""
    seen = Evidence(folder)
    try:
        written = read_json(folder / "config.json")
        seen.claimed = written.pop("run", {})
        seen.config = from_json(TrainConfig, written)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        remedy = "without its settings a run cannot be resumed: put back the file from a copy"
        seen.trouble.append(Finding("damage", _said(error), "config.json", remedy=remedy))
    try:
        seen.card = read_json(folder / CARD)
        seen.sessions = [Session(**each) for each in seen.card["sessions"]]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError) as error:
        seen.card = {}
        seen.trouble.append(Finding("warning", f"cannot be read ({_said(error)})", CARD))
    lines = _lines(seen, "log.jsonl")
    seen.lines = [each for each in lines if isinstance(each.get("step"), int)]
    seen.incidents = _lines(seen, INCIDENTS)
    return seen


def examine(config: RunConfig) -> tuple[Audit, Evidence]:
    """Examines a run. Nothing is written.

    Args:
        config: the folder, and where its dataset is now.
    """
    from arra.doctor import run_curves, run_files

    folder = place(config.run)
    seen = read_run(folder)
    checks = [
        ending_check(seen, config.data),
        run_files.files_check(seen),
        run_files.data_check(seen, config.data),
        run_files.checkpoints_check(seen),
        run_curves.losses_check(seen),
        run_curves.alignment_check(seen),
        run_curves.steering_check(seen),
        run_curves.speed_check(seen),
        run_files.pictures_check(seen),
    ]
    return Audit(folder, _title(seen), checks, config.strict, kind="run"), seen


# ---- how it ended --------------------------------------------------------------------------------


def ending_check(seen: Evidence, data: str | None = None) -> Check:
    """How the run ended, what is lost, and how to go on."""
    how, said, error = _ending(seen)
    levels: dict[str, Level] = {
        "failed": "damage",
        "killed": "damage",
        "unknown": "damage",
        "never": "damage",
    }
    levels |= {"preempted": "warning", "interrupted": "warning", "stopped": "warning"}
    findings: list[Finding] = []
    if how in levels:
        remedy = f"to go on: {resume_command(seen, data)}" if seen.config else AGAIN
        findings.append(Finding(levels[how], _left(seen), "run", remedy=remedy))
    lost = seen.last_step - seen.saved_step
    if lost > 0 and how not in ("running", "finished"):
        findings.append(Finding("note", _lost(seen, lost), "run"))
    earlier = [s for s in seen.sessions[:-1] if s.how != "finished"]
    if earlier:
        names = first(f"{s.how} at step {s.to_step}" for s in earlier)
        what = f"{counted(len(earlier), 'session')} before this one"
        findings.append(Finding("note", what, "run", len(earlier), names))
    facts = {
        "how": how,
        "error": error,
        "last_step": seen.last_step,
        "saved_step": seen.saved_step,
        "steps_lost": max(lost, 0) if how != "finished" else 0,
        "resume": resume_command(seen, data) if seen.config and how != "finished" else None,
    }
    return Check("ending", said, findings, facts)


def _ending(seen: Evidence) -> tuple[str, str, str]:
    """(how, in one line, what it failed with)."""
    session = seen.sessions[-1] if seen.sessions else None
    where = f"after step {seen.last_step:,}{_of_steps(seen)}"
    if seen.done:
        return "finished", f"finished: all {seen.saved_step:,} steps are trained and saved", ""
    if session is None:
        if not seen.lines and not seen.checkpoints:
            why = "it never trained a step: loading failed, or was killed"
            return "never", why, ""
        return "unknown", f"it ended {where}; nothing says how (no {CARD} to read)", ""
    if session.ended is None:
        return _without_end(seen, session, where)
    at = f"{where}, at {session.ended}"
    told = {
        "failed": f"failed {where}: {_short(session.error)}",
        "preempted": f"asked to stop (SIGTERM) {at}; its state was saved",
        "interrupted": f"interrupted (Ctrl-C) {at}",
        "stopped": f"ended {at}, as it was told to, before its last step",
        "finished": f"said to be finished {at}, but the last checkpoint is gone",
    }
    how = "unknown" if session.how == "finished" else session.how
    return how, told.get(session.how, f"{session.how} {at}"), session.error


def _without_end(seen: Evidence, session: Session, where: str) -> tuple[str, str, str]:
    """A session that wrote no end: it goes on, or was killed."""
    alive, quiet = is_alive(session.process), time.time() - _last_sign(seen.folder)
    if alive is None:
        alive = quiet < max(QUIET, 3 * _interval(seen))
    if alive:
        return "running", f"running: {where}, last sign {clock(quiet)} ago", ""
    when = datetime.fromtimestamp(_last_sign(seen.folder), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    why = (
        f"killed {where} (last sign at {when}): its process is gone and wrote no end, as after "
        f"SIGKILL, a lack of memory, or a lost machine"
    )
    return "killed", why, ""


def _last_sign(folder: Path) -> float:
    """When anything in the folder was last written."""
    names = ("config.json", CARD, "log.jsonl", INCIDENTS, "checkpoints", "samples")
    files = [folder / name for name in names] + list((folder / "tensorboard").glob("*"))
    files += list((folder / "checkpoints").glob(".*"))
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def _interval(seen: Evidence) -> float:
    """Seconds between the last log lines."""
    if seen.config is None or not seen.lines:
        return 0.0
    rate = seen.lines[-1].get("images_per_s") or 0.0
    return seen.config.log.every * seen.config.batch_size / rate if rate > 0 else 0.0


def _left(seen: Evidence) -> str:
    if seen.config is None:
        return "it is not known how many steps were left"
    return f"{counted(seen.config.steps - seen.saved_step, 'step')} of {seen.config.steps:,} left"


def _lost(seen: Evidence, steps: int) -> str:
    rate = seen.lines[-1].get("images_per_s", 0.0) if seen.lines else 0.0
    seconds = steps * seen.config.batch_size / rate if seen.config and rate > 0 else 0.0
    worth = f" (about {clock(seconds)} of training)" if seconds else ""
    saved = f"step {seen.saved_step:,}" if seen.saved_step else "the start"
    return f"{counted(steps, 'step')} since {saved} must be trained again{worth}"


def resume_command(seen: Evidence, data: str | None = None) -> str:
    """The exact command that goes on with the run."""
    run = shlex.quote(str(seen.folder))
    flags = f"train {run}/config.json --out {run}"
    flags += f" --data {shlex.quote(data)}" if data else ""
    flags += _passing_over(seen)
    session = seen.sessions[-1] if seen.sessions else None
    if session is None or session.processes == 1:
        return f"arra {flags}"
    each = session.processes // session.machines
    nodes = f" --nnodes {session.machines}" if session.machines > 1 else ""
    return f"torchrun{nodes} --nproc-per-node {each} -m arra.cli {flags}"


def _passing_over(seen: Evidence) -> str:
    """The flag that gets a run past the batches that stopped it: it would meet them again."""
    stops = [each for each in seen.incidents if each.get("kind") == "stop"]
    if not stops or seen.saved_step >= stops[-1]["step"]:
        return ""
    before = seen.config.data.skip_steps if seen.config else ()
    steps = (*before, f"{stops[-1]['first']}-{stops[-1]['step']}")
    return f" --data.skip-steps {' '.join(dict.fromkeys(steps))}"


def _short(text: str) -> str:
    return text if len(text) <= SHORT else f"{text[: SHORT - 1]}…"


# ---- reading -------------------------------------------------------------------------------------


def _lines(seen: Evidence, name: str) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; others are noted, and so is NaN."""
    path = seen.folder / name
    if not path.is_file():
        return []
    good, bad = [], []
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            good.append(value)
        else:
            bad.append(number)
    if bad:
        seen.garbled[name] = bad
    return good


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _of_steps(seen: Evidence) -> str:
    return f" of {seen.config.steps:,}" if seen.config else ""


def _title(seen: Evidence) -> str:
    config, card = seen.config, seen.card
    if config is None:
        return f"{seen.folder}: a training run"
    model, hardware = card.get("model", {}), card.get("hardware", {})
    size = f", {model['parameters'] / 1e6:,.1f}M parameters" if "parameters" in model else ""
    parts = [f"recipe {config.recipe}{size}", f"{config.steps:,} steps of {config.batch_size}"]
    parts += [_aligned(config)]
    if hardware:
        machine = hardware.get("accelerator") or hardware.get("processor") or "unknown hardware"
        parts.append(f"{counted(hardware.get('processes', 1), 'process', 'processes')}, {machine}")
    return f"{seen.folder}: {', '.join(parts)}"


def _aligned(config: TrainConfig) -> str:
    if config.align.weight == 0:
        return "plain"
    layers: Sequence[int] = config.align.layer
    return f"aligned at layer {' '.join(map(str, layers))}"
