"""When numbers go wrong: updates that are not finite are refused, spikes are told, a run stops.

The decision is the device's: nothing waits for the host. An update is left out if a term of the
loss or a gradient norm is not finite on any process; after three in a row every further one is left
out too, so that the weights stay those before the first of them until the host has looked. It looks
when a log line or a checkpoint is due. What it found is in incidents.jsonl, one line each:

    kind     skipped, spike, passed over (as --data.skip-steps asked), or stop
    step     as in log.jsonl: the first one is 1
    rank     the process at fault; null = all of them, or it cannot be told
    terms    ar, z, gva/NAME, gradient of the model, gradient of the projectors
    values   term -> its mean on that process; what is not a number is a string
    ids      of the images of its share of the batch
    lr       learning rate

Steps are counted from 0 in the code and from 1 in whatever is read by people.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from arra.config import TrainConfig
from arra.data.loader import Loader
from arra.files import atomic_write
from arra.train.optim import learning_rate
from arra.train.tally import StepRecord
from arra.train.world import World

FILE = "incidents.jsonl"
LIMIT = 3
"""Refused updates in a row after which a run stops: a single one may be a batch's fault, but the
weights do not change by waiting."""
WINDOW = 128
"""Steps that a loss is compared with, and half of them before anything is called a spike:
allenai/OLMo-core fa6c501, optim/skip_step_optimizer.py."""
SIGMAS = 6.0
"""A spike lies this many standard deviations above what is usual (same source). Where it takes mean
and deviation, here are median and 1.4826 x the median distance from it, which equals the standard
deviation of normal values: a spike within the window hardly moves them, so the next one is seen."""
LEAST = 0.01
"""... and by at least this fraction of the usual: losses learned by heart hardly vary at all."""
SHOWN = 4
"""Ids that a message names; the file has them all."""

GRADIENTS = {
    "grad_norm": "gradient of the model",
    "grad_norm/projectors": "gradient of the projectors",
}


class Guard:
    """Judges every step on the device, and tells people what happened.

    Attributes:
        skipped: updates that were left out since the run began.
        streak: how many of them were the last steps read, without a break.
        kept: steps done at the last checkpoint, 0 = there is none.
    """

    def __init__(self, config: TrainConfig, folder: Path, world: World, loader: Loader) -> None:
        self.config, self.folder, self.world, self.loader = config, folder, world, loader
        self.skipped = self.streak = self.kept = 0
        # float32 is the type of the flag that optimizers take.
        self._row = torch.zeros((), dtype=torch.float32, device=world.device)
        self._shut = torch.zeros((), dtype=torch.float32, device=world.device)
        self._usual: dict[str, deque[float]] = {}
        self._high: set[str] = set()  # terms that the step before left high: one spike, one line
        self._refused: list[dict[str, Any]] = []
        self._written: set[str] | None = None

    # ---- on the device --------------------------------------------------------------------------

    def judge(self, values: Tensor) -> Tensor:
        """Whether a step must leave the weights as they are: float32 0 or 1, the same everywhere.

        Args:
            values: (n,) all that this process knows of the step: terms, gradient norms.
        """
        bad = 1 - torch.isfinite(values).all().float()
        if self.world.size > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        self._row = (self._row + 1) * bad
        self._shut = torch.maximum(self._shut, (self._row >= LIMIT).float())
        return torch.maximum(bad, self._shut)

    # ---- on the host ----------------------------------------------------------------------------

    def passes_over(self, step: int) -> bool:
        """Whether --data.skip-steps leaves this step's batch out."""
        if not any(step + 1 in steps for steps in self.config.data.skipped):
            return False
        self.skipped += 1
        self._write(self._line("passed over", step, None, {}))
        return True

    def inspect(self, records: Sequence[StepRecord]) -> None:
        """Takes note of steps that were read, in their order; the same on every process.

        Raises:
            FloatingPointError: three in a row were not finite.
        """
        for record in records:
            if not record.refused:
                self.streak, self._refused = 0, []
                self._look_for_spikes(record)
                continue
            self.skipped += 1
            self.streak += 1
            self._tell_refused(record)
            if self.streak == LIMIT:
                raise FloatingPointError(self._stop(record.step))

    def saved(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "skipped": self.skipped,
            "streak": self.streak,
            "usual": {name: list(values) for name, values in self._usual.items()},
            "high": sorted(self._high),
        }

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """Goes on from a checkpoint after `step` optimizer steps; 0 = from the start."""
        self.kept = step
        self.skipped, self.streak = saved["skipped"], saved["streak"]
        self._row.fill_(self.streak)
        self._usual = {name: deque(v, maxlen=WINDOW) for name, v in saved["usual"].items()}
        self._high = set(saved["high"])

    # ---- what is told ---------------------------------------------------------------------------

    def _tell_refused(self, record: StepRecord) -> None:
        # A gradient is summed over processes before anyone sees it; a term is a process's own.
        ranks = [
            rank
            for rank, own in enumerate(record.by_rank)
            if not all(math.isfinite(own[name]) for name in record.terms)
        ]
        everyone = len(ranks) in (0, self.world.size)
        for rank in [None] if everyone else ranks:
            own = record.by_rank[rank or 0]
            named = {name: own[name] for name in (*record.terms, *GRADIENTS) if name in own}
            wrong = {n: v for n, v in own.items() if not math.isfinite(v)}
            terms = [_said(name) for name in wrong if name in named] or list(wrong)
            values = {_said(name): value for name, value in (named | wrong).items()}
            line = self._line("skipped", record.step, rank, values, terms)
            self._refused.append(line)
            self._write(line)
            self._print(f"step {record.step + 1} is skipped: {_fault(line)}")

    def _look_for_spikes(self, record: StepRecord) -> None:
        found, usual = {}, {}
        means = {name: record.mean(name) for name in record.terms if record.counts[name]}
        high = set()
        for name, value in means.items():
            before = self._usual.setdefault(name, deque(maxlen=WINDOW))
            if len(before) >= WINDOW // 2:
                middle = statistics.median(before)
                spread = 1.4826 * statistics.median(abs(each - middle) for each in before)
                if value > middle + max(SIGMAS * spread, LEAST * abs(middle)):
                    high.add(name)
                    found[name], usual[name] = value, middle
            before.append(value)
        fresh, self._high = high - self._high, high
        if not fresh:
            return
        line = self._line("spike", record.step, None, means, sorted(fresh))
        self._write({**line, "usual": usual})
        told = ", ".join(f"{n} is {found[n]:.4g}, usually {usual[n]:.4g}" for n in sorted(fresh))
        self._print(f"step {record.step + 1}: a spike, {told} (images {_some(line['ids'])})")

    def _stop(self, step: int) -> str:
        first, last = step + 2 - LIMIT, step + 1
        kept = f"step-{self.kept:08d}" if self.kept else None
        line = self._line("stop", step, None, {}, self._refused[-1]["terms"])
        self._write({**line, "first": first, "ids": [], "checkpoint": kept})
        faults = "; ".join(f"step {each['step']}: {_fault(each)}" for each in self._refused)
        dtype = "" if self.config.dtype == "float32" else " or --dtype float32"
        return (
            f"the run stops, because {LIMIT} steps in a row were not finite ({faults}). The "
            f"learning rate was {line['lr']:.3g}. None of them moved the weights, and "
            f"{f'checkpoint {kept} is kept' if kept else 'there is no checkpoint yet'}. The "
            f"same command meets the same batches: add --data.skip-steps {first}-{last} to pass "
            f"over them (earlier ones too, if the loss had risen before), or start another run "
            f"with a lower --optim.lr{dtype}. All ids are in {self.folder / FILE}"
        )

    def _line(
        self,
        kind: str,
        step: int,
        rank: int | None,
        values: Mapping[str, float],
        terms: Sequence[str] = (),
    ) -> dict[str, Any]:
        return {
            "kind": kind,
            "step": step + 1,
            "rank": rank,
            "terms": list(terms),
            "values": {n: v if math.isfinite(v) else str(v) for n, v in values.items()},
            "ids": self._ids(step, rank),
            "lr": learning_rate(step, self.config.steps, self.config.optim),
        }

    def _ids(self, step: int, rank: int | None) -> list[str]:
        """Each process knows its own: the others' shards may not be at hand."""
        each = self.world.on_all(lambda: self.loader.ids(step))
        return each[rank] if rank is not None else [name for own in each for name in own]

    def _write(self, line: Mapping[str, Any]) -> None:
        """A diary: a resumed run that meets the same again does not write it again."""
        if not self.world.is_main:
            return
        path, text = self.folder / FILE, json.dumps(line)
        if self._written is None:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            whole = [each for each in lines if each.endswith("}")]
            self._written = set(whole)
            if whole != lines:  # killed in the middle of a line
                with atomic_write(path) as temporary:
                    temporary.write_text("".join(f"{x}\n" for x in whole), encoding="utf-8")
        if text not in self._written:
            self._written.add(text)
            with open(path, "a", encoding="utf-8") as handle:
                handle.write(f"{text}\n")

    def _print(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)


def _said(name: str) -> str:
    return GRADIENTS.get(name, name)


def _fault(line: Mapping[str, Any]) -> str:
    wrong = ", ".join(f"{term} {line['values'][term]}" for term in line["terms"])
    place = "" if line["rank"] is None else f" on rank {line['rank']}"
    return f"{wrong}{place}, images {_some(line['ids'])}"


def _some(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return ", ".join(ids[:SHOWN]) + more
