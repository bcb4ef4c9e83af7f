"""`arra bench prepare`: how fast pictures become a dataset, stage by stage, and what holds them up.

Three stages work at the same time: pictures are decoded, cropped and preprocessed; the device
computes codes and features; shards are written. Each is also timed alone, with the same cores and
batches. The slowest one alone is the limit; the share of it that the whole reaches is the result.
"""

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from arra.bench.pictures import write_models, write_pictures
from arra.data.decode import Decoded
from arra.data.encode import Models
from arra.data.engine_local import decoding, make_units
from arra.data.job import Job, open_job, settled
from arra.data.manifest import read_manifest
from arra.data.plan import Unit
from arra.data.prepare_config import PrepareConfig
from arra.data.progress import Usage
from arra.data.shard_file import Row
from arra.data.sources import Record
from arra.device import pick_device


@dataclass(frozen=True)
class BenchPrepareConfig:
    """Measures `arra prepare` on this machine."""

    source: str | None = None
    """What to prepare, as for `arra prepare`; default: JPEG files of 256 to 512 pixels, drawn."""
    image_tokenizer: str | None = None
    """Default: of a published shape, with random weights."""
    encoder: tuple[str, ...] = ()
    """Default: CLIP ViT-B/16, on a CPU ViT-S/32, with random weights."""
    images: int = 10_000
    """How many are prepared."""
    stage_images: int = 500
    """How many each stage is timed with alone."""
    size: int = 256
    """Pixels per side, as for `arra prepare`."""
    batch_size: Literal["auto"] | int = "auto"
    """As for `arra prepare`."""
    workers: Literal["auto"] | int = "auto"
    """As for `arra prepare`."""
    threads: int = 0
    """As for `arra prepare`."""
    device: str = "auto"
    """As for `arra prepare`."""
    compare_one_by_one: bool = False
    """Also one image at a time, without a batch and without overlap, as the released code does."""

    def __post_init__(self) -> None:
        if min(self.images, self.stage_images, self.size) < 1:
            raise ValueError("--images, --stage-images and --size must be at least 1")


