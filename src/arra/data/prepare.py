"""`arra prepare`: images and captions, once, to shards of codes and features.

Training then needs neither the images nor an encoder. One crop feeds the image tokenizer and every
encoder. The work can be stopped at any time: finished shards stay, the same command goes on.
"""

import contextlib
import errno
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from arra.data.feature_statistics import feature_infos
from arra.data.images import CROP
from arra.data.manifest import FILE as MANIFEST
from arra.data.plan import Unit, make_plan, settle_plan, split_off, units_of
from arra.data.prepare_config import PrepareConfig, named_encoders, split_name
from arra.data.progress import Meter
from arra.data.shards import (
    Manifest,
    ShardInfo,
    SplitInfo,
    TextFeatureInfo,
    TokenizerInfo,
    read_manifest,
    write_manifest,
    write_shard,
)
from arra.data.sources import FIRST_SPLIT, Source, open_source
from arra.data.text_column import TEXT_FEATURE
from arra.data.work import Worker, manifest_columns, shard_columns
from arra.device import pick_device
from arra.encoders import Encoder, load_encoder
from arra.encoders.text import TextEncoder, load_text_encoder
from arra.files import atomic_write, read_json, sha256_of, write_json
from arra.image_tokenizers.interface import ImageTokenizer

REJECTS = "rejects.jsonl"
PROGRESS = ".progress"
"""Folder with one small JSON file per finished shard: what makes `prepare` resumable."""


def prepare(config: PrepareConfig, image_tokenizer: ImageTokenizer | None = None) -> Path:
    """Prepares a dataset, or goes on with one, and returns its folder.

    Args:
        config: what to do.
        image_tokenizer: used instead of loading `config.image_tokenizer`.

    Raises:
        ValueError: wrong or changed settings, nothing usable in the source.
        OSError: the disk is full; finished shards stay and the same command goes on.
    """
    out = config.out
    device = pick_device(config.device)
    parts = split_off(_open(config), config.val_fraction, config.seed)
    if image_tokenizer is None:
        from arra.image_tokenizers import load_image_tokenizer

        image_tokenizer = load_image_tokenizer(config.image_tokenizer, device)
    if config.size % image_tokenizer.factor:
        raise ValueError(
            f"--size {config.size} does not fit image tokenizer {config.image_tokenizer}, which "
            f"makes one code of {image_tokenizer.factor} pixels: choose a multiple"
        )
    encoders = _load_encoders(config.encoder, device)
    text_encoders = _load_text_encoder(config, device)
    fingerprints = {name: encoder.fingerprint for name, encoder in encoders.items()}
    fingerprints |= {TEXT_FEATURE + name: e.fingerprint for name, e in text_encoders.items()}
    plan = settle_plan(
        out,
        make_plan(
            _options(config),
            parts=parts,
            tokenizer=image_tokenizer.fingerprint,
            encoders=fingerprints,
            threads=config.threads or torch.get_num_threads(),
            device=device,
        ),
    )
    units = units_of(parts, config.shard_rows)
    try:
        with _settled(plan["threads"]), _pool(config.workers) as pool:
            worker = Worker(
                image_tokenizer,
                encoders,
                config.size,
                config.batch_size,
                device,
                pool,
                text_encoders,
            )
            made = _make_units(out, units, worker)
        if not made and _is_finished(out):
            return out
        _finish(config, out, parts, units, image_tokenizer, encoders, text_encoders)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        done = sum(_finished(out, unit) is not None for unit in units)
        raise OSError(
            errno.ENOSPC,
            f"no space left on the disk: {done} of {len(units)} shards are finished and kept, free "
            f"some space and run the same command again",
            str(out),
        ) from None
    return out


def _open(config: PrepareConfig) -> dict[str, Source]:
    def opened(split: str | None) -> Source:
        return open_source(
            config.source,
            split=split,
            text_column=config.text_column,
            image_column=config.image_column,
            limit=config.limit,
            seed=config.seed,
        )

    names = config.splits or opened(FIRST_SPLIT).splits
    sources = [opened(name) for name in names]
    return {source.split: source for source in sources}


def _options(config: PrepareConfig) -> dict[str, Any]:
    """The flags that decide bytes. What was named is compared by its content instead."""
    left_out = {"source", "image_tokenizer", "out", "encoder", "workers", "device"}
    left_out |= {"text_encoder", "text_length"}
    return {k: v for k, v in asdict(config).items() if k not in left_out} | {
        "splits": list(config.splits)
    }


def _load_encoders(specs: tuple[str, ...], device: str) -> dict[str, Encoder]:
    encoders: dict[str, Encoder] = {}
    for name, each in named_encoders(specs).items():
        for spec in each:
            encoder = load_encoder(spec, device=device)
            key = name or encoder.name
            if key in encoders:
                raise ValueError(
                    f"two encoders are called {key!r}: name them, --encoder NAME={spec}"
                )
            encoders[key] = encoder
    return {name: encoders[name] for name in sorted(encoders)}


