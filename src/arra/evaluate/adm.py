"""NumPy .npz files as ADM's evaluator reads them: batches of images, and moments of a reference.

A batch has its pictures as `arr_0`, uint8 (N, H, W, 3); ADM, DiT and LlamaGen write their samples
so. A reference has the moments of a whole data set as well: `mu` and `sigma` of pool_3, `mu_s` and
`sigma_s` of sFID's spatial features (openai/guided-diffusion, evaluations/evaluator.py; LlamaGen's
evaluations/c2i/evaluator.py is the same program). pytorch-fid and clean-fid keep `mu` and `sigma`
alone. What is written here is read by all of them; it adds `count` and `about`, which says how the
moments were made.

Fifty thousand pictures of 256 pixels are 10 GB, so they are read in place, some rows at a time. No
pickle is ever read.

Legend: N images, H, W pixels, D feature width.
"""

import json
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from arra.evaluate.image_set import Entry
from arra.files import atomic_write

IMAGES = "arr_0"
KEYS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
"""Which members have the mean and the covariance of an extractor's stream."""
COUNT, ABOUT = "count", "about"

_LOCAL_HEADER = 30  # bytes of a zip member's own header before its name (APPNOTE.TXT, 4.3.7)
_READ = 1 << 22
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError)


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D, D), float64, N - 1 divisor; `count` is None where not said."""

    mean_D: np.ndarray
    covariance_DD: np.ndarray
    count: int | None


# ---- images --------------------------------------------------------------------------------------


class NpzImages:
    """The pictures of a batch, in order. See `arra.evaluate.image_set.Entries`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or has no uint8 pictures (N, H, W, 3).
    """

    split: str | None = None
    painted: Mapping[str, Any] | None = None

    def __init__(self, path: Path) -> None:
        self._rows = _Rows(path, IMAGES)
        shape, dtype = self._rows.shape, self._rows.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape[1:]:
            raise ValueError(
                f"{path}: {IMAGES} is {dtype} {shape}, but a batch of images is uint8 (N, H, W, 3)"
            )

    def __len__(self) -> int:
        return self._rows.shape[0]

    def read(self, start: int, stop: int) -> Iterator[Entry]:
        """See Entries."""
        rows_nHWC = self._rows.read(start, stop)
        for row, pixels_HWC in enumerate(rows_nHWC, start=start):
            yield Entry(f"row {row}", Image.fromarray(pixels_HWC))


class _Rows:
    """Rows of one array of an .npz file, read when they are asked for.

    `np.savez` stores arrays as they are, so that any row can be sought. A compressed array is gone
    through from its start: reading in order is as fast, going back begins again.
    """

    def __init__(self, path: Path, member: str) -> None:
        self._path, self._member = path, f"{member}.npy"
        try:
            with zipfile.ZipFile(path) as archive:
                if self._member not in archive.namelist():
                    raise ValueError(f"it has no {member}")
                info = archive.getinfo(self._member)
                with archive.open(info) as file:
                    self.shape, self.dtype = _header(file)
                    start = file.tell()
                    while file.read(_READ):  # zipfile checks the sum of a file's bytes at its end
                        pass
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} does not exist") from None
        except _BROKEN as error:
            raise _refusal(path, error) from None
        self._row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        if info.file_size != start + self.shape[0] * self._row_bytes:
            raise _refusal(path, ValueError(f"{member} has fewer bytes than its header says"))
        self._start = start
        self._offset = (
            _data_offset(path, info) if info.compress_type == zipfile.ZIP_STORED else None
        )
        self._stream: IO[bytes] | None = None  # of a compressed array
        self._at = 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`, or to the last one."""
        count = max(0, min(stop, self.shape[0]) - start)
        if self._offset is None:
            data = self._decompressed(start, count)
        else:
            with self._path.open("rb") as file:
                file.seek(self._offset + self._start + start * self._row_bytes)
                data = file.read(count * self._row_bytes)
        if len(data) != count * self._row_bytes:
            raise _refusal(self._path, ValueError("it was changed while it was read"))
        return np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])

    def _decompressed(self, start: int, count: int) -> bytes:
        if self._stream is None:
            self._stream = zipfile.ZipFile(self._path).open(self._member)  # noqa: SIM115 (kept)
        self._stream.seek(self._start + start * self._row_bytes)
        return self._stream.read(count * self._row_bytes)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an .npy array whose rows follow one another in the file."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, column_major, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, column_major, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"an array of format {version[0]}.{version[1]}, not 1.0 or 2.0")
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which only a pickle can hold")
    if column_major or not shape:
        raise ValueError(f"an array {shape} whose rows are not kept one after another")
    return shape, dtype


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where in the archive the bytes of a stored member begin."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER)
    name, extra = struct.unpack("<HH", header[26:30])
    return info.header_offset + _LOCAL_HEADER + int(name) + int(extra)


