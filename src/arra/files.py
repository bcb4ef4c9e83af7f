"""Writing files so that a crash, a kill or a full disk never leaves half of one behind.

Everything is written beside its final name, flushed to the disk and renamed. A reader therefore
sees either the old content or the new one. In an object store, which cannot rename, a file is
written here first and then put there at once; stores show it when it is whole.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from upath import UPath

# ---- places --------------------------------------------------------------------------------------


def place(spec: str | Path) -> Path:
    """Where a user says that something is: a path, or a URL that fsspec knows (s3://, gs://, ...).

    What a URL becomes is a `upath.UPath`. It is called a Path here, for it has a Path's methods;
    what takes nothing else, as `os` and `open(path)` do, is for `is_local` places only.

    Raises:
        ValueError: a URL with a password in it, of an unknown kind, or one whose driver is not
            installed.
    """
    if not isinstance(spec, str):
        return spec
    if "://" not in spec:
        return Path(spec)
    if spec.startswith("file://"):
        return Path(spec.removeprefix("file://"))
    return cast(Path, _remote(spec))


def _remote(url: str) -> "UPath":
    kind = url.split(":")[0]
    if "@" in url and urlsplit(url).password is not None:
        raise ValueError(
            f"a {kind}:// URL holds a password, which would end up in logs: put it where the "
            f"store's own tools look for it, or into fsspec's configuration (docs/cluster.md)"
        )
    try:
        from upath import UPath
    except ModuleNotFoundError:
        raise ValueError(f"{url}: object stores need pip install 'arra[store]'") from None
    try:
        # Listings are not kept: other machines write there as well.
        found = UPath(url, use_listings_cache=False)
        assert found.fs is not None  # made here, so that a missing driver is told here
    except ImportError as error:
        raise ValueError(f"{url}: {_driver(kind, error)}") from None
    except ValueError as error:
        raise ValueError(f"{url} cannot be opened ({error})") from None
    return found


def _driver(kind: str, error: ImportError) -> str:
    """Which package is missing to open a kind of URL."""
    from fsspec.registry import known_implementations

    module = known_implementations[kind]["class"].split(".")[0]
    package = error.name if module == "fsspec" else module
    return f"{kind}:// needs a package that is not installed: pip install {package or error}"


def is_local(path: Path) -> bool:
    """Whether a place is on this machine's file system, rather than in an object store."""
    return isinstance(path, Path)


def reached(path: Path) -> bool:
    """Whether something is at a place.

    Raises:
        OSError: the store that the place is in does not answer, or refuses to.
    """
    if is_local(path):
        return path.exists()
    remote = cast("UPath", path)
    try:
        remote.fs.info(remote.path)  # `exists` would say no where a store refuses
        return True
    except FileNotFoundError:
        return False
    except Exception as error:  # each store's driver has its own
        reason = (str(error).strip().splitlines() or [""])[0]
        raise OSError(
            f"{path} cannot be reached ({type(error).__name__}: {reason}): check the name, the "
            f"network and your credentials"
        ) from error


def readable(path: Path) -> Path | BinaryIO:
    """What libraries that open paths themselves take: a local one, of other places an open file."""
    return path if is_local(path) else cast(BinaryIO, path.open("rb"))


def sizes_below(folder: Path) -> dict[str, int]:
    """Bytes of every object below a folder of an object store, by relative name, sorted: one
    request for a thousand of them. Hidden ones are left out."""
    assert not is_local(folder)
    remote = cast("UPath", folder)
    top, found = remote.path.strip("/"), {}
    for name, info in remote.fs.find(remote.path, detail=True).items():
        relative = name.strip("/").removeprefix(top).strip("/")
        if not any(part.startswith(".") for part in relative.split("/")):
            found[relative] = info["size"]
    return dict(sorted(found.items()))


# ---- writing -------------------------------------------------------------------------------------


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
    processes that write at once, exactly one succeeds (where the store has such a request).
    """
    path = place(path)
    if not is_local(path):
        with _put(cast("UPath", path), only_new) as temporary:
            yield temporary
        return
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


@contextlib.contextmanager
def _put(path: "UPath", only_new: bool) -> Iterator[Path]:
    """Yields a temporary local path; on success its content is put to `path` in one request."""
    with tempfile.TemporaryDirectory(prefix="arra-") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        options = {"mode": "create"} if only_new else {}
        try:
            path.fs.put_file(str(temporary), path.path, **options)
        except FileNotFoundError:  # a store that has folders
            path.parent.mkdir(parents=True, exist_ok=True)
            path.fs.put_file(str(temporary), path.path, **options)
        except NotImplementedError:
            raise OSError(
                f"{path} cannot be written to: it is of a kind that is only read"
            ) from None


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
def atomic_dir(path: Path | str, *, replaces: bool = False) -> Iterator[Path]:
    """Yields a temporary folder; on success every file is synced and the folder renamed to `path`.

    Files get the permissions that the user's umask gives, also those of libraries that write for
    the owner alone. Raises FileExistsError if `path` exists: a finished result is never replaced,
    unless the caller knows what is there and says `replaces`.
    """
    path = Path(path)  # a run's folder or a model's: on this machine
    if path.exists() and not replaces:
        raise FileExistsError(f"{path} already exists: choose another place or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, replaced = _partial(path), _partial(path)
    temporary.mkdir()
    try:
        yield temporary
        for root, _, names in os.walk(temporary):
            for name in names:
                os.chmod(Path(root) / name, 0o666 & ~_umask())
                with open(Path(root) / name, "rb") as handle:
                    os.fsync(handle.fileno())
            sync_folder(Path(root))
        if replaces and path.exists():
            os.rename(path, replaced)
        os.rename(temporary, path)
        sync_folder(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
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
    path = place(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): it is damaged or cut off") from None


def sha256_of(path: Path | str) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with place(path).open("rb") as handle:
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
    path = place(path)
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
