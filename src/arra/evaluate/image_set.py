"""A set of images to be measured, with captions where there are any, from whatever holds it.

Every image is decoded once before anything is measured, so that a damaged one is told before hours
of work are lost, and so that the set has a hash. An evaluation over fewer images than were given
would be a different evaluation: bad ones are named, counted and refused, never passed over.

A picture's *key* is the head of a SHA-256 over its size and pixels. Whatever is chosen at random
later (rows that are kept, subsets, groups) is chosen by keys, so that no measure depends on the
order of the images, on the container they came in, or on how many were read at a time.

Legend: N images.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from arra.data.images import BadImage, load_rgb
from arra.data.progress import Meter
from arra.data.sources import Scalar

READ_AT_ONCE = 256
AHEAD = 4  # decoded images that wait, per worker
SHOWN = 5  # how many bad images an error spells out, and how many sizes a report does
NO_EXTRA: Mapping[str, Scalar] = {}


@dataclass(frozen=True)
class Picture:
    """One image of a set.

    Attributes:
        index: its number in the set.
        image: RGB, at its own size.
        run: whom it is put with seed by seed, see ImageSet.
        key: see above, a 64-bit number.
        extra: the source's other columns, such as labels.
    """

    index: int
    name: str
    image: Image.Image
    caption: str | None
    run: int | None
    key: int
    extra: Mapping[str, Scalar] = field(default_factory=dict)


class ImageSet(Protocol):
    """Pictures that can be gone through as often as is needed.

    Attributes:
        source: as the user named it.
        names: of the images, by index.
        captions: by index; None where the set has no texts.
        seeds: by index; None where they are not known.
        runs: the same, but that of a prompt that was painted several times pictures number j go
            together, by the seed of the first (`--by-seed`).
    """

    source: str
    names: Sequence[str]
    captions: Sequence[str] | None
    seeds: Sequence[int] | None
    runs: Sequence[int] | None

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Picture]:
        """All pictures, in any order."""
        ...

    def at(self, indices: Sequence[int]) -> list[Picture]:
        """The pictures with these numbers, as often as they are asked for."""
        ...

    def described(self) -> dict[str, Any]:
        """What a report says of the set: source, n, hashes, sizes, how it was painted."""
        ...


@dataclass(frozen=True)
class Entry:
    """A row of what holds a set, before it is decoded; `reason` where it cannot be used."""

    name: str
    image: bytes | Path | Image.Image | None
    caption: str | None = None
    seed: int | None = None
    extra: Mapping[str, Scalar] = field(default_factory=dict)
    reason: str | None = None


class Entries(Protocol):
    """Rows in a fixed order (entries.py has one class per container)."""

    split: str | None
    painted: Mapping[str, Any] | None

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[Entry]: ...


def key_of(digest: bytes) -> int:
    """A picture's key, from its digest."""
    return int.from_bytes(digest[:8], "little")


def digest_of(image: Image.Image) -> bytes:
    """SHA-256 over an RGB image's size and pixels: the same whatever file it was in."""
    return hashlib.sha256(f"{image.width}x{image.height}".encode() + image.tobytes()).digest()


def hash_of(digests: Sequence[bytes], texts: Sequence[str] | None = None) -> str:
    """SHA-256 of a set, over its pictures' digests, sorted; with their texts where given."""
    total = hashlib.sha256()
    rows = digests if texts is None else list(map(_with_text, digests, texts))
    for row in sorted(rows):
        total.update(row)
    return total.hexdigest()


def hash_of_texts(texts: Sequence[str]) -> str:
    """SHA-256 of a set's texts, sorted."""
    return hash_of([b""] * len(texts), texts)


