"""What is taken from a source: its captions' wording, and which rows are left out.

A row that a condition leaves out is a reject like any other, with the condition as its reason, so
that rows in = rows out + rejects whatever is asked for. Formats know nothing of this.
"""

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from arra.data.language import Languages
from arra.data.sources import Record, Reject, Scalar, Source, digest, open_source

CAPTION = "text"
"""What templates and conditions call the caption."""

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_CONDITION = re.compile(r"\s*(.+?)\s*(>=|<=|==|!=|>|<|\sin\s)\s*([^=\s](?:.*\S)?)\s*", re.DOTALL)

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
    "in": lambda value, wanted: value in wanted,
}


@dataclass(frozen=True)
class Reading:
    """How a source is read; a manifest keeps it, so that the same rows can be read again.

    Attributes:
        text_column, image_column, limit, seed, captions: as in `open_source`.
        caption_template: the caption's wording; {text} is the source's caption, {COLUMN} a value.
        where: conditions `COLUMN OP VALUE` that every row has to meet.
        language: ISO 639-1 code of the language that captions are to be in.
    """

    text_column: str = "text"
    image_column: str = "image"
    limit: int | None = None
    seed: int = 0
    captions: str = "first"
    caption_template: str | None = None
    where: tuple[str, ...] = ()
    language: str | None = None

    def open(self, spec: str, split: str | None) -> Source:
        """One split of a source, read like this.

        Raises:
            FileNotFoundError, ValueError: as `open_source`; or a template or condition that does
                not fit the source's columns.
        """
        source = open_source(
            spec,
            split=split,
            text_column=self.text_column,
            image_column=self.image_column,
            limit=self.limit,
            seed=self.seed,
            captions=self.captions,
        )
        if self.caption_template is None and not self.where and self.language is None:
            return source
        return Selected(source, self.caption_template, self.where, self.language)


def reading_of(described: Mapping[str, Any]) -> Reading:
    """The reading that a manifest's `source` describes."""
    names = {field.name for field in fields(Reading)}
    kept = {name: value for name, value in described.items() if name in names}
    return Reading(**kept | {"where": tuple(described.get("where", ()))})


def describe(reading: Reading) -> dict[str, Any]:
    """What a manifest's `source` keeps of it."""
    return asdict(reading) | {"where": list(reading.where)}


class Selected:
    """A source with conditions on its rows and a wording for its captions.

    Args:
        source: what is read; its rows keep their numbers.
        template, where, language: as in `Reading`.

    Raises:
        ValueError: a template or condition that names no column, or cannot be read.
    """

    def __init__(
        self, source: Source, template: str | None, where: Sequence[str], language: str | None
    ) -> None:
        self.source = source
        self.name, self.split, self.splits = source.name, source.split, source.splits
        self.columns, self.class_names = source.columns, source.class_names
        self._conditions = [Condition.parse(each, source) for each in where]
        self._template = None if template is None else Template(template, source)
        self._languages = None if language is None else Languages(language)
        identity = None if self._languages is None else self._languages.identity
        self.fingerprint = digest(source.fingerprint, template, list(where), identity)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def groups(self) -> Sequence[str] | None:
        """Those of the source."""
        return self.source.groups

    def read(self, start: int, stop: int) -> Iterator[Record | Reject]:
        """Yields rows start..stop-1 in order; left out ones as rejects."""
        for item in self.source.read(start, stop):
            yield item if isinstance(item, Reject) else self._selected(item)

    def _selected(self, record: Record) -> Record | Reject:
        values = {**record.extra, CAPTION: record.text}
        for condition in self._conditions:
            reason = condition.refuses(values[condition.column])
            if reason is not None:
                return Reject(record.row, record.id, f"filtered: {reason}")
        if self._languages is not None:
            reason = self._languages.refuses(record.text)
            if reason is not None:
                return Reject(record.row, record.id, f"filtered: {reason}")
        if self._template is None:
            return record
        missing = self._template.missing(values)
        if missing is not None:
            reason = f"the caption template needs {missing}, which is missing"
            return Reject(record.row, record.id, reason)
        return replace(record, text=self._template.fill(values))


