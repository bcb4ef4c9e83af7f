"""Where a row's caption stands: one column, several, or a column that holds a list of captions."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

WHICH = ("first", "random", "join")


@dataclass(frozen=True)
class CaptionColumns:
    """Which columns hold captions, and what becomes of several captions of one row.

    Attributes:
        named: a column, or several as `a,b,c`.
        which: of several captions that are not empty, in the order of the columns and of a list
            within one: the `first`, one drawn at `random`, or all of them `join`ed by a space.
        seed: of the drawn ones; what is drawn depends on it and the row's id only.
    """

    named: str = "text"
    which: str = "first"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.which not in WHICH:
            raise ValueError(f"--captions {self.which} is not one of {', '.join(WHICH)}")

    @property
    def identity(self) -> str | list[str | int]:
        """What a source's fingerprint holds of it."""
        if self.which == "first":
            return self.named
        return [self.named, self.which, self.seed if self.which == "random" else 0]

    def among(self, there: Sequence[str]) -> tuple[str, ...]:
        """The columns by name. A table's own column may have a comma in its name."""
        if self.named in there:
            return (self.named,)
        return tuple(part.strip() for part in self.named.split(","))

    def only(self, name: str) -> str:
        """The one column, for a source whose rows have one caption each.

        Raises:
            ValueError: several captions were asked for.
        """
        if self.which != "first":
            raise ValueError(f"{name} has one caption a row, so --captions has nothing to choose")
        return self.named

    def choose(self, values: Iterable[object], id_: str) -> object:
        """The caption of a row, from its values in the caption columns.

        What is no text is returned as it is, for `bad_text` to say so.
        """
        given = list(values)
        found: list[str] = []
        for value in given:
            for each in value if isinstance(value, list) else [value]:
                if each is None or (isinstance(each, str) and not each.strip()):
                    continue
                if not isinstance(each, str):
                    return each
                found.append(each)
        if not found:
            return given[0] if len(given) == 1 and not isinstance(given[0], list) else None
        if self.which == "join" and len(found) > 1:
            return " ".join(each.strip() for each in found)
        return found[self.drawn(id_, len(found)) if self.which == "random" else 0]

    def drawn(self, id_: str, count: int) -> int:
        """A number below `count`, by the seed and a row's id."""
        name = hashlib.sha256(id_.encode("utf-8", "surrogatepass")).digest()
        words = np.frombuffer(name, "<u4").tolist()
        return int(np.random.default_rng([self.seed, *words]).integers(count))
