"""One preparation: its plan, its units, which of them are finished, and the manifest at the end.

A job is opened from the settings alone, so that any process (a worker of a cluster, the i-th of n
machines) can open the same one and make some of its units. A unit is one shard. What it has become
is written in a note of its own, `.progress/SPLIT-NUMBER.json`; the notes together are the manifest.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from arra.data.batch_size import choose_batch_size
from arra.data.decode import Decoder
from arra.data.encode import Models, manifest_columns, shard_columns
from arra.data.feature_statistics import feature_infos, grid_infos
from arra.data.framing import Framing
from arra.data.images import ignore_pillow
from arra.data.manifest import FILE as MANIFEST
from arra.data.manifest import (
    Manifest,
    ShardInfo,
    SplitInfo,
    TextFeatureInfo,
    TokenizerInfo,
    read_manifest,
    write_manifest,
)
from arra.data.plan import Unit, make_plan, read_plan, settle_plan, split_off, units_of
from arra.data.prepare_config import PrepareConfig, named_encoders, shard_of, split_name
from arra.data.rejects import REJECTS, write_rejects
from arra.data.selection import describe
from arra.data.shard_file import Row, write_shard
from arra.data.sources import FIRST_SPLIT, Reject, Source
from arra.data.text_column import TEXT_FEATURE
from arra.device import pick_device
from arra.encoders import Encoder, load_encoder
from arra.encoders.text import TextEncoder, load_text_encoder
from arra.files import read_sealed, sha256_of, write_sealed
from arra.image_tokenizers.interface import ImageTokenizer

PROGRESS = ".progress"
"""Folder with one small JSON file per finished shard: what makes `prepare` resumable."""


@dataclass(frozen=True)
class Job:
    """A preparation that is under way.

    Attributes:
        config: what was asked for.
        models: what every picture goes through.
        parts: the dataset's splits.
        units: every shard that is to be, in order.
        plan: as resolved once and kept (plan.py).
        framing: what of a picture is seen.
    """

    config: PrepareConfig
    models: Models
    parts: Mapping[str, Source]
    units: Sequence[Unit]
    plan: Mapping[str, Any]
    framing: Framing

    @property
    def out(self) -> Path:
        """The dataset's folder."""
        return self.config.out

    def decoder(self, split: str) -> Decoder:
        """The stage before the models; it can be sent to another process. Views are for train."""
        encoders = self.models.encoders
        framing = self.framing if split == "train" else replace(self.framing, views="none")
        return Decoder(framing, {name: e.pixels for name, e in encoders.items()})

    # ---- units ----------------------------------------------------------------------------------

    @property
    def mine(self) -> list[Unit]:
        """The units that this machine makes: all of them, or its share (`--shard`)."""
        number, machines = shard_of(self.config.shard)
        return [unit for place, unit in enumerate(self.units) if place % machines == number]

    def waiting(self) -> list[Unit]:
        """The units of this machine that are not finished."""
        return [unit for unit in self.mine if self.finished(unit) is None]

    def left_to_others(self) -> list[Unit]:
        """The units of other machines that are not finished."""
        mine = {(unit.split, unit.number) for unit in self.mine}
        others = [unit for unit in self.units if (unit.split, unit.number) not in mine]
        # Their shards are read through only when all of them are there.
        begun = [unit for unit in others if not self.note(unit).is_file()]
        return begun or [unit for unit in others if self.finished(unit) is None]

    def finished(self, unit: Unit) -> dict[str, Any] | None:
        """A finished unit's note; None where it is missing or a byte of the shard has changed."""
        path = self.note(unit)
        if not path.is_file():
            return None
        try:
            note = read_sealed(path)
        except ValueError:
            return None
        shard = note["shard"]
        if shard is not None:
            file = self.out / shard["file"]
            if not file.is_file() or sha256_of(file) != shard["sha256"]:
                return None
        return note

    def note(self, unit: Unit) -> Path:
        """Where it is written what a unit has become."""
        return self.out / PROGRESS / f"{unit.split}-{unit.number:05d}.json"

    def write(self, unit: Unit, done: Sequence[Row | Reject]) -> None:
        """Writes the shard of a unit and then its note.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        assert len(done) == unit.stop - unit.start, "a row became neither a row nor a reject"
        rows = [item for item in done if isinstance(item, Row)]
        rejects = [item for item in done if isinstance(item, Reject)]
        shard = None
        if rows:
            columns = shard_columns(unit.source.columns)
            dims, text_dims = self.models.dims, self.models.text_dims
            with_views = self.framing.views != "none"
            shard = write_shard(self.out / unit.file, rows, dims, columns, text_dims, with_views)
        write_sealed(
            self.note(unit),
            {
                "shard": asdict(shard) if shard else None,
                "rejects": [{"split": unit.source.split, **asdict(r)} for r in rejects],
            },
        )

    # ---- the end --------------------------------------------------------------------------------

    def is_complete(self) -> bool:
        """Whether the manifest is written and neither it nor the rejects have changed since."""
        if not (self.out / MANIFEST).is_file() or not (self.out / REJECTS).is_file():
            return False
        try:
            return read_manifest(self.out).rejects_sha256 == sha256_of(self.out / REJECTS)
        except ValueError:
            return False  # damaged: it is written again from the shards

    def complete(self) -> None:
        """Writes rejects.jsonl and the manifest from the notes of all units.

        Raises:
            ValueError: no row of the source can be used.
        """
        config, out = self.config, self.out
        notes = {(u.split, u.number): read_sealed(self.note(u)) for u in self.units}
        splits: dict[str, SplitInfo] = {}
        for split in self.parts:
            mine = [notes[u.split, u.number]["shard"] for u in self.units if u.split == split]
            shards = [ShardInfo(**shard) for shard in mine if shard is not None]
            if shards:
                splits[split] = SplitInfo(sum(shard.rows for shard in shards), shards)
        rejects = [reject for note in notes.values() for reject in note["rejects"]]
        write_rejects(out / REJECTS, rejects)
        first = "train" if "train" in self.parts else next(iter(self.parts))
        if first not in splits:
            raise ValueError(
                f"no row of {config.source} ({first}) can be used, the first because: "
                f"{rejects[0]['reason']}. See {out / REJECTS}"
            )
        infos = feature_infos(
            [out / s.file for s in splits[first].shards],
            {name: self.models.encoders[name] for name in self.models.dims},
        )
        grids = grid_infos(out, splits[first].shards, self.models.encoders, self.models.grids)
        source, tokenizer = self.parts[first], self.models.tokenizer
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
                grids={k: replace(v, spec=_anchored(v.spec)) for k, v in grids.items()},
                size=config.size,
                crop=self.framing.name,
                framing=self.framing.described(),
                columns=manifest_columns(source.columns),
                class_names=list(source.class_names),
                source={
                    "name": _anchored(config.source),
                    **describe(config.reading),
                    "fingerprints": {name: part.fingerprint for name, part in self.parts.items()},
                },
                rejects=len(rejects),
                rejects_sha256=sha256_of(out / REJECTS),
                text_features={
                    name: TextFeatureInfo(e.dim, e.fingerprint, _anchored(e.spec), e.length)
                    for name, e in self.models.text_encoders.items()
                },
            ),
        )


def _anchored(spec: str) -> str:
    """A local path as an absolute one: a manifest may be read from another working folder."""
    if "://" in spec:
        return spec
    there = Path(spec).expanduser().exists()
    located, mark, options = (spec, "", "") if there else spec.partition("?")
    path = Path(located).expanduser()
    if spec.startswith("builtin:") or not path.exists():
        return spec
    return f"{path.resolve()}{mark}{options}"


# ---- opening -------------------------------------------------------------------------------------


def open_job(
    config: PrepareConfig,
    image_tokenizer: ImageTokenizer | None = None,
    here: str | None = None,
) -> Job:
    """Opens sources and models and settles the plan: a new one, or the one that was begun.

    Args:
        config: what to do.
        image_tokenizer: used instead of loading `config.image_tokenizer`.
        here: device for the models of a process that makes no units itself; `config.device` is
            then that of those who do, and need not be there.

    Raises:
        ValueError: wrong or changed settings.
    """
    planned = pick_device(config.device) if here is None else config.device
    device = here or planned
    parts = split_off(_open_sources(config), config.val_fraction, config.seed)
    if image_tokenizer is None:
        from arra.image_tokenizers import load_image_tokenizer

        image_tokenizer = load_image_tokenizer(config.image_tokenizer, device)
    framing = config.framing_for(image_tokenizer.factor)
    encoders = _load_encoders(config, device)
    text_encoders = _load_text_encoder(config, device)
    fingerprints = {name: encoder.fingerprint for name, encoder in encoders.items()}
    fingerprints |= {TEXT_FEATURE + name: e.fingerprint for name, e in text_encoders.items()}
    models = Models(image_tokenizer, encoders, text_encoders, device, config.grid_dtype)
    begun = read_plan(config.out)
    threads = config.threads or (begun["threads"] if begun else torch.get_num_threads())
    batch_size = config.batch_size
    if batch_size == "auto":
        blank = Decoder(framing, {name: e.pixels for name, e in encoders.items()}).blank()
        with settled(threads):
            batch_size = begun["batch_size"] if begun else choose_batch_size(models, blank, planned)
    plan = make_plan(
        _options(config),
        parts=parts,
        tokenizer=image_tokenizer.fingerprint,
        encoders=fingerprints,
        threads=threads,
        batch_size=batch_size,
        device=planned,
        crop=framing.name,
    )
    plan = settle_plan(config.out, plan, first_decides=config.resolved)
    return Job(config, models, parts, units_of(parts, config.shard_rows), plan, framing)


def _open_sources(config: PrepareConfig) -> dict[str, Source]:
    def opened(split: str | None) -> Source:
        return config.reading.open(config.source, split)

    names = config.splits or opened(FIRST_SPLIT).splits
    sources = [opened(name) for name in names]
    return {source.split: source for source in sources}


def _options(config: PrepareConfig) -> dict[str, Any]:
    """The flags that decide bytes. What was named is compared by its content instead."""
    left_out = {"source", "image_tokenizer", "out", "encoder", "workers", "device"}
    left_out |= {"text_encoder", "text_length", "batch_size", "threads", "shard"}
    left_out |= {"engine", "ray_address", "ray_workers", "ray_cpus", "ray_gpus"}
    kept = {k: v for k, v in asdict(config).items() if k not in left_out}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}


def _load_encoders(config: PrepareConfig, device: str) -> dict[str, Encoder]:
    encoders: dict[str, Encoder] = {}
    for name, each in named_encoders(config.encoder).items():
        for spec in each:
            encoder = load_encoder(spec, device=device, grids=True, dtype=config.encoder_dtype)
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
def settled(threads: int) -> Iterator[None]:
    """One way of computing, whoever calls: threads, full float32, one algorithm per shape."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with (
            torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False),
            torch.inference_mode(),
            warnings.catch_warnings(),
        ):
            ignore_pillow()
            yield
    finally:
        torch.set_num_threads(before)
