"""Writing files so that a crash, a kill or a full disk never leaves half of one behind.

Everything is written beside its final name, flushed to the disk and renamed. A reader therefore
sees either the old content or the new one.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _umask() -> int:
    """The process's umask: it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries, without which a rename can be lost on power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_PARTIAL = re.compile(r"\..+\.(?P<host>[\w-]+)-(?P<pid>\d+)-[0-9a-f]{8}\.partial", re.S)
_A_DAY = 86_400.0


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_]", "-", socket.gethostname())[:32] or "host"


def _partial(path: Path) -> Path:
    """Where `path` is written first. The name says who writes it, for `is_abandoned`."""
    writer = f"{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return path.with_name(f".{path.name}.{writer}.partial")


def is_abandoned(path: Path) -> bool:
    """Whether nobody goes on writing a temporary file: its process is no more, or a day has passed.

    Of another machine's processes only the day is known.
    """
    named = _PARTIAL.fullmatch(path.name)
    try:
        old = time.time() - path.stat().st_mtime > _A_DAY
    except FileNotFoundError:
        return False  # its writer has just renamed it
    return old or (named is not None and named["host"] == _host() and not _lives(int(named["pid"])))


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


@contextlib.contextmanager
def atomic_write(path: Path | str, *, only_new: bool = False) -> Iterator[Path]:
    """Yields a temporary path; on success it is synced and renamed to `path`, else removed.

    With `only_new` a file that is there already stays, and FileExistsError is raised: of several
    processes that write at once, exactly one succeeds.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _partial(path)
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        if only_new:
            _publish(temporary, path)
        else:
            os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _publish(temporary: Path, path: Path) -> None:
    """Gives a complete file its name, unless the name is taken."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        # A file system without hard links: an empty file takes the name first.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        os.replace(temporary, path)


@contextlib.contextmanager
def atomic_dir(path: Path | str) -> Iterator[Path]:
    """Yields a temporary folder; on success every file is synced and the folder renamed to `path`.

    Files get the permissions that the user's umask gives, also those of libraries that write for
    the owner alone. Raises FileExistsError if `path` exists: a finished result is never replaced.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} already exists: choose another place or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _partial(path)
    temporary.mkdir()
    try:
        yield temporary
        for root, _, names in os.walk(temporary):
            for name in names:
                os.chmod(Path(root) / name, 0o666 & ~_umask())
                with open(Path(root) / name, "rb") as handle:
                    os.fsync(handle.fileno())
            sync_folder(Path(root))
        os.rename(temporary, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path | str, value: Any, *, only_new: bool = False) -> None:
    """Writes `value` as indented JSON with a final newline. NaN is refused: JSON has none.

    `only_new` as in `atomic_write`.
    """
    with atomic_write(path, only_new=only_new) as temporary:
        temporary.write_text(_text(value), encoding="utf-8")


def read_json(path: Path | str) -> Any:
    """Reads JSON; a missing or damaged file is named in the error."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): it is damaged or cut off") from None


def sha256_of(path: Path | str) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_sealed(path: Path | str, value: dict[str, Any], *, only_new: bool = False) -> None:
    """Writes a JSON object with the SHA-256 of its own content as its first entry.

    `only_new` as in `atomic_write`.
    """
    write_json(path, {"sha256": _seal(value), **value}, only_new=only_new)


def read_sealed(path: Path | str) -> dict[str, Any]:
    """Reads what `write_sealed` wrote, without the SHA-256.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: a byte of it has changed, be it a space.
    """
    path = Path(path)
    content = read_json(path)
    if not isinstance(content, dict) or "sha256" not in content:
        raise ValueError(f"{path} has no SHA-256 of its own: it is damaged, or of another version")
    value = {name: each for name, each in content.items() if name != "sha256"}
    if content["sha256"] != _seal(value) or path.read_bytes() != _text(content).encode():
        raise ValueError(f"{path} is damaged or was edited (its SHA-256 is another)")
    return value


def _seal(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _text(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