# ---- moments -------------------------------------------------------------------------------------


def has_moments(path: Path) -> bool:
    """Whether an .npz file has moments of features; False of any other file."""
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "mu.npy" in archive.namelist()


def has_images(path: Path) -> bool:
    """Whether an .npz file has a batch of images; False of any other file."""
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return f"{IMAGES}.npy" in archive.namelist()


def read_moments(path: Path) -> tuple[dict[str, Moments], dict[str, Any]]:
    """Moments by stream (`features`; `spatial` where it is there), and what the file says of them.

    The latter is empty for files of other programs, which do not say how theirs were made.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, has no moments, or ones that cannot be.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files) & {
                COUNT,
                ABOUT,
                *(key for pair in KEYS.values() for key in pair),
            }
            arrays = {name: file[name] for name in sorted(names)}
        return _moments(arrays), _about(arrays)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except _BROKEN as error:
        raise _refusal(path, error) from None


def write_moments(path: Path, moments: Mapping[str, Moments], about: Mapping[str, Any]) -> None:
    """Keeps a reference: its moments by stream, and `about`, JSON-ready, how they were made.

    ADM's evaluator, pytorch-fid and clean-fid read the file too. Of streams other than KEYS' there
    is no place in it.
    """
    arrays: dict[str, np.ndarray] = {ABOUT: np.asarray(json.dumps(about, sort_keys=True))}
    for stream, (mean, covariance) in KEYS.items():
        if stream in moments:
            arrays[mean] = np.asarray(moments[stream].mean_D, np.float64)
            arrays[covariance] = np.asarray(moments[stream].covariance_DD, np.float64)
    count = moments["features"].count
    if count is not None:
        arrays[COUNT] = np.asarray(count, np.int64)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _moments(arrays: Mapping[str, np.ndarray]) -> dict[str, Moments]:
    if "mu" not in arrays:
        raise ValueError("it has no mu and sigma")
    count = int(arrays[COUNT]) if COUNT in arrays else None
    found = {}
    for stream, (mean, covariance) in KEYS.items():
        if mean not in arrays:
            continue
        if covariance not in arrays:
            raise ValueError(f"it has {mean} but no {covariance}")
        mean_D, covariance_DD = arrays[mean], arrays[covariance]
        if mean_D.ndim != 1 or covariance_DD.shape != (len(mean_D), len(mean_D)):
            raise ValueError(
                f"{mean} {mean_D.shape} and {covariance} {covariance_DD.shape} do not fit together"
            )
        if mean_D.dtype.kind != "f" or covariance_DD.dtype.kind != "f":
            raise ValueError(f"{mean} or {covariance} is not of floating point numbers")
        mean_D, covariance_DD = mean_D.astype(np.float64), covariance_DD.astype(np.float64)
        if not (np.isfinite(mean_D).all() and np.isfinite(covariance_DD).all()):
            raise ValueError(f"{mean} or {covariance} holds NaN or infinity")
        scale = float(np.abs(covariance_DD).max(initial=0.0))
        if np.abs(covariance_DD - covariance_DD.T).max(initial=0.0) > 1e-6 * scale:
            raise ValueError(f"{covariance} is not symmetric, so it is no covariance")
        found[stream] = Moments(mean_D, covariance_DD, count)
    return found


def _about(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    about = json.loads(str(arrays[ABOUT])) if ABOUT in arrays else {}
    if not isinstance(about, dict):
        raise ValueError(f"{ABOUT} is not a JSON object")
    extractor = about.get("extractor", {"name": ""})
    if not isinstance(extractor, dict) or not isinstance(extractor.get("name"), str):
        raise ValueError(f"{ABOUT} has an extractor without a name")
    return about


def _refusal(path: Path, error: Exception) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(f"{path} cannot be read as an .npz file of images or moments: {reason}")
