"""What a report says besides its values, in words: who was judged, against whom, and how.

Every entry of the report gets a line. Those with names of their own come first; what is not known
here is written as it stands, so that nothing of a protocol can be lost on a page.
"""

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

Fact = tuple[str, str]
Report = Mapping[str, Any]

VALUES = (
    *("metrics", "intervals", "counts", "reasons", "details", "warnings"),
    *("by_seed", "over_seeds"),
)
"""Entries of a report that are values, not protocol."""
NAMES = {
    "n": "pictures",
    "distinct": "of which different",
    "sizes": "pixels",
    "sha256": "SHA-256 of the pixels",
    "captions_sha256": "SHA-256 with the captions",
    "prompts_sha256": "SHA-256 of the prompts",
    "cfg": "guidance",
    "cfg_interval": "guided part of the picture",
    "num": "pictures a prompt",
    "top_k": "top-k",
    "top_p": "top-p",
    "weights": "SHA-256 of the weights",
    "size": "cropped to pixels",
    "seed": "first seed",
    "dim": "features",
}
FIRST = ("model", "cfg", "num", "seed", "temperature", "top_k", "top_p")
"""Of how pictures were painted, what is looked for first."""


def title(report: Report) -> str:
    """Who is judged, against whom."""
    judged = report.get("generated")
    if judged is None:
        return f"{short(report['text']['model'])} on {short(report['text']['file'])}"
    against = f" against {short(report['real']['source'])}" if "real" in report else ""
    return f"{short(judged['source'])}{against}"


def short(source: str) -> str:
    """The end of a path; hub ids and builtin names as they are."""
    return PurePath(source).name if source.count("/") > 1 else source


def summary(report: Report) -> str:
    """How many pictures, from where and how painted, in a sentence."""
    judged = report.get("generated")
    if judged is None:
        return f"The text of {report['text']['file']} in the eyes of {report['text']['model']}."
    said = [f"{judged['n']:,} pictures of {judged['source']}"]
    painted = judged.get("painted") or {}
    if painted.get("cfg") is not None:
        said.append(f"painted with guidance {painted['cfg']:g}")
    if painted.get("seed") is not None:
        said.append(f"from seed {painted['seed']} on")
    real = report.get("real")
    if real is not None:
        split = f" ({real['split']})" if real.get("split") else ""
        count = f"{real['n']:,} real ones" if real.get("n") else "real ones"
        said.append(f"beside {count} of {real['source']}{split}")
    return f"{', '.join(said)}."


def protocol(report: Report) -> list[tuple[str, list[Fact]]]:
    """(heading, facts) of everything that the values depend on."""
    groups: list[tuple[str, list[Fact]]] = []
    for name, heading in (("real", "Reference"), ("generated", "Judged")):
        described = dict(report.get(name) or {})
        painted = described.pop("painted", None)
        if described:
            groups.append((heading, list(_flat(described))))
        if painted is not None:
            first = {key: painted[key] for key in FIRST if key in painted}
            rest = {key: value for key, value in painted.items() if key not in first}
            groups.append((f"How the {heading.lower()} were painted", list(_flat(first | rest))))
    for name, heading in (("extractors", "Extractor"), ("judges", "Judge")):
        for key, described in (report.get(name) or {}).items():
            groups.append((f"{heading} {key}", list(_flat(described))))
    measured = dict(report.get("preprocessing") or {}) | {
        "seed of what is drawn at random": report.get("seed"),
        "format of the report": report.get("format_version"),
    }
    groups.append(("How it was measured", list(_flat(measured))))
    known = {*VALUES, "real", "generated", "extractors", "judges", "preprocessing"}
    known |= {"seed", "format_version", "versions"}
    for name in report:
        if name not in known and isinstance(report[name], Mapping):
            groups.append((name.replace("_", " ").capitalize(), list(_flat(report[name]))))
    groups.append(("Versions", list(_flat(report.get("versions") or {}))))
    return [(heading, found) for heading, found in groups if found]


def _flat(described: Mapping[str, Any], within: str = "") -> Iterator[Fact]:
    for key, found in described.items():
        value = found
        if isinstance(value, list | tuple) and any(isinstance(each, Mapping) for each in value):
            value = {str(number): each for number, each in enumerate(value, start=1)}
        name = within + NAMES.get(key, key.replace("_", " "))
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}: ")
        elif value is not None and value != "":
            yield name, _said(value)


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list | tuple):
        if len(value) == 2 and all(type(side) is int for side in value):
            return f"{value[0]} × {value[1]}"
        return ", ".join(map(_said, value))
    return str(value)
