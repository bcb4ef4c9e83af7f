"""What may follow a source's path: `coco?captions=first` reads coco with that option."""

from collections.abc import Mapping
from pathlib import Path


def split_options(spec: str) -> tuple[str, dict[str, str]]:
    """A source as named in two: its path or hub id, and the options behind `?`.

    Raises:
        ValueError: an option is not NAME=VALUE, or is given twice.
    """
    path, mark, rest = spec.partition("?")
    if not mark or ("://" not in spec and Path(spec).expanduser().exists()):
        return spec, {}
    options: dict[str, str] = {}
    for part in rest.split("&"):
        key, equals, value = part.partition("=")
        if not key or not equals or not value or key in options:
            raise ValueError(
                f"source {path!r}: write options once each, PATH?NAME=VALUE&NAME=VALUE"
            )
        options[key] = value
    return path, options


def check_options(
    name: str, options: Mapping[str, str], known: Mapping[str, tuple[str, ...]]
) -> None:
    """Refuses options that a source does not have.

    Args:
        name: the source, for the message.
        options: as given.
        known: option -> the values it may have; an empty tuple allows any.

    Raises:
        ValueError: an unknown option or value; the message lists the known ones.
    """
    name = name.partition("?")[0]  # what a signed URL holds there is not for logs
    for key, value in options.items():
        if key not in known:
            there = ", ".join(known) or "none"
            raise ValueError(f"{name} has no option {key!r}; options of this source: {there}")
        if known[key] and value not in known[key]:
            raise ValueError(f"{name}: {key}={value} is not one of {', '.join(known[key])}")
