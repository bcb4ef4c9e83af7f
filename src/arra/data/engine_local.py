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
    """A row or a reject for each row of the unit, in order. Batches never cross a unit."""
    done: list[Row | Reject | None] = []
    batch: list[Decoded] = []
    places: list[int] = []

    def flush() -> None:
        for place, item in zip(places, job.models.encode(batch), strict=True):
            done[place] = item
        meter.add(len(batch), sum(isinstance(done[place], Reject) for place in places))
        batch.clear()
        places.clear()

    for item in _decoded(job.decoder, unit, pool, 2 * job.config.batch_size):
        if isinstance(item, Reject):
            done.append(item)
            meter.add(1, 1)
            continue
        places.append(len(done))
        done.append(None)  # until its batch is full
        batch.append(item)
        if len(batch) == job.config.batch_size:
            flush()
    if batch:
        flush()
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
