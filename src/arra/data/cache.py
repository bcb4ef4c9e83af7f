"""Shards of object stores on this machine's disk: fetched once, verified, the least recently used
deleted when room is needed.

Several processes share one folder. A file has its name only when it is whole and right, and a name
holds the SHA-256, so that datasets cannot be mixed up. While a shard comes in, its temporary file
has its full length from the start: what is on its way counts as what is there. A shard that
somebody holds (a shared lock on the file) is not deleted.
"""

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from arra.data.manifest import AGAIN, ShardInfo
from arra.files import atomic_write, is_abandoned, sha256_of

Value = TypeVar("Value")

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before a store is asked once more."""

ROOM_WAIT = 60.0
"""Seconds for which room is waited for, while others hold or fetch what is in the cache."""

_PIECE = 2**25
"""Bytes of one request."""

_LOCKS = 256


class Stopped(Exception):
    """Nobody wants the shard any more."""


class Held:
    """A shard on the disk that stays until `close`."""

    def __init__(self, path: Path, handle: BinaryIO | None = None) -> None:
        self.path, self._handle = path, handle

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()


class ShardCache:
    """A folder of shards, never more than `limit` bytes of them.

    Args:
        folder: made when the first shard comes in.
        limit: bytes.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.stopping = threading.Event()
        self._seen: set[str] = set()  # verified by this process

    def hold(self, source: Path, shard: ShardInfo) -> Held:
        """The shard at `source`, fetched unless it is there.

        Raises:
            FileNotFoundError: the store has no such object.
            OSError: the store did not answer, at six attempts.
            ValueError: it is damaged where it comes from, or larger than the cache.
            Stopped: `stopping` was set.
        """
        name = f"{shard.sha256[:16]}-{shard.file}"
        path = self.folder / name
        with self._lock(f"{int(shard.sha256[:8], 16) % _LOCKS}"):
            held = self._there(path, shard)
            if held is None:
                self._fetch(source, path, shard)
                self._seen.add(name)
                held = self._there(path, shard)
        if held is None:  # deleted at once to make room for others
            return self.hold(source, shard)
        os.utime(path)
        return held

    # ---- what is there --------------------------------------------------------------------------

    def _there(self, path: Path, shard: ShardInfo) -> Held | None:
        try:
            handle = open(path, "rb")  # noqa: SIM115  # closed by whoever holds it
        except FileNotFoundError:
            return None
        fcntl.flock(handle, fcntl.LOCK_SH)
        if os.fstat(handle.fileno()).st_nlink == 0:
            handle.close()
            return None
        if path.name not in self._seen and sha256_of(path) != shard.sha256:
            path.unlink()  # changed since it came in
            handle.close()
            return None
        self._seen.add(path.name)
        return Held(path, handle)

    def _make_room(self, size: int, wanted: Path) -> None:
        """Creates `wanted` with its full length; before, deletes what was used longest ago."""
        if size > self.limit:
            raise ValueError(
                f"--data.cache-gb {self.limit / 1e9:g} is less than one shard, which has "
                f"{size / 1e9:.3g} GB"
            )
        end = time.monotonic() + ROOM_WAIT
        while True:
            with self._lock("room"):
                if self._free(size):
                    with open(wanted, "xb") as handle:
                        handle.truncate(size)
                    return
            self._pause(0.1)
            if time.monotonic() > end:
                raise ValueError(
                    f"the cache {self.folder} of {self.limit / 1e9:g} GB is full of shards that "
                    f"are in use: raise --data.cache-gb, or take a smaller --data.stream"
                )

    def _free(self, size: int) -> bool:
        files = []
        for path in self.folder.iterdir():
            if path.suffix == ".partial" and is_abandoned(path):
                path.unlink(missing_ok=True)
                continue
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if path.is_file():
                files.append((status.st_mtime, status.st_size, path))
        used = sum(length for _, length, _ in files)
        for _, length, path in sorted(files):
            if used + size <= self.limit:
                break
            if path.suffix != ".partial" and _deleted(path):
                used -= length
        return used + size <= self.limit

    # ---- what comes in --------------------------------------------------------------------------

    def _fetch(self, source: Path, path: Path, shard: ShardInfo) -> None:
        for _ in range(2):
            try:
                # Renamed while nobody counts: a name that changes meanwhile would be missed.
                with ExitStack() as uncounted, atomic_write(path) as temporary:
                    size = self._asked(source, lambda: source.stat().st_size)
                    self._make_room(size, temporary)
                    copy = partial(self._copied, source, temporary)
                    if self._asked(source, copy) != shard.sha256:
                        raise _Damaged
                    uncounted.enter_context(self._lock("room"))
                return
            except _Damaged:
                continue
        raise ValueError(f"shard {source} is damaged (its SHA-256 is another, twice): {AGAIN}")

    def _copied(self, source: Path, to: Path) -> str:
        """Copies an object into a file that is there; its SHA-256."""
        digest = hashlib.sha256()
        # Nothing is read ahead: a piece is one request.
        with source.open("rb", cache_type="none") as store, open(to, "r+b") as file:  # type: ignore[call-overload]
            while piece := store.read(_PIECE):
                self._pause(0)
                digest.update(piece)
                file.write(piece)
        return digest.hexdigest()

    def _asked(self, source: Path, request: Callable[[], Value]) -> Value:
        """What a store answers; asked again if it does not."""
        for wait in (*WAITS, None):
            try:
                return request()
            except (FileNotFoundError, Stopped):
                raise
            except Exception as error:  # each store's driver has its own
                if wait is None:
                    reason = (str(error).strip().splitlines() or [""])[0]
                    raise OSError(
                        f"shard {source} cannot be fetched ({type(error).__name__}: {reason}), "
                        f"asked {len(WAITS) + 1} times: check the network and your credentials; "
                        f"the same command goes on from the last checkpoint"
                    ) from error
                self._pause(wait)
        raise AssertionError

    # ---- waiting --------------------------------------------------------------------------------

    def _pause(self, seconds: float) -> None:
        if self.stopping.wait(seconds) if seconds else self.stopping.is_set():
            raise Stopped

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """One process and thread at a time."""
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "wb") as handle:
            while not _taken(handle, fcntl.LOCK_EX):
                self._pause(0.02)
            yield


class _Damaged(Exception):
    """What came in is not what the manifest says."""


def _taken(handle: BinaryIO, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _deleted(path: Path) -> bool:
    """Deletes a shard, unless somebody holds it."""
    try:
        with open(path, "rb") as handle:
            if not _taken(handle, fcntl.LOCK_EX):
                return False
            path.unlink()
    except FileNotFoundError:
        pass
    return True