def bench_prepare(config: BenchPrepareConfig) -> dict[str, Any]:
    """Runs it and returns the result, which is also the last line that is printed.

    Raises:
        ValueError: as `arra prepare`.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, what = _open(config, Path(folder))
        before = os.getloadavg()[0]
        alone = _alone(job, config.stage_images)
        whole = _whole(job)
        stages = {name: alone["stages"][name] for name in ("decode", "device", "write")}
        slowest = min(stages, key=lambda name: stages[name])
        result = {
            "images_per_second": whole["images_per_second"],
            "slowest_stage": slowest,
            "fraction_of_slowest_stage": whole["images_per_second"] / stages[slowest],
            "stages_alone": stages,
            "split_ms_per_image": alone["split"],
            "usage": whole["usage"],
            "seconds": whole["seconds"],
            "images": whole["images"],
            "left_out": whole["left_out"],
            "models": what,
            "size": config.size,
            "batch_size": job.plan["batch_size"],
            "threads": job.plan["threads"],
            "workers": config.workers,
            "device": _device(job),
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "load_before": before,
            "load_after": os.getloadavg()[0],
        }
        if config.compare_one_by_one:
            speed = _one_by_one(job, min(config.stage_images, 200))
            result["one_by_one_images_per_second"] = speed
            result["times_one_by_one"] = whole["images_per_second"] / speed
    return _rounded(result)


def told(result: dict[str, Any]) -> str:
    """A table, and one JSON line last."""
    lines = [f"{result['models']}, {result['size']} px, {result['device']}", ""]
    lines += [f"{'stage alone':14}{'images/s':>10}"]
    lines += [f"{name:14}{speed:10.1f}" for name, speed in result["stages_alone"].items()]
    lines += [f"{'all together':14}{result['images_per_second']:10.1f}", ""]
    lines += [f"{'part':24}{'ms/image':>10}   (alone; decoding in one thread)"]
    lines += [f"{name:24}{value:10.2f}" for name, value in result["split_ms_per_image"].items()]
    lines += [
        "",
        f"{result['fraction_of_slowest_stage']:.0%} of the speed of the slowest stage "
        f"({result['slowest_stage']}) alone; device {result['usage']['device']:.0%} busy",
        json.dumps(result),
    ]
    return "\n".join(lines)


def _open(config: BenchPrepareConfig, folder: Path) -> tuple[Job, str]:
    tokenizer, encoder, what = config.image_tokenizer, config.encoder, "given"
    if tokenizer is None or not encoder:
        large = pick_device(config.device).startswith("cuda")
        made_tokenizer, made_encoder, what = write_models(folder / "models", large)
        tokenizer, encoder = tokenizer or made_tokenizer, encoder or (f"clip={made_encoder}",)
    source = config.source
    if source is None:
        print("bench: drawing pictures", file=sys.stderr)
        write_pictures(folder / "pictures", config.images)
        source = str(folder / "pictures")
    options = PrepareConfig(
        source=source,
        image_tokenizer=tokenizer,
        out=folder / "out",
        encoder=encoder,
        size=config.size,
        limit=config.images,
        val_fraction=0,
        batch_size=config.batch_size,
        threads=config.threads,
        workers=config.workers,
        device=config.device,
    )
    return open_job(options), what


# ---- together ------------------------------------------------------------------------------------


def _whole(job: Job) -> dict[str, Any]:
    usage = Usage()
    begun = time.perf_counter()
    make_units(job, job.waiting(), usage)
    seconds = time.perf_counter() - begun
    job.complete()
    rows = sum(unit.stop - unit.start for unit in job.units)
    return {
        "images": rows,
        "left_out": read_manifest(job.out).rejects,
        "seconds": seconds,
        "images_per_second": rows / seconds,
        "usage": usage.shares(),
    }


# ---- alone ---------------------------------------------------------------------------------------


def _alone(job: Job, number: int) -> dict[str, dict[str, float]]:
    """Images per second of each stage, and milliseconds per image of its parts."""
    unit = job.units[0]
    sample = Unit(unit.split, 0, unit.source, 0, min(number, len(unit.source)))
    with settled(job.plan["threads"]), decoding(job, [sample]) as stream:
        next(stream)  # processes have started
        begun = time.perf_counter()
        items = [item for _, group in stream for item in group]
        decode = len(items) / (time.perf_counter() - begun)
    pictures = [item for item in items if isinstance(item, Decoded)]
    if not pictures:
        raise ValueError(f"none of the first images of {job.config.source} can be decoded")
    batches = list(_batches(pictures, job.plan["batch_size"]))
    with settled(job.plan["threads"]):
        job.models.encode(batches[0])
        begun = time.perf_counter()
        rows = [row for batch in batches for row in job.models.encode(batch)]
        device = len(pictures) / (time.perf_counter() - begun)
        begun = time.perf_counter()
        job.write(replace(sample, start=0, stop=len(rows)), rows)
        write = len(rows) / (time.perf_counter() - begun)
        job.note(sample).unlink()
        split = _split(job, sample, batches)
    split["write"] = 1000 / write
    return {"stages": {"decode": decode, "device": device, "write": write}, "split": split}


def _batches(pictures: list[Decoded], size: int) -> Iterator[list[Decoded]]:
    """Of one shape each, as in a unit."""
    shapes: dict[torch.Size, list[Decoded]] = {}
    for item in pictures:
        shapes.setdefault(item.pixels_CHW.shape, []).append(item)
    for same in shapes.values():
        each = iter(same)
        while batch := list(islice(each, size)):
            yield batch


def _split(job: Job, sample: Unit, batches: list[list[Decoded]]) -> dict[str, float]:
    """Milliseconds per image of each part, one after another."""
    number = min(sample.stop, 200)
    begun = time.perf_counter()
    rows = list(sample.source.read(0, number))
    loaded = [
        replace(row, image=row.image.read_bytes())
        if isinstance(row, Record) and isinstance(row.image, Path)
        else row
        for row in rows
    ]
    found = {"read": 1000 * (time.perf_counter() - begun) / number}
    decoder = job.decoder(sample.split)
    bare = replace(decoder, preprocessing={})
    found["decode and crop"] = _milliseconds(partial(bare, loaded), number)
    for name, pixels in decoder.preprocessing.items():
        one = replace(decoder, preprocessing={name: pixels})
        both = _milliseconds(partial(one, loaded), number)
        found[f"preprocess {name}"] = max(0.0, both - found["decode and crop"])
    some = batches[: max(1, 200 // len(batches[0]))]
    pictures = sum(len(batch) for batch in some)
    models = job.models
    parts = {"tokenizer": replace(models, encoders={}, text_encoders={})}
    for name, encoder in models.encoders.items():
        parts[f"encoder {name}"] = replace(models, encoders={name: encoder}, text_encoders={})
    for name, part in parts.items():
        spent = _milliseconds(partial(_encode_all, part, some), pictures)
        found[name] = spent if name == "tokenizer" else max(0.0, spent - found["tokenizer"])
    return found


def _encode_all(models: Models, batches: list[list[Decoded]]) -> None:
    for batch in batches:
        models.encode(batch)


def _milliseconds(work: Callable[[], object], images: int) -> float:
    begun = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - begun) / images


# ---- one by one ----------------------------------------------------------------------------------


def _one_by_one(job: Job, number: int) -> float:
    """Images per second: each is read, seen by every model, and written to files of its own."""
    unit = job.units[0]
    decoder = job.decoder(unit.split)
    rows = list(unit.source.read(0, min(number, len(unit.source))))
    folder = job.out.with_name("one-by-one")
    folder.mkdir()
    with settled(job.plan["threads"]):
        begun = time.perf_counter()
        for place, row in enumerate(rows):
            for item in decoder([row]):
                if isinstance(item, Decoded):
                    _save(job.models.encode([item])[0], folder / str(place))
        return len(rows) / (time.perf_counter() - begun)


def _save(row: object, path: Path) -> None:
    if isinstance(row, Row):
        torch.save(torch.from_numpy(row.codes_hw), f"{path}.codes.pt")
        for name, value in row.features.items():
            torch.save(torch.from_numpy(value.copy()), f"{path}.{name}.pt")


def _device(job: Job) -> str:
    if job.models.device.startswith("cuda"):
        return torch.cuda.get_device_name(job.models.device)
    return job.models.device


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
