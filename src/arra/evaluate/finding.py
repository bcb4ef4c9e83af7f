"""What one measure says of a set of images: a value, how sure it is, or why there is none."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """A measure's value.

    Attributes:
        value: None where the number of images cannot support one; `reason` then says why.
        n: images, or pairs of images, that it was computed from.
        low: lower limit of the 95 % interval; None where there is no interval.
        high: upper limit.
        method: how the interval was made, such as "bootstrap over images".
        reason: why there is no value, or why it must be read with care.
        details: more numbers that belong to it, JSON-ready.
    """

    value: float | None
    n: int
    low: float | None = None
    high: float | None = None
    method: str | None = None
    reason: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
