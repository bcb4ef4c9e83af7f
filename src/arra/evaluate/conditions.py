"""What two reports must have in common before their values may be compared."""

from collections.abc import Iterator, Mapping
from typing import Any

Report = Mapping[str, Any]

UNNAMED = ("name", "spec")
"""Where an extractor lies does not matter: its fingerprint does."""
ESTIMATORS = ("subsets", "subset_size", "splits", "window", "labels_sha256")
"""Details of a measure that say how it was computed, and from what."""
NOT_SAMPLING = (
    *("model", "weights", "slots", "compile", "window", "adaptive_window", "ran_on"),
    *("painter", "prompts", "wording", "text_encoder"),
)
"""Settings of `arra generate` that are the model's own, or that change no distribution."""


def differences(first: Report, second: Report) -> list[str]:
    """What makes the values of two reports incomparable, one phrase each: empty = comparable."""
    return [
        f"{name} {_cut(one)} against {_cut(other)}"
        for name, one, other in _pairs(_conditions(first), _conditions(second))
    ] or [
        f"images behind {key} {one} against {other}"
        for key, one, other in _pairs(_counts(first), _counts(second))
    ]


def cautions(first: Report, second: Report) -> list[str]:
    """What else differs, and should be known to who reads the values."""
    found = []
    sampling = [_sampling(report) for report in (first, second)]
    if None in sampling and sampling[0] != sampling[1]:
        found.append("how one of them was painted is not known")
    for name, one, other in _pairs(sampling[0] or {}, sampling[1] or {}):
        found.append(f"painted with {name} {_cut(one)} against {_cut(other)}")
    hashes = [(report.get("generated") or {}).get("sha256") for report in (first, second)]
    if hashes[0] is not None and hashes[0] == hashes[1]:
        found.append("both judge the very same pictures")
    for name, one, other in _pairs({"seed": first["seed"]}, {"seed": second["seed"]}):
        found.append(f"measured with --{name} {one} against {other}")
    for name, one, other in _pairs(first["versions"], second["versions"]):
        found.append(f"measured by {name} {one} against {other}")
    return found


def _conditions(report: Report) -> dict[str, Any]:
    """Everything that must agree, where both reports have it."""
    real, generated = report.get("real") or {}, report.get("generated") or {}
    found = {
        "format of the report": report["format_version"],
        "reference (SHA-256 of its pixels)": real.get("sha256"),
        "reference images": real.get("n"),
        "moments of the reference (SHA-256)": real.get("moments", {}).get("sha256"),
        "generated images": generated.get("n"),
        "prompts (SHA-256)": generated.get("prompts_sha256"),
        "text (SHA-256)": report.get("text", {}).get("sha256"),
    }
    if real and "moments" not in real:  # the same pictures are then another reference
        found["moments of the reference (SHA-256)"] = "none"
    found |= {f"{name} of the images": value for name, value in _of(report, "preprocessing")}
    for part in ("extractors", "judges"):
        for key, described in _of(report, part):
            for name, value in described.items():
                if name not in UNNAMED:
                    found[f"{name} of {key}"] = value
    for key, details in _of(report, "details"):
        found |= {f"{name} of {key}": details.get(name) for name in ESTIMATORS}
    return {name: value for name, value in found.items() if value is not None}


def _counts(report: Report) -> dict[str, int]:
    return {key: counts[1] for key, counts in _of(report, "counts")}


def _of(report: Report, part: str) -> Iterator[tuple[str, Any]]:
    yield from report.get(part, {}).items()


def _pairs(first: Report, second: Report) -> Iterator[tuple[str, Any, Any]]:
    """(name, one, other) of what both have and have differently."""
    for name, one in first.items():
        if name in second and second[name] != one:
            yield name, one, second[name]


def _sampling(report: Report) -> dict[str, Any] | None:
    painted = (report.get("generated") or {}).get("painted")
    if painted is None:
        return None
    ran_on = painted.get("ran_on") or {}
    return {k: v for k, v in painted.items() if k not in NOT_SAMPLING} | {
        "dtype": ran_on.get("dtype")
    }


def _cut(value: Any) -> str:
    """A hash by its head."""
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
