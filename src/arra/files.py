"""Writing files so that a crash, a kill or a full disk never leaves half of one behind.

Everything is written beside its final name, flushed to the disk and renamed. A reader therefore
sees either the old content or the new one.
"""

import contextlib
import hashlib
import json
import os
import shutil
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


@contextlib.contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path; on success it is synced and renamed to `path`, else removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


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
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
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


def write_json(path: Path | str, value: Any) -> None:
    """Writes `value` as indented JSON with a final newline. NaN is refused: JSON has none."""
    with atomic_write(path) as temporary:
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


def write_sealed(path: Path | str, value: dict[str, Any]) -> None:
    """Writes a JSON object with the SHA-256 of its own content as its first entry."""
    write_json(path, {"sha256": _seal(value), **value})


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