def _column(name: str, source: Source, flag: str) -> type:
    kinds = {**source.columns, CAPTION: str}
    if name not in kinds:
        there = ", ".join([CAPTION, *(each for each in source.columns if each != CAPTION)])
        raise ValueError(f"{flag}: {source.name} has no column {name!r}; there are {there}")
    return kinds[name]


@dataclass(frozen=True)
class Condition:
    """`COLUMN OP VALUE` on one column; a row without a value there does not meet it.

    Signs of order compare numbers, also where a column has them as text.
    """

    column: str
    sign: str
    wanted: object
    words: str

    @classmethod
    def parse(cls, text: str, source: Source) -> "Condition":
        """Reads `aesthetic >= 5`, `LANGUAGE == en`, `view in AP,PA`.

        Raises:
            ValueError: no condition, no such column, or a value that the column cannot have.
        """
        found = _CONDITION.fullmatch(text)
        if found is None:
            raise ValueError(
                f"--where {text!r}: write COLUMN OP VALUE, OP one of {', '.join(_COMPARE)}"
            )
        column, sign, value = found[1], found[2].strip(), found[3]
        kind = _column(column, source, f"--where {text!r}")
        if sign not in ("==", "!=", "in"):
            if kind is bool:
                raise ValueError(f"--where {text!r}: {column} is true or false: use == or !=")
            if kind is str:
                kind = float  # numbers that the source has as text
        wanted: object
        if sign == "in":
            wanted = tuple(_value(each, kind, text) for each in value.split(","))
        else:
            wanted = _value(value, kind, text)
        return cls(column, sign, wanted, f"{sign} {value}")

    def refuses(self, value: Scalar) -> str | None:
        """Why a row with this value is left out, or None."""
        if value is None:
            return f"{self.column} is missing"
        compared: object = value
        if isinstance(value, str) and isinstance(self.wanted, float):
            try:
                compared = float(value)
            except ValueError:
                return f"{self.column} is no number ({value[:60]})"
        if _COMPARE[self.sign](compared, self.wanted):
            return None
        shown = "the caption" if self.column == CAPTION else f"{self.column} {_shown(value)}"
        return f"{shown} is not {self.words}"


def _value(text: str, kind: type, condition: str) -> object:
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"--where {condition!r}: {text!r} is neither true nor false")
        return text.lower() == "true"
    try:
        return int(text) if kind is int else float(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--where {condition!r}: {text!r} is no number") from None


class Template:
    """A caption's wording with {COLUMN} fields; {{ and }} are braces.

    Args:
        text: the wording.
        source: whose columns the fields name; `label` is a class's name where the source says it.

    Raises:
        ValueError: a field that is no column, or a single brace.
    """

    def __init__(self, text: str, source: Source) -> None:
        self.text, self._class_names = text, source.class_names
        self.columns: list[str] = []
        for found in _FIELD.finditer(text):
            if found[0] in ("{", "}"):
                raise ValueError(
                    f"--caption-template {text!r}: write a single brace as {{{{ or }}}}"
                )
            if found[1] is not None:
                _column(found[1], source, "--caption-template")
                self.columns.append(found[1])

    def missing(self, values: Mapping[str, Scalar]) -> str | None:
        """The first column that has nothing to say."""
        return next((name for name in self.columns if values[name] in (None, "")), None)

    def fill(self, values: Mapping[str, Scalar]) -> str:
        """The caption of a row with a value in every column."""

        def replaced(found: re.Match[str]) -> str:
            name = found[1]
            return found[0][0] if name is None else self._word(name, values[name])

        return _FIELD.sub(replaced, self.text)

    def _word(self, name: str, value: Scalar) -> str:
        names = self._class_names
        if name == "label" and isinstance(value, int) and 0 <= value < len(names):
            return names[value]
        return _shown(value)


def _shown(value: Scalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)
