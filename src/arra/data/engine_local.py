"""Makes the units of a job on this machine, its stages side by side.

read and decode (ahead, in other processes or threads) -> the device (this thread) -> write (a
thread). Whoever decodes, the order of rows and the batches are the same, and so is every byte.
"""

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from queue import Full, Queue
from threading import Event

from arra.data.decode import Decoded, Decoder
from arra.data.decode_processes import DecodeProcesses, why_not
from arra.data.encode import Begun
from arra.data.job import Job, settled
from arra.data.plan import Unit
from arra.data.progress import Meter, Usage
from arra.data.shard_file import Row
from arra.data.sources import Record, Reject
from arra.data.writer import Writer

GROUP = 8
"""Rows that are decoded together."""
ROWS_FOR_PROCESSES = 2000
"""With fewer rows to make, `--workers auto` starts no processes: they need seconds to start."""
AHEAD_BYTES = 2**31
"""Decoded pictures that wait in memory take about as much at most."""

_Decode = Callable[[str, Sequence[Record | Reject]], list[Decoded | Reject]]


def make_units(job: Job, waiting: Sequence[Unit], usage: Usage | None = None) -> None:
    """Makes the shards of the units in `waiting`.

    Args:
        job: what is to be made.
        waiting: which of its units.
        usage: learns what the device did and waited for.

    Raises:
        ValueError: the source is damaged, or `--workers` asks for what cannot be.
        OSError: the disk is full, or cannot be written or read; a decoding process was killed.
    """
    if not waiting:
        return
    total, rows = _rows(job.mine), _rows(waiting)
    usage = usage or Usage()
    with (
        settled(job.plan["threads"]),
        Meter("prepare", total, total - rows, usage.told) as meter,
        Writer(job.write, usage) as writer,
        decoding(job, waiting) as decoded,
    ):
        line = _Line(job, writer, meter, usage)
        for unit, items in usage.pictures(decoded):
            writer.check()
            line.take(unit, items)
        line.finish()
        writer.finish()


def _rows(units: Sequence[Unit]) -> int:
    return sum(unit.stop - unit.start for unit in units)


# ---- the device ----------------------------------------------------------------------------------


@dataclass
class _Shard:
    """A unit in the making.

    Attributes:
        done: a row or a reject for each row of the unit, None where it is under way.
        open: batches that are not full, by the shape of their pictures: places and pictures.
        missing: how many are None, or not read.
    """

    unit: Unit
    missing: int
    done: list[Row | Reject | None] = field(default_factory=list)
    open: dict[tuple[int, ...], list[tuple[int, Decoded]]] = field(default_factory=dict)


class _Line:
    """Makes batches of pictures, has them encoded, and hands finished units to the writer.

    Batches never cross a unit, and pictures of one batch have one shape. On a GPU one batch is
    computed while the next one is made ready; nothing waits for it in between.
    """

    def __init__(self, job: Job, writer: Writer, meter: Meter, usage: Usage) -> None:
        self._job, self._writer, self._meter, self._usage = job, writer, meter, usage
        self._ahead = 1 if job.models.device.startswith("cuda") else 0
        self._shard: _Shard | None = None
        self._begun: deque[tuple[_Shard, list[int], Begun]] = deque()

    def take(self, unit: Unit, items: Sequence[Decoded | Reject]) -> None:
        """The unit's next rows, in order."""
        if self._shard is None:
            self._shard = _Shard(unit, unit.stop - unit.start)
        shard = self._shard
        assert shard.unit == unit
        for item in items:
            if isinstance(item, Reject):
                shard.done.append(item)
                self._settled(shard, 1, 1)
                continue
            batch = shard.open.setdefault(tuple(item.pixels_CHW.shape), [])
            batch.append((len(shard.done), item))
            shard.done.append(None)
            if len(batch) == self._job.plan["batch_size"]:
                self._begin(shard, batch)
        if len(shard.done) == unit.stop - unit.start:
            for batch in shard.open.values():
                if batch:
                    self._begin(shard, batch)
            self._shard = None

    def finish(self) -> None:
        """Waits for what is under way."""
        while self._begun:
            self._end()

    def _begin(self, shard: _Shard, batch: list[tuple[int, Decoded]]) -> None:
        begun = self._job.models.begin([item for _, item in batch])
        self._begun.append((shard, [place for place, _ in batch], begun))
        batch.clear()
        while len(self._begun) > self._ahead:
            self._end()

    def _end(self) -> None:
        shard, places, begun = self._begun.popleft()
        made = begun.rows()
        self._usage.device += begun.seconds
        for place, item in zip(places, made, strict=True):
            shard.done[place] = item
        self._settled(shard, len(made), sum(isinstance(item, Reject) for item in made))

    def _settled(self, shard: _Shard, rows: int, left_out: int) -> None:
        self._meter.add(rows, left_out)
        shard.missing -= rows
        if shard.missing == 0:
            self._writer.put(shard.unit, [item for item in shard.done if item is not None])


