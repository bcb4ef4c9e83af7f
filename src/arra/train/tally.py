"""What each step adds up stays on the device until a log line or a checkpoint is due.

A step's sums are one small vector. Those of all steps since the last reading come back in one copy,
are added over the processes, and only then become numbers. Steps whose update was refused
(guard.py) are kept out of the means, sums and counts both.

Legend: n values of one step, S steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from arra.objective import Terms
from arra.train.world import World


class StepSums:
    """Named sums and counts of one optimizer step, or of a validation, on this process.

    Attributes:
        counts: name -> how many things its sum is over.
        terms: names of those that are terms of the objective.
        known: numbers of this process that no device has to tell; they count in every step.
    """

    def __init__(self) -> None:
        self.counts: dict[str, float] = {}
        self.terms: tuple[str, ...] = ()
        self.known: dict[str, float] = {}
        self._parts: dict[tuple[str, ...], Tensor] = {}

    def add(self, name: str, total: Tensor, count: float) -> None:
        self._add({name: (total, count)})

    def add_terms(self, terms: Terms, counted: bool = True) -> None:
        """Adds those of one micro-batch; not `counted`, as zeros: its names must be there still."""
        self.terms = tuple(terms.sums)
        pairs = {k: (v, terms.counts[k]) for k, v in terms.sums.items()} | dict(terms.metrics)
        if not counted:
            pairs = {name: (torch.zeros_like(v), 0) for name, (v, _) in pairs.items()}
        self._add(pairs)

    def _add(self, pairs: Mapping[str, tuple[Tensor, float]]) -> None:
        names = tuple(pairs)
        vector = torch.stack([total.detach() for total, _ in pairs.values()]).double()
        before = self._parts.get(names)
        self._parts[names] = vector if before is None else before + vector
        for name, (_, count) in pairs.items():
            self.counts[name] = self.counts.get(name, 0) + count

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for names in self._parts for name in names)

    def values(self) -> Tensor:
        """(n,) float64, in the order of `names`."""
        return torch.cat(list(self._parts.values()))


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step as the host knows it.

    Attributes:
        step: from 0.
        refused: whether its update was left out.
        terms: names of the objective's terms.
        sums, counts: over all processes; sums that are not finite are counted as 0.
        by_rank: of a refused step, each process's own means as they are.
    """

    step: int
    refused: bool
    terms: tuple[str, ...]
    sums: Mapping[str, float]
    counts: Mapping[str, float]
    by_rank: list[dict[str, float]] = field(default_factory=list)

    def mean(self, name: str) -> float:
        return self.sums[name] / self.counts[name]


class Tally:
    """Means since the last log line, of all processes.

    The processes must add the same steps with the same names, and read at the same steps.
    """

    def __init__(
        self, world: World, saved: Mapping[str, tuple[float, float]] | None = None
    ) -> None:
        self.world = world
        self.sums = {name: total for name, (total, _) in (saved or {}).items()}
        self.counts = {name: count for name, (_, count) in (saved or {}).items()}
        self._unread: list[tuple[int, StepSums, Tensor]] = []

    def add(self, step: int, sums: StepSums, refused: Tensor) -> None:
        """Keeps what step `step` added up; `refused`: 0 or 1, whether its update was left out."""
        self._unread.append((step, sums, torch.cat([sums.values(), refused.double()[None]])))

    def read(self) -> list[StepRecord]:
        """Brings what was added since the last call to the host: one read of the device."""
        steps, self._unread = self._unread, []
        if not steps:
            return []
        sizes = [len(values) for *_, values in steps]
        own = torch.cat([values for *_, values in steps]).cpu()
        counts = [count for _, sums, _ in steps for count in (*sums.counts.values(), 0.0)]
        both = torch.stack([own, torch.tensor(counts, dtype=torch.float64)])
        known = [number for _, sums, _ in steps for number in sums.known.values()]
        flat = torch.cat([both.nan_to_num(0.0, 0.0, 0.0).flatten(), own.new_tensor(known)])
        total = self.world.total(flat)
        numbers = iter(total[both.numel() :].tolist())
        totals = total[: both.numel()].view_as(both).split(sizes, dim=1)
        records = []
        for (step, sums, _), own_2n, total_2n in zip(
            steps, both.split(sizes, dim=1), totals, strict=True
        ):
            records.append(self._record(step, sums, own_2n, total_2n))
            self._keep({name: next(numbers) for name in sums.known}, dict.fromkeys(sums.known, 1))
            if not records[-1].refused:
                self._keep(records[-1].sums, records[-1].counts)
        return records

    def _record(self, step: int, sums: StepSums, own_2n: Tensor, total_2n: Tensor) -> StepRecord:
        own, count = own_2n[:, :-1]
        refused = bool(own_2n[0, -1])
        means = torch.where(count > 0, own / count, own)
        ranks = self.world.on_all(means.tolist) if refused else []
        summed, counted = total_2n[:, :-1].tolist()
        return StepRecord(
            step,
            refused,
            sums.terms,
            dict(zip(sums.names, summed, strict=True)),
            dict(zip(sums.names, counted, strict=True)),
            [dict(zip(sums.names, each, strict=True)) for each in ranks],
        )

    def _keep(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> None:
        for name, total in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + total
            self.counts[name] = self.counts.get(name, 0.0) + counts[name]

    def means(self) -> dict[str, float]:
        """Of what was read; a name that counted nothing is left out."""
        assert not self._unread, "read first"
        return {n: total / self.counts[n] for n, total in self.sums.items() if self.counts[n]}

    def saved(self) -> dict[str, tuple[float, float]]:
        """For a checkpoint: what was read of an interval that is not over. The same on each."""
        assert not self._unread, "read first"
        return {name: (total, self.counts[name]) for name, total in self.sums.items()}

    def clear(self) -> None:
        """Begins the next interval."""
        assert not self._unread, "read first"
        self.sums, self.counts = {}, {}


def mean_of(sums: StepSums, world: World) -> dict[str, float]:
    """The means of a validation over all processes, which must have added the same names."""
    tally = Tally(world)
    tally.add(0, sums, torch.zeros((), device=sums.values().device))
    tally.read()
    return tally.means()