def _load_text_encoder(config: PrepareConfig, device: str) -> dict[str, TextEncoder]:
    """By feature name: one, or none."""
    if config.text_encoder is None:
        return {}
    name, spec = split_name("--text-encoder", config.text_encoder)
    encoder = load_text_encoder(spec, config.text_length, device)
    return {name or encoder.name: encoder}


@contextlib.contextmanager
def _settled(threads: int) -> Iterator[None]:
    """One way of computing, whoever calls: threads, full float32, one algorithm per shape."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with (
            torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False),
            torch.inference_mode(),
            warnings.catch_warnings(),
        ):
            # Pillow warns of large photographs long before they are too large (images.MAX_PIXELS).
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        torch.set_num_threads(before)


def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers or os.cpu_count() or 1, thread_name_prefix="decode")


# Units


def _make_units(out: Path, units: list[Unit], worker: Worker) -> int:
    """Makes the shards that are not finished yet; returns their number."""
    for leftover in [*out.glob(".*.partial"), *out.glob(f"{PROGRESS}/.*.partial")]:
        leftover.unlink(missing_ok=True)
    waiting = [unit for unit in units if _finished(out, unit) is None]
    total = sum(unit.stop - unit.start for unit in units)
    done = total - sum(unit.stop - unit.start for unit in waiting)
    with Meter("prepare", total, done) as meter:
        for unit in waiting:
            rows, rejects = worker.make(unit, meter.add)
            shard = None
            if rows:
                columns = shard_columns(unit.source.columns)
                shard = write_shard(out / unit.file, rows, worker.dims, columns, worker.text_dims)
            write_json(
                _note(out, unit),
                {
                    "shard": asdict(shard) if shard else None,
                    "rejects": [{"split": unit.source.split, **asdict(r)} for r in rejects],
                },
            )
    return len(waiting)


def _note(out: Path, unit: Unit) -> Path:
    return out / PROGRESS / f"{unit.split}-{unit.number:05d}.json"


def _finished(out: Path, unit: Unit) -> dict[str, Any] | None:
    """What is known of a finished shard; None where it is missing or a byte of it has changed."""
    path = _note(out, unit)
    if not path.is_file():
        return None
    try:
        note = read_json(path)
    except ValueError:
        return None
    shard = note["shard"]
    if shard is not None:
        file = out / shard["file"]
        if not file.is_file() or sha256_of(file) != shard["sha256"]:
            return None
    return note


def _is_finished(out: Path) -> bool:
    if not (out / MANIFEST).is_file() or not (out / REJECTS).is_file():
        return False
    try:
        return read_manifest(out).rejects_sha256 == sha256_of(out / REJECTS)
    except ValueError:
        return False  # damaged: it is written again from the shards


# The end


def _finish(
    config: PrepareConfig,
    out: Path,
    parts: Mapping[str, Source],
    units: list[Unit],
    tokenizer: ImageTokenizer,
    encoders: Mapping[str, Encoder],
    text_encoders: Mapping[str, TextEncoder],
) -> None:
    notes = {(unit.split, unit.number): read_json(_note(out, unit)) for unit in units}
    splits: dict[str, SplitInfo] = {}
    for split in parts:
        mine = [notes[unit.split, unit.number]["shard"] for unit in units if unit.split == split]
        shards = [ShardInfo(**shard) for shard in mine if shard is not None]
        if shards:
            splits[split] = SplitInfo(sum(shard.rows for shard in shards), shards)
    rejects = [reject for note in notes.values() for reject in note["rejects"]]
    _write_rejects(out / REJECTS, rejects)
    first = "train" if "train" in parts else next(iter(parts))
    if first not in splits:
        raise ValueError(
            f"no row of {config.source} ({first}) can be used, the first because: "
            f"{rejects[0]['reason']}. See {out / REJECTS}"
        )
    infos = feature_infos([out / shard.file for shard in splits[first].shards], encoders)
    source = parts[first]
    write_manifest(
        out,
        Manifest(
            splits=splits,
            tokenizer=TokenizerInfo(
                _anchored(config.image_tokenizer),
                tokenizer.fingerprint,
                tokenizer.codebook_size,
                tokenizer.factor,
            ),
            features={k: replace(v, spec=_anchored(v.spec)) for k, v in infos.items()},
            size=config.size,
            crop=CROP,
            columns=manifest_columns(source.columns),
            class_names=list(source.class_names),
            source={
                "name": _anchored(config.source),
                "text_column": config.text_column,
                "image_column": config.image_column,
                "limit": config.limit,
                "fingerprints": {name: part.fingerprint for name, part in parts.items()},
            },
            rejects=len(rejects),
            rejects_sha256=sha256_of(out / REJECTS),
            text_features={
                name: TextFeatureInfo(e.dim, e.fingerprint, _anchored(e.spec), e.length)
                for name, e in text_encoders.items()
            },
        ),
    )


def _anchored(spec: str) -> str:
    """A local path as an absolute one: a manifest may be read from another working folder."""
    path = Path(spec).expanduser()
    return spec if spec.startswith("builtin:") or not path.exists() else str(path.resolve())


def _write_rejects(path: Path, rejects: list[dict[str, Any]]) -> None:
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as handle:
        for reject in rejects:
            handle.write(json.dumps(reject, ensure_ascii=False) + "\n")
