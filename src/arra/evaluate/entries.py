"""What a set of images may be read from: one class per container, told by its content.

Other systems' pictures are measured by the same command as ours, so captions are never required:
a tar or a Parquet file of nothing but images will do. Where there are captions, the sources of
`arra prepare` read them.
"""

import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from arra.data.parquet_files import parquet_file
from arra.data.source_folders import IMAGE_SUFFIXES
from arra.data.source_tables import bad_path
from arra.data.source_webdataset import tar_files
from arra.data.sources import SPLIT_NAMES, Reject, Source, is_utf8, open_source, split_of
from arra.evaluate.image_set import Entries, Entry
from arra.files import read_json
from arra.generate.pictures import LISTING, SETTINGS

DESCRIBED = ("metadata.jsonl", "metadata.csv", "manifest.json", "*.parquet", "*.tar")
TEXT_SUFFIXES = (".txt", ".json")
ODD_SUFFIXES = (".jfif", ".jpe", ".heic", ".heif", ".jxl", ".j2k", ".tga")
"""Images too, by their names: whether they can be read is seen when they are."""
BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*")
"""How JPEG, PNG, GIF and TIFF files begin, whatever they are called."""
A_LINK = "a link, which is not followed: put the images themselves there"


def open_entries(
    spec: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    text_column: str = "text",
    image_column: str = "image",
) -> Entries:
    """Opens a folder that `arra generate` wrote, a folder of images, tars, Parquet, a batch of
    images as ADM's evaluator reads it (.npz), or any source of `arra prepare`.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: what is there cannot be read; the message says why.
    """
    path = Path(spec).expanduser()
    if path.suffix == ".npz":
        from arra.evaluate.adm import NpzImages

        return _first(NpzImages(path), limit)
    if (path / LISTING).is_file():
        return _first(PaintedFolder(path), limit)
    if path.is_dir():
        _refuse_unfinished(path)
        _refuse_loose_images(path)
    if split is None and path.is_dir() and _is_plain_folder(path):
        _refuse_several_splits(path, _image_files(path))
        return _first(PlainFolder(path), limit)
    if path.exists():
        tars = [path] if path.suffix == ".tar" else tar_files(path) if path.is_dir() else []
        if tars and split is None and not any(map(_has_text, tars)):
            _refuse_several_splits(path, tars)
            return _first(TarImages(tars), limit)
        tables = _tables(path)
        if tables and split is None and text_column not in _columns(tables[0]):
            _refuse_several_splits(path, tables)
            return _first(ParquetImages(tables, image_column), limit)
    source = open_source(
        spec, split=split, limit=limit, text_column=text_column, image_column=image_column
    )
    return SourceEntries(source)


class SourceEntries:
    """Rows of a source of `arra prepare`, captions included."""

    painted: Mapping[str, Any] | None = None

    def __init__(self, source: Source) -> None:
        self._source = source
        self.split: str | None = source.split

    def __len__(self) -> int:
        return len(self._source)

    def read(self, start: int, stop: int) -> Iterator[Entry]:
        """See Entries."""
        for record in self._source.read(start, stop):
            if isinstance(record, Reject):
                name = record.id or f"row {record.row}"
                yield Entry(name, None, reason=record.reason)
            else:
                seed = record.extra.get("seed")
                seed = seed if isinstance(seed, int) else None
                yield Entry(record.id, record.image, record.text, seed, record.extra)


class _Listed:
    """Entries that are known beforehand."""

    split: str | None = None
    painted: Mapping[str, Any] | None = None
    entries: list[Entry]

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, start: int, stop: int) -> Iterator[Entry]:
        """See Entries."""
        return iter(self.entries[start:stop])


class PlainFolder(_Listed):
    """Image files, in the order of their paths; what seems to be one is an entry too."""

    def __init__(self, folder: Path) -> None:
        self.entries = [
            Entry(
                path.relative_to(folder).as_posix(),
                None if _is_linked_folder(path) else path,
                reason=A_LINK,
            )
            for path in sorted(folder.rglob("*"))
            if _is_linked_folder(path) or _seems_image(path)
        ]


