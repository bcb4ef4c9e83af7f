"""rejects.jsonl: the rows of a source that were left out, each with its reason."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from arra.files import atomic_write

REJECTS = "rejects.jsonl"

_KINDS = (
    (
        re.compile(r"(/|\b[A-Za-z]:\\)\S*[\w.]|\S+/\S+|\S+\.(jpe?g|png|webp|gif|bmp|tiff?|dcm)\b"),
        "…",
    ),
    (re.compile(r"'[^']*'|\"[^\"]*\""), "…"),
    (re.compile(r"\d[\d,.]*"), "N"),
)
TOLD = 5
"""Reasons that are printed when a dataset is complete."""


def write_rejects(path: Path, rejects: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object a line: split, row, id, reason."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as handle:
        for reject in rejects:
            handle.write(json.dumps(reject, ensure_ascii=False) + "\n")


def kind_of(reason: str) -> str:
    """A reason without paths, quoted names and numbers, so that equal ones can be counted."""
    for pattern, instead in _KINDS:
        reason = pattern.sub(instead, reason)
    return " ".join(reason.split())


def by_reason(rejects: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """How many rows each kind of reason has left out."""
    return Counter(kind_of(str(reject["reason"])) for reject in rejects)


def told(path: Path) -> Iterator[str]:
    """Lines for people: how many rows were left out, and why. None where all rows are there."""
    lines = path.read_text(encoding="utf-8").split("\n")
    rejects = [json.loads(line) for line in lines if line]
    reasons = by_reason(rejects).most_common()
    if reasons:
        rows = "row was" if len(rejects) == 1 else "rows were"
        yield f"{len(rejects):,} {rows} left out, {path} has each:"
    for reason, number in reasons[:TOLD]:
        yield f"{number:>9,}  {reason}"
    rest = sum(number for _, number in reasons[TOLD:])
    if rest:
        yield f"{rest:>9,}  for {len(reasons) - TOLD} other reasons"