def _with_text(digest: bytes, text: str) -> bytes:
    return digest + hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class StoredSet:
    """Images that lie in files.

    Args:
        source: as the user named it.
        entries: the rows.
        workers: threads that decode.

    Raises:
        ValueError: naming the images that cannot be used, or that there are none.
    """

    def __init__(self, source: str, entries: Entries, workers: int = 2) -> None:
        self.source, self._entries, self._workers = source, entries, max(1, workers)
        names: list[str] = []
        captions: list[str | None] = []
        seeds: list[int | None] = []
        self._extra: list[Mapping[str, Scalar]] = []
        self._digests: list[bytes] = []
        self._sizes: dict[tuple[int, int], int] = {}
        bad: list[str] = []
        with Meter(f"read {source}", len(entries)) as meter:
            for entry, image in self._decoded(range(len(entries))):
                meter.add(1)
                if isinstance(image, str):
                    bad.append(f"{_spelled(entry.name)} ({_spelled(image)})")
                    continue
                names.append(_spelled(entry.name))
                captions.append(entry.caption)
                seeds.append(entry.seed)
                self._extra.append(entry.extra or NO_EXTRA)
                self._digests.append(digest_of(image))
                self._sizes[image.size] = self._sizes.get(image.size, 0) + 1
        refuse_bad(source, bad, len(names))
        self.names: Sequence[str] = names
        texts = [caption for caption in captions if caption is not None]
        self.captions: Sequence[str] | None = texts if len(texts) == len(names) else None
        known = [seed for seed in seeds if seed is not None]
        self.seeds: Sequence[int] | None = known if len(known) == len(names) else None
        self.runs: Sequence[int] | None = self.seeds

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Picture]:
        for index, (entry, image) in enumerate(self._decoded(range(len(self)))):
            yield self._picture(index, entry, image)

    def at(self, indices: Sequence[int]) -> list[Picture]:
        """The pictures with these numbers."""
        decoded = self._decoded(indices)
        return [self._picture(index, *found) for index, found in zip(indices, decoded, strict=True)]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The distinct (width, height), sorted."""
        return sorted(self._sizes)

    @property
    def extras(self) -> Sequence[Mapping[str, Scalar]]:
        """The source's other columns, by index."""
        return self._extra

    def described(self) -> dict[str, Any]:
        """See ImageSet."""
        described: dict[str, Any] = {
            "source": self.source,
            "split": self._entries.split,
            "n": len(self),
            "sha256": hash_of(self._digests),
            "distinct": len(set(self._digests)),
            "sizes": [list(size) for size in self.sizes[:SHOWN]],
        }
        if self.captions is not None:
            described["captions_sha256"] = hash_of(self._digests, self.captions)
            described["prompts_sha256"] = hash_of_texts(self.captions)
        if self._entries.painted is not None:
            described["painted"] = dict(self._entries.painted)
        return described

    def _picture(self, index: int, entry: Entry, image: Image.Image | str) -> Picture:
        digest = self._digests[index]
        name = self.names[index]
        if isinstance(image, str) or digest_of(image) != digest:
            raise ValueError(
                f"{self.source}: {name} changed while it was measured: start again when nothing "
                f"writes there"
            )
        caption = None if self.captions is None else self.captions[index]
        extra = self._extra[index]
        return Picture(index, name, image, caption, entry.seed, key_of(digest), extra)

    def _decoded(self, indices: Sequence[int]) -> Iterator[tuple[Entry, Image.Image | str]]:
        """Each row with its image, or with the reason why it has none."""
        with ThreadPoolExecutor(self._workers, thread_name_prefix="decode") as pool:
            for start in range(0, len(indices), READ_AT_ONCE):
                # Decoded photographs are large: few of them are ahead of who looks at them.
                ahead: deque[tuple[Entry, Future[Image.Image | str]]] = deque()
                for entry in list(self._rows(indices[start : start + READ_AT_ONCE])):
                    ahead.append((entry, pool.submit(_decode, entry)))
                    if len(ahead) > AHEAD * self._workers:
                        first, decoded = ahead.popleft()
                        yield first, decoded.result()
                yield from ((entry, decoded.result()) for entry, decoded in ahead)

    def _rows(self, indices: Sequence[int]) -> Iterator[Entry]:
        if isinstance(indices, range):
            yield from self._entries.read(indices.start, indices.stop)
            return
        for index in indices:
            yield from self._entries.read(index, index + 1)


def refuse_bad(source: str, bad: Sequence[str], good: int) -> None:
    """Raises ValueError where an image of the set is bad, or where there is no image at all."""
    if bad:
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise ValueError(
            f"{len(bad)} of {good + len(bad)} images of {source} cannot be read: "
            f"{'; '.join(bad[:SHOWN])}{more}. Repair or remove them: a smaller set would be a "
            f"different measurement."
        )
    if good == 0:
        raise ValueError(f"{source} holds no images: give a folder or Parquet file that does.")


def _spelled(name: str) -> str:
    """A name as it can be written into a report: file names need not be UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _decode(entry: Entry) -> Image.Image | str:
    if entry.image is None:
        return entry.reason or "there is no image"
    try:
        return load_rgb(entry.image)
    except (BadImage, OSError) as error:
        return str(error)
