"""Makes the units of a job on this machine: decoding runs ahead of the device."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from arra.data.decode import Decoded, Decoder
from arra.data.job import Job, settled
from arra.data.plan import Unit
from arra.data.progress import Meter
from arra.data.shards import Row
from arra.data.sources import Reject

GROUP = 8
"""Rows that one task of the pool decodes."""


def make_units(job: Job, waiting: Sequence[Unit]) -> None:
    """Makes the shards of the units in `waiting`.

    Raises:
        OSError: the disk is full, or cannot be written or read.
    """
    total = sum(unit.stop - unit.start for unit in job.units)
    done = total - sum(unit.stop - unit.start for unit in waiting)
    workers = job.config.workers or os.cpu_count() or 1
    with (
        settled(job.plan["threads"]),
        ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool,
        Meter("prepare", total, done) as meter,
    ):
        for unit in waiting:
            job.write(unit, _make(job, unit, pool, meter))


def _make(job: Job, unit: Unit, pool: ThreadPoolExecutor, meter: Meter) -> list[Row | Reject]:
    """A row or a reject for each row of the unit, in order.

    Batches never cross a unit, and pictures of one batch have one shape.
    """
    done: list[Row | Reject | None] = []
    batches: dict[tuple[int, ...], list[tuple[int, Decoded]]] = {}

    def flush(batch: list[tuple[int, Decoded]]) -> None:
        made = job.models.encode([item for _, item in batch])
        for (place, _), item in zip(batch, made, strict=True):
            done[place] = item
        meter.add(len(batch), sum(isinstance(item, Reject) for item in made))
        batch.clear()

    for item in _decoded(job.decoder(unit.split), unit, pool, 2 * job.config.batch_size):
        if isinstance(item, Reject):
            done.append(item)
            meter.add(1, 1)
            continue
        batch = batches.setdefault(tuple(item.pixels_CHW.shape), [])
        batch.append((len(done), item))
        done.append(None)  # until its batch is full
        if len(batch) == job.config.batch_size:
            flush(batch)
    for batch in batches.values():
        if batch:
            flush(batch)
    return [item for item in done if item is not None]


def _decoded(
    decoder: Decoder, unit: Unit, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[Decoded | Reject]:
    """Decodes about `ahead` rows ahead in the pool, and keeps the order."""
    waiting: deque[Future[list[Decoded | Reject]]] = deque()
    rows = unit.source.read(unit.start, unit.stop)
    while group := list(islice(rows, GROUP)):
        waiting.append(pool.submit(decoder, group))
        if len(waiting) * GROUP > ahead:
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()
