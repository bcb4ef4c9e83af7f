"""Where `--out` may point to: a JSON file, or a folder that is new or holds what we wrote there."""

import os
from pathlib import Path

from arra.files import read_json

REPORT, SCORES, COMPARISON, SWEEP = "report.json", "scores.jsonl", "comparison.json", "sweep.json"
SIDES = ("samples", "best-", "worst-", "highest-", "lowest-", "copies-")
"""How the names of sample grids begin."""


def is_file(out: Path) -> bool:
    """Whether `--out` names the JSON alone."""
    return out.suffix == ".json"


def check_out(out: Path, main: str = REPORT) -> None:
    """Refuses a place for results before hours of work.

    Args:
        main: the JSON that a folder of this kind has.

    Raises:
        ValueError: there is something that we did not write, or that holds more than that.
    """
    check_place(out)
    if is_file(out) or not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a new folder, or a file that ends in .json")
    names = sorted(each.name for each in out.iterdir())
    foreign = [name for name in names if not _is_ours(name, main)]
    if foreign or (names and not _is_report(out / main)):
        what = f"it holds {foreign[0]}" if foreign else f"it has no {main} of `arra evaluate`"
        kind = main.removesuffix(".json")
        raise ValueError(f"--out {out} is there already and is no {kind} ({what}): name a new one")


def check_place(file: Path) -> None:
    """Refuses a place where nothing can be written, before hours of work.

    Raises:
        ValueError: it is below a file, or in a folder that may not be written to, or it is to be a
            file and is a folder.
    """
    above = next(each for each in file.absolute().parents if each.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        what = "is a file" if not above.is_dir() else "may not be written to"
        raise ValueError(f"{file} cannot be written: {above} {what}")
    if file.suffix in (".json", ".npz") and file.is_dir():
        raise ValueError(f"{file} is a folder, and a file is to be written there: name another")


def _is_ours(name: str, main: str) -> bool:
    stem = main.removesuffix(".json")
    if name in (main, SCORES, f"{stem}.md", f"{stem}.html"):
        return True
    return name.endswith(".png") and name.startswith(SIDES)


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    report = read_json(path)
    return isinstance(report, dict) and "format_version" in report
