"""Settings as JSON and back, without loss, and what may differ when a run is resumed."""

import dataclasses
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

from arra.config import TrainConfig

RESUMABLE = {"log", "checkpoint", "device", "out", "data_folder", "engine", "micro_batch"}
RESUMABLE |= {"data.skip_steps", "data.cache", "data.cache_gb"}
"""Fields that may differ when a run is resumed; any other change would make it another run.

A run folder and its dataset may move: the dataset is compared by its manifest's hash. How a batch
is split and computed changes the last bits of a run, not what it is.
"""


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values."""
    return dataclasses.asdict(config)


def from_json(kind: type, value: dict[str, Any]) -> Any:
    """The inverse of `to_json`; an unknown or missing field is named."""
    hints = get_type_hints(kind, include_extras=False)
    known = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ValueError(
            f"{kind.__name__} has no field {unknown[0]!r}: written by a newer version?"
        )
    return kind(**{name: _restore(hints[name], v) for name, v in value.items()})


def _restore(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_json(hint, value)  # type: ignore[arg-type]
    if get_origin(hint) in (Union, types.UnionType):
        inner = [h for h in get_args(hint) if h is not type(None)]
        return None if value is None else _restore(inner[0], value)
    if get_origin(hint) is tuple:
        return tuple(_restore(get_args(hint)[0], v) for v in value)
    return value


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """The flags that differ and may not differ at a resume, as `flag: old -> new`."""
    return [
        f"--{name.replace('_', '-')}: {a} -> {b}"
        for name, a, b in _leaves(to_json(old), to_json(new), "")
        if not {name, name.split(".")[0]} & RESUMABLE and a != b
    ]


def _leaves(old: Any, new: Any, prefix: str) -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [
            leaf
            for key in keys
            for leaf in _leaves(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [(prefix, old, new)]
