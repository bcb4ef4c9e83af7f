"""`arra doctor DATASET`: is a prepared dataset whole, sound, and what it says it is?

The checks run from the outside in: bytes, rows, values, equal things, near things, pictures. What a
check cannot look at because of an earlier finding is said to be not checked; content of a damaged
shard is never judged.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from arra.data.manifest import FILE as MANIFEST
from arra.data.manifest import Manifest
from arra.data.plan import FILE as PLAN
from arra.data.progress import Meter
from arra.device import pick_device
from arra.doctor.audit_files import Files, check_bytes, read_files, rows_check
from arra.doctor.duplicates import captions_check, ids_check, leakage_check, pictures_check
from arra.doctor.findings import Audit, Check, Finding, counted, unchecked
from arra.doctor.neighbours import Near, near_pairs, neighbours_check
from arra.doctor.samples import Pictures, Shown, chosen_rows, open_pictures, samples_check
from arra.doctor.scan import SplitScan, scan
from arra.doctor.settings import AuditConfig
from arra.doctor.values import codes_check, features_check, vectors_checks
from arra.files import place

PAIRS_SHOWN = 8
"""Closest pairs of each feature that become pictures."""


@dataclass
class Seen:
    """What the report shows beside the findings.

    Attributes:
        samples: rows as pictures.
        pairs: feature -> closest pairs as pictures, with their cosine.
    """

    samples: list[Shown] = field(default_factory=list)
    pairs: dict[str, list[tuple[Shown, Shown, float]]] = field(default_factory=dict)


def is_dataset(folder: Path) -> bool:
    """Whether a folder is a prepared dataset, be it unfinished or damaged."""
    return (folder / MANIFEST).is_file() or (folder / PLAN).is_file()


def audit(config: AuditConfig) -> tuple[Audit, Seen]:
    """Audits a dataset.

    Args:
        config: what to look at. Pairs become pictures only where `config.out` asks for a report.
    """
    folder, seen = place(config.dataset), Seen()
    files = read_files(folder)
    if files.manifest is None:
        why = f"everything else: without {MANIFEST} nothing says what the other files should be"
        checks = [files.check, unchecked("content", why)]
        return Audit(folder, f"{folder}: a prepared dataset", checks, config.strict), seen
    manifest = files.manifest
    rows = sum(info.rows for info in manifest.splits.values())
    with Meter("audit, bytes", rows) as meter:
        check_bytes(files, folder, meter.add)
    scans = _scanned(folder, files, manifest)
    readable = {split: s for split, s in scans.items() if len(s)}
    views = {split: _views(manifest, each) for split, each in scans.items()}
    checks = [files.check, rows_check(files, views), *_content(folder, manifest, readable)]
    near: dict[str, Near] = {}
    if readable:
        device = pick_device(config.device)
        for name in manifest.features:
            with Meter(f"audit, near {name}", sum(map(len, readable.values()))) as meter:
                near[name] = near_pairs(
                    folder, manifest, readable, name, config.near, device, meter.add
                )
            checks.append(neighbours_check(folder, readable, name, near[name], config.near))
        if not manifest.features:
            why = "near-duplicates: no global feature is stored to compare pictures by"
            checks.append(unchecked("near", why))
        pictures = open_pictures(
            folder, manifest, files.plan, readable, config.source, config.image_tokenizer
        )
        seen.samples = pictures.show(chosen_rows(readable, config.samples))
        if config.out is not None:
            seen.pairs = {name: _pairs(pictures, found) for name, found in near.items()}
        checks.append(samples_check(pictures, seen.samples))
    return Audit(folder, _title(folder, manifest), checks, config.strict), seen


def _views(manifest: Manifest, scanned: SplitScan) -> int | None:
    """How many rows of a split are views; None if damaged shards hide it."""
    may_have = scanned.views or manifest.framing.get("views", "none") != "none"
    whole = len(scanned) == manifest.splits[scanned.split].rows
    return scanned.views if whole or not may_have else None


def _scanned(folder: Path, files: Files, manifest: Manifest) -> dict[str, SplitScan]:
    """Every split's readable shards; the others become findings of `files`."""
    scans: dict[str, SplitScan] = {}
    rows = sum(shard.rows for shards in files.shards.values() for shard in shards)
    with Meter("audit, rows", rows) as meter:
        for split, shards in files.shards.items():
            scans[split], unreadable = scan(folder, manifest, split, shards, meter.add)
            for file, why in unreadable:
                files.find(file, why, "it was not written by arra prepare: prepare the data again")
    return scans


def _content(folder: Path, manifest: Manifest, scans: Mapping[str, SplitScan]) -> list[Check]:
    """The checks that look at rows."""
    missing = sum(info.rows for info in manifest.splits.values())
    missing -= sum(len(each) for each in scans.values())
    checks = []
    if missing:
        why = f"{counted(missing, 'row')} of damaged or missing shards"
        checks.append(Check("content", "", [Finding("not checked", why, "content", missing)]))
    if not scans:
        return checks
    checks += [ids_check(folder, scans), codes_check(folder, manifest, scans)]
    checks += [features_check(folder, manifest, scans, name) for name in manifest.features]
    checks += vectors_checks(folder, manifest, scans)
    checks += [captions_check(folder, manifest, scans), pictures_check(folder, manifest, scans)]
    return [*checks, leakage_check(folder, manifest, scans)]


def _pairs(pictures: Pictures, near: Near) -> list[tuple[Shown, Shown, float]]:
    chosen = sorted(near.pairs, key=lambda pair: -pair.cosine)[:PAIRS_SHOWN]
    shown = pictures.show([row for pair in chosen for row in (pair.one, pair.other)])
    return [
        (shown[2 * place], shown[2 * place + 1], pair.cosine) for place, pair in enumerate(chosen)
    ]


def _title(folder: Path, manifest: Manifest) -> str:
    splits = ", ".join(f"{name} {info.rows:,}" for name, info in manifest.splits.items())
    rows = counted(sum(info.rows for info in manifest.splits.values()), "row")
    features = ", ".join([*manifest.aligned(), *manifest.text_features]) or "none"
    return (
        f"{folder}: {rows} ({splits}), {manifest.size} pixels, image tokenizer "
        f"{manifest.tokenizer.spec}, features {features}"
    )
