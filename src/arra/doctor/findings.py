"""What an audit says: findings, the checks that made them, and the verdict over all."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Level = Literal["damage", "warning", "not checked", "note"]

LEVELS: tuple[Level, ...] = ("damage", "warning", "not checked", "note")
"""From worst to least."""

EXAMPLES = 3
"""Examples that a finding names."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        level: damage (exit 1), warning (exit 1 with --strict), not checked, or note.
        what: a phrase with the number in it.
        where: file or split.
        count: the number in `what`.
        examples: the first ones, as people would look them up.
        remedy: what to do; empty where nothing has to be done.
    """

    level: Level
    what: str
    where: str
    count: int = 1
    examples: tuple[str, ...] = ()
    remedy: str = ""

    def line(self) -> str:
        """The finding as one line."""
        shown = f" ({', '.join(self.examples)}{', …' * (self.count > len(self.examples))})"
        parts = [f"{self.where}: {self.what}{shown if self.examples else ''}", self.remedy]
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True)
class Check:
    """One check of an audit.

    Attributes:
        name: one word.
        summary: what was looked at, in one line.
        findings: in the order found.
        facts: numbers for audit.json and the plots; JSON values.
    """

    name: str
    summary: str
    findings: Sequence[Finding] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """The worst level among the findings, or `ok`."""
        found = {finding.level for finding in self.findings} - {"note"}
        return next((level for level in LEVELS if level in found), "ok")


@dataclass(frozen=True)
class Audit:
    """An audit that is done.

    Attributes:
        folder: the dataset, the run or the model.
        title: what it is, in one line.
        checks: in the order of the report.
        strict: warnings fail as well.
        kind: what was looked at.
    """

    folder: Path
    title: str
    checks: Sequence[Check]
    strict: bool = False
    kind: Literal["dataset", "run", "model"] = "dataset"

    def count(self, level: Level) -> int:
        """Findings of a level."""
        return sum(f.level == level for check in self.checks for f in check.findings)

    @property
    def failed(self) -> bool:
        """Whether the dataset should not be trained on, or something is wrong with the rest."""
        return bool(self.count("damage") or (self.strict and self.count("warning")))

    @property
    def verdict(self) -> str:
        """The last line."""
        counts = {level: self.count(level) for level in LEVELS[:3]}
        said = [
            self._damage(counts["damage"]) if counts["damage"] else "",
            counted(counts["warning"], "warning") if counts["warning"] else "",
            f"{counts['not checked']} not checked" if counts["not checked"] else "",
        ]
        words = ", ".join(each for each in said if each)
        if not self.failed:
            return f"verdict: fine{f' ({words})' if words else ''}"
        why = "" if counts["damage"] else "; --strict makes warnings errors"
        return f"verdict: NOT fine: {words}{why}"

    def _damage(self, count: int) -> str:
        if self.kind == "dataset":
            return f"damage in {counted(count, 'place')}"
        return f"{counted(count, 'thing')} wrong"

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            self.kind: str(self.folder),
            "title": self.title,
            "failed": self.failed,
            "verdict": self.verdict,
            "checks": [
                {
                    "name": check.name,
                    "status": check.status,
                    "summary": check.summary,
                    "findings": [asdict(finding) for finding in check.findings],
                    "facts": check.facts,
                }
                for check in self.checks
            ],
        }


def unchecked(name: str, why: str) -> Check:
    """A check that could not be made, which is never silent."""
    return Check(name, "", [Finding("not checked", why, name)])


def counted(number: int, one: str, many: str | None = None) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def first(values: Iterable[object]) -> tuple[str, ...]:
    """The first examples as short strings, each once."""
    shown = []
    for value in dict.fromkeys(values):
        text = str(value)
        shown.append(text if len(text) <= 60 else text[:57] + "…")
        if len(shown) == EXAMPLES:
            break
    return tuple(shown)