# ---- before it -----------------------------------------------------------------------------------


@contextlib.contextmanager
def decoding(
    job: Job, units: Sequence[Unit]
) -> Iterator[Iterator[tuple[Unit, list[Decoded | Reject]]]]:
    """The units' rows, decoded ahead of who iterates: groups in order, of one unit each."""
    decoders = {split: job.decoder(split) for split in job.parts}
    processes = _processes(job, decoders, _rows(units))
    threads = processes or _cores()
    size = next(iter(decoders.values())).blank().nbytes
    wanted = max(2 * job.plan["batch_size"], 2 * threads * GROUP)
    ahead = min(wanted // GROUP, max(1, AHEAD_BYTES // (size * GROUP)))
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="decode"))
        decode: _Decode = lambda split, rows: decoders[split](rows)  # noqa: E731
        if processes:
            decode = stack.enter_context(DecodeProcesses(decoders, processes))
        reading = _Reading(units, decode, pool, ahead)
        try:
            yield reading.in_order()
        finally:
            reading.stop()
            pool.shutdown(wait=False, cancel_futures=True)


def _processes(job: Job, decoders: Mapping[str, Decoder], rows: int) -> int:
    """How many processes decode; 0 = threads of this one do."""
    asked = job.config.workers
    if asked == 0 or (asked == "auto" and rows < ROWS_FOR_PROCESSES):
        return 0
    reason = why_not(next(iter(decoders.values())))
    if reason is None:
        return max(1, _cores() - 1) if asked == "auto" else int(asked)
    remedy = "make the function one of a module's own, not one inside another"
    if asked != "auto":
        raise ValueError(f"--workers {asked}: {reason}; {remedy}, or use --workers 0")
    print(f"prepare: decoding in this process, for {reason}: {remedy}", file=sys.stderr)
    return 0


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class _Reading:
    """Reads rows in a thread, and has them decoded by a pool, `ahead` groups of rows ahead."""

    def __init__(
        self, units: Sequence[Unit], decode: _Decode, pool: ThreadPoolExecutor, ahead: int
    ) -> None:
        self._units, self._decode, self._pool = units, decode, pool
        self._stopped = Event()
        self._queue: Queue[tuple[Unit, Future[list[Decoded | Reject]]] | None] = Queue(ahead)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._read = self._thread.submit(self._run)

    def in_order(self) -> Iterator[tuple[Unit, list[Decoded | Reject]]]:
        """Groups of rows with their unit."""
        while (item := self._queue.get()) is not None:
            unit, decoded = item
            yield unit, decoded.result()
        self._read.result()  # raises what ended it too early

    def stop(self) -> None:
        """Reads no further."""
        self._stopped.set()
        self._thread.shutdown(wait=False)

    def _run(self) -> None:
        try:
            for unit in self._units:
                rows = unit.source.read(unit.start, unit.stop)
                while not self._stopped.is_set() and (group := list(islice(rows, GROUP))):
                    self._put((unit, self._pool.submit(self._decode, unit.split, group)))
        finally:
            self._put(None)

    def _put(self, item: tuple[Unit, Future[list[Decoded | Reject]]] | None) -> None:
        while not self._stopped.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except Full:
                continue