class PaintedFolder(_Listed):
    """A folder that `arra generate` wrote: images.jsonl has one {file, prompt, seed} a line."""

    def __init__(self, folder: Path) -> None:
        listing = folder / LISTING
        self.entries = []
        # Not splitlines: it would also cut at separators that JSON strings may hold.
        try:
            lines = listing.read_bytes().decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{listing} is not UTF-8 (byte {error.start}): convert it") from None
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name, prompt, seed = str(row["file"]), row.get("prompt"), row.get("seed")
            except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
                raise ValueError(
                    f"{listing} line {number} is not a JSON object with a 'file': run `arra "
                    f"generate` again, it repairs its folder."
                ) from None
            caption = None if prompt is None else str(prompt)
            seed = seed if isinstance(seed, int) else None
            wrong = bad_path(name)
            if wrong is None and caption is not None and not is_utf8(caption):
                wrong = "the prompt is not valid UTF-8"
            image = folder / name if wrong is None else None
            self.entries.append(Entry(name, image, caption, seed, reason=wrong))
        settings = folder / SETTINGS
        if settings.is_file():
            self.painted = {k: v for k, v in read_json(settings).items() if k != "prompts"}


class TarImages:
    """The image files of tars without captions, read in place by their offsets.

    Links have no bytes of their own there, so they are entries without an image.
    """

    split: str | None = None
    painted: Mapping[str, Any] | None = None

    def __init__(self, tars: list[Path]) -> None:
        self._members: list[tuple[Path, tarfile.TarInfo]] = []
        for tar in tars:
            with tar.open("rb") as handle:
                for member in _members(tar):
                    handle.seek(member.offset_data)
                    if _is_image(member.name, handle.read(12) if member.isreg() else b""):
                        self._members.append((tar, member))

    def __len__(self) -> int:
        return len(self._members)

    def read(self, start: int, stop: int) -> Iterator[Entry]:
        """See Entries."""
        for tar, member in self._members[start:stop]:
            name = f"{tar.stem}/{member.name}"
            if not member.isreg():
                yield Entry(name, None, reason=A_LINK)
                continue
            with tar.open("rb") as handle:
                handle.seek(member.offset_data)
                yield Entry(name, handle.read(member.size))


class ParquetImages:
    """Images of tables that have no caption column; a cell is bytes, or {bytes, path}."""

    split: str | None = None
    painted: Mapping[str, Any] | None = None

    def __init__(self, tables: list[Path], image_column: str) -> None:
        self._image = image_column
        self._groups: list[tuple[Path, int, int, int]] = []
        first = 0
        for table in tables:
            if image_column not in _columns(table):
                raise ValueError(
                    f"{table} has no column {image_column!r} for the image; its columns are "
                    f"{', '.join(_columns(table))}. Name one with --image-column"
                )
            with parquet_file(table) as file:
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    self._groups.append((table, group, first, first + rows))
                    first += rows
        self._rows = first

    def __len__(self) -> int:
        return self._rows

    def read(self, start: int, stop: int) -> Iterator[Entry]:
        """See Entries."""
        for table, group, first, end in self._groups:
            if end <= start or first >= stop:
                continue
            with parquet_file(table) as file:
                cells = file.read_row_group(group, columns=[self._image]).column(0).to_pylist()
            for row in range(max(first, start), min(end, stop)):
                cell = cells[row - first]
                image = cell.get("bytes") if isinstance(cell, dict) else cell
                if not isinstance(image, bytes):
                    image = None
                yield Entry(f"row {row}", image, reason="there are no bytes of an image")


