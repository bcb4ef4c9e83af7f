"""Sums and counts that stay on the device until a log line is due: one read per log interval."""

from collections.abc import Mapping

from torch import Tensor

from arra.objective import Terms


class Tally:
    """Running sums and counts of named quantities since the last log line."""

    def __init__(self, saved: Mapping[str, tuple[float, float]] | None = None) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, float] = {}
        for name, (total, count) in (saved or {}).items():
            self.sums[name], self.counts[name] = total, count

    def add(self, name: str, total: Tensor | float, count: float) -> None:
        value = total.detach().double() if isinstance(total, Tensor) else total
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0) + count

    def add_terms(self, terms: Terms) -> None:
        for name, total in terms.sums.items():
            self.add(name, total, terms.counts[name])
        for name, (total, count) in terms.metrics.items():
            self.add(name, total, count)

    def means(self) -> dict[str, float]:
        """Reads the device once."""
        return {n: float(s) / self.counts[n] for n, s in self.sums.items() if self.counts[n]}

    def saved(self) -> dict[str, tuple[float, float]]:
        """For a checkpoint: what an interrupted interval has gathered."""
        return {name: (float(s), self.counts[name]) for name, s in self.sums.items()}
