"""Whether every byte of a dataset is as it was written, and where every source row went.

What says how a file should be: shards and rejects.jsonl by SHA-256 in manifest.json; manifest.json,
plan.json and the notes in .progress by the SHA-256 of their own content, byte for byte.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from arra.data.job import PROGRESS
from arra.data.manifest import AGAIN, Manifest, ShardInfo, read_manifest
from arra.data.manifest import FILE as MANIFEST
from arra.data.plan import FILE as PLAN
from arra.data.rejects import REJECTS, by_reason, kind_of
from arra.doctor.findings import Check, Finding, Level, counted, first
from arra.files import read_sealed, sha256_of

NO_PLAN = (
    "put back a copy of it; without it the dataset can be trained on, but not continued or repaired"
)


@dataclass
class Files:
    """What the files of a dataset say about it.

    Attributes:
        manifest: None if missing or damaged, and then nothing else can be checked.
        plan: None if missing or damaged.
        shards: split -> shards whose bytes are right.
        rejects: None if rejects.jsonl is missing or damaged.
        findings: what is wrong.
        size: bytes of all files that were looked at.
        number: how many those are.
    """

    manifest: Manifest | None = None
    plan: dict[str, Any] | None = None
    shards: dict[str, list[ShardInfo]] = field(default_factory=dict)
    rejects: list[dict[str, Any]] | None = None
    findings: list[Finding] = field(default_factory=list)
    size: int = 0
    number: int = 0

    def find(self, where: str, what: str, remedy: str = AGAIN) -> None:
        """Notes that a file is damaged."""
        self.findings.append(Finding("damage", what, where, remedy=remedy))

    @property
    def check(self) -> Check:
        """As a part of the report."""
        bad = len({f.where for f in self.findings if f.level == "damage"})
        said = f"{counted(self.number, 'file')}, {_size(self.size)}: " + (
            f"{bad} damaged or missing" if bad else "every byte is as it was written"
        )
        facts = {"files": self.number, "bytes": self.size}
        return Check("files", said, self.findings, facts)


def read_files(folder: Path) -> Files:
    """Reads manifest.json and plan.json."""
    files = Files()
    files.plan = _sealed(files, folder, PLAN, NO_PLAN)
    try:
        files.manifest = read_manifest(folder)
        _count(files, folder / MANIFEST)
    except FileNotFoundError:
        files.find(MANIFEST, "is missing: preparing was not finished", AGAIN)
    except ValueError as error:
        files.find(MANIFEST, _reason(error, folder / MANIFEST))
        _count(files, folder / MANIFEST)
    return files


def check_bytes(files: Files, folder: Path, progress: Callable[[int], None]) -> None:
    """Compares every other file with what the manifest says.

    Args:
        files: with a manifest.
        folder: of the dataset.
        progress: is told how many rows the shards had that were read.
    """
    assert files.manifest is not None
    for split, info in files.manifest.splits.items():
        whole = []
        for shard in info.shards:
            if _whole(files, folder, shard.file, shard.sha256):
                whole.append(shard)
            progress(shard.rows)
        files.shards[split] = whole
    if _whole(files, folder, REJECTS, files.manifest.rejects_sha256):
        lines = (folder / REJECTS).read_text(encoding="utf-8").split("\n")
        files.rejects = [json.loads(line) for line in lines if line]
    _check_notes(files, folder)
    _check_strangers(files, folder)


def _count(files: Files, path: Path) -> None:
    files.number += 1
    files.size += path.stat().st_size


def _whole(files: Files, folder: Path, name: str, sha256: str) -> bool:
    path = folder / name
    if not path.is_file():
        files.find(name, "is missing")
        return False
    _count(files, path)
    try:
        same = sha256_of(path) == sha256
    except OSError as error:
        why = f"cannot be read ({error.strerror or error})"
        files.find(name, why, "copy the dataset to another disk")
        return False
    if not same:
        files.find(name, "is damaged (its SHA-256 is another)")
    return same


def _sealed(files: Files, folder: Path, name: str, remedy: str) -> dict[str, Any] | None:
    if not (folder / name).is_file():
        files.find(name, "is missing", remedy)
        return None
    _count(files, folder / name)
    try:
        return read_sealed(folder / name)
    except ValueError as error:
        files.find(name, _reason(error, folder / name), remedy)
        return None


def _reason(error: ValueError, path: Path) -> str:
    """The error without the path, which the report names once, and without its remedy."""
    return str(error).removeprefix(f"{path} ").removesuffix(f": {AGAIN}")


def _check_notes(files: Files, folder: Path) -> None:
    """Each note is whole, and says of its shard and its rejects what the manifest says."""
    assert files.manifest is not None
    listed = {
        Path(shard.file).stem: shard
        for info in files.manifest.splits.values()
        for shard in info.shards
    }
    names = set(listed) | _planned(files.plan)
    whole = True
    noted: list[Any] = []
    for name in sorted(names | {path.stem for path in (folder / PROGRESS).glob("[!.]*.json")}):
        where = f"{PROGRESS}/{name}.json"
        note = _sealed(files, folder, where, AGAIN)
        whole = whole and note is not None
        if note is None:
            continue
        shard = listed.get(name)
        if note["shard"] != (None if shard is None else asdict(shard)):
            files.find(where, "names another shard than the manifest")
        noted += note["rejects"]
    if whole and files.rejects is not None and len(noted) != len(files.rejects):
        files.find(PROGRESS, f"notes {len(noted)} rejects, {REJECTS} has {len(files.rejects)}")


def _planned(plan: Mapping[str, Any] | None) -> set[str]:
    """The names of all units, those without a usable row included."""
    if plan is None:
        return set()
    each = plan["options"]["shard_rows"]
    return {
        f"{split}-{number:05d}"
        for split, rows in plan["rows"].items()
        for number in range(-(-rows // each))
    }


def _check_strangers(files: Files, folder: Path) -> None:
    """Files that nothing says anything about: shards of these names are never read, so a note."""
    assert files.manifest is not None
    known = {MANIFEST, PLAN, REJECTS}
    known |= {shard.file for info in files.manifest.splits.values() for shard in info.shards}
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.parent.name != PROGRESS]
    strange = [str(p.relative_to(folder)) for p in paths if str(p.relative_to(folder)) not in known]
    if strange:
        level: Level = "note"
        what = f"{counted(len(strange), 'file')} that the manifest does not know, and nobody reads"
        files.findings.append(Finding(level, what, "folder", len(strange), first(strange)))


def _size(count: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1024:.3g} KiB"


# ---- rows ----------------------------------------------------------------------------------------


def rows_check(files: Files, views: Mapping[str, int | None]) -> Check:
    """Rows in = rows out + rejects, split by split; and the rejects by reason.

    Args:
        files: of the dataset.
        views: split -> rows that are further views of others, which no source row stands for; None
            where damaged shards hide how many these are.
    """
    assert files.manifest is not None
    out = {name: info.rows for name, info in files.manifest.splits.items()}
    summary = f"{counted(sum(out.values()), 'row')} out"
    findings: list[Finding] = []
    facts: dict[str, Any] = {"out": out, "views": dict(views)}
    if files.rejects is None:
        why = f"the rows that were left out: {REJECTS} is not readable"
        return Check("rows", summary, [Finding("not checked", why, "rows")], facts)
    left = Counter(reject["split"] for reject in files.rejects)
    reasons = by_reason(files.rejects)
    facts |= {"rejects": dict(left), "reasons": dict(reasons.most_common())}
    for reason, number in reasons.most_common():
        rows = [f"{r['split']} row {r['row']}" for r in files.rejects
                if kind_of(str(r["reason"])) == reason]  # fmt: skip
        what = f"{counted(number, 'row')} left out: {reason}"
        findings.append(Finding("note", what, REJECTS, number, first(rows)))
    if files.plan is None:
        why = f"rows in = rows out + rejects: {PLAN} is not readable"
        return Check("rows", summary, [*findings, Finding("not checked", why, "rows")], facts)
    planned = files.plan["rows"]
    facts["in"] = dict(planned)
    for split in sorted(set(planned) | set(out) | set(left)):
        further = views.get(split, 0)
        if further is None:
            why = "rows in = rows out + rejects: damaged shards hide how many of the rows are views"
            findings.append(Finding("not checked", why, split))
            continue
        expected = planned.get(split, 0)
        there = out.get(split, 0) - further + left[split]
        if there != expected:
            what = (
                f"the source has {expected:,} rows, but {there - left[split]:,} are here and "
                f"{left[split]:,} were left out: {abs(expected - there):,} "
                f"{'missing' if there < expected else 'too many'}"
            )
            findings.append(Finding("damage", what, split, abs(expected - there), (), AGAIN))
    if files.manifest.rejects != len(files.rejects):
        what = f"has {len(files.rejects)} lines, the manifest says {files.manifest.rejects}"
        findings.append(Finding("damage", what, REJECTS, remedy=AGAIN))
    further = sum(number or 0 for number in views.values())
    extra = f" (and {counted(further, 'further view')})" if further else ""
    total, kept = sum(planned.values()), sum(out.values()) - further
    summary = f"{total:,} in = {kept:,} out{extra} + {sum(left.values()):,} left out"
    if any(finding.level != "note" for finding in findings):
        summary = f"{total:,} in, {kept:,} out{extra}, {sum(left.values()):,} left out"
    return Check("rows", summary, findings, facts)