class _Limited:
    """The first rows of what holds a set."""

    def __init__(self, entries: Entries, rows: int) -> None:
        self._entries, self._rows = entries, rows
        self.split, self.painted = entries.split, entries.painted

    def __len__(self) -> int:
        return min(self._rows, len(self._entries))

    def read(self, start: int, stop: int) -> Iterator[Entry]:
        """See Entries."""
        return self._entries.read(start, min(stop, self._rows))


def _first(entries: Entries, limit: int | None) -> Entries:
    return entries if limit is None else _Limited(entries, limit)


def _is_plain_folder(folder: Path) -> bool:
    """Image files with no captions: nothing that a source would read texts from."""
    if any(next(folder.rglob(pattern), None) for pattern in DESCRIBED):
        return False
    files = _image_files(folder)
    return bool(files) and not files[0].with_suffix(".txt").exists()


def _image_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)


def _is_linked_folder(path: Path) -> bool:
    return path.is_symlink() and path.is_dir()


def _seems_image(path: Path) -> bool:
    if path.suffix.lower() in IMAGE_SUFFIXES or not path.is_file():
        return path.suffix.lower() in IMAGE_SUFFIXES
    with path.open("rb") as handle:
        return _is_image(path.name, handle.read(12))


def _is_image(name: str, head: bytes) -> bool:
    """Whether a file is an image, or was to be one: by its name, such as a.png or a.jpg.part, or by
    how it begins. Texts beside images are none."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    if suffixes and suffixes[-1] in TEXT_SUFFIXES:
        return False
    if any(suffix in (*IMAGE_SUFFIXES, *ODD_SUFFIXES) for suffix in suffixes):
        return True
    return head.startswith(BEGINNINGS) or (head[:4], head[8:]) == (b"RIFF", b"WEBP")


def _refuse_unfinished(folder: Path) -> None:
    """Of what `arra generate` has begun there are fewer pictures than were asked for."""
    settings = folder / SETTINGS
    begun = read_json(settings) if settings.is_file() else None
    if isinstance(begun, dict) and {"prompts", "num", "cfg"} <= begun.keys():
        raise ValueError(
            f"{folder} is not painted to its end (it has no {LISTING}): run `arra generate` again"
        )


def _refuse_loose_images(folder: Path) -> None:
    """Of a folder of tars or tables no image beside them would be read."""
    loose = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES]
    tables = [*folder.glob("*.tar"), *folder.glob("*.parquet")]
    if loose and tables:
        raise ValueError(
            f"{folder} holds {loose[0].name} and {len(loose) - 1} more images beside "
            f"{min(tables).name}: put one of these kinds into a folder of its own"
        )


def _refuse_several_splits(path: Path, files: list[Path]) -> None:
    """Without captions no split can be asked for, and all of them together are seldom meant."""
    found = set()
    for file in files:
        if len(parts := file.relative_to(path).parts) > 1:
            found.add(SPLIT_NAMES.get(parts[0].lower()))
        elif file.suffix in (".tar", ".parquet"):
            found.add(split_of(file.stem))
    if len(found - {None}) > 1:
        raise ValueError(
            f"{path} holds several splits ({', '.join(sorted(filter(None, found)))}): name the "
            f"folder or the file of one"
        )


def _members(tar: Path) -> list[tarfile.TarInfo]:
    """Files of a tar, and links."""
    try:
        with tarfile.open(tar, "r:") as opened:
            members = opened.getmembers()
            return [each for each in members if each.isfile() or each.islnk() or each.issym()]
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{tar} is damaged ({error}): fetch it again") from None


def _has_text(tar: Path) -> bool:
    return any(Path(member.name).suffix.lower() in TEXT_SUFFIXES for member in _members(tar))


def _tables(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix.lower() == ".parquet" else []
    return sorted(path.glob("*.parquet"))


def _columns(table: Path) -> list[str]:
    try:
        with parquet_file(table) as file:
            names: list[str] = file.schema_arrow.names
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{table} is damaged ({error}): fetch it again") from None
    return names
