"""The pictures that a prepared dataset was made of, read once more from its source."""

import json
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from arra.data.framing import framing_of
from arra.data.images import BadImage, load_rgb
from arra.data.manifest import Manifest
from arra.data.plan import read_plan, split_off
from arra.data.selection import reading_of
from arra.data.shards import Dataset
from arra.data.sources import FIRST_SPLIT, Record, Rows, Source
from arra.files import sha256_of

_THREADS = 8


def source_parts(
    manifest: Manifest, plan: Mapping[str, Any], name: str | None = None
) -> dict[str, Source]:
    """The dataset's splits of its source, as `arra prepare` opened them.

    Args:
        manifest, plan: of the dataset.
        name: where the source is now, if not where the manifest says.

    Raises:
        ValueError: the source is gone, or its content is another.
    """
    options, spec = plan["options"], name or str(manifest.source["name"])
    reading = reading_of(manifest.source)
    try:
        names = options["splits"] or reading.open(spec, FIRST_SPLIT).splits
        opened = [reading.open(spec, name) for name in names]
    except (ValueError, OSError) as error:
        raise ValueError(f"the source {spec} cannot be opened: {error}") from None
    sources = {source.split: source for source in opened}
    parts = split_off(sources, options["val_fraction"], options["seed"])
    for split, fingerprint in manifest.source["fingerprints"].items():
        if split not in parts or parts[split].fingerprint != fingerprint:
            raise ValueError(f"the content of {spec} ({split}) is another now")
    return parts


class Originals:
    """The pictures of one split's rows, framed as they were when the dataset was prepared.

    Args:
        dataset: the split.

    Raises:
        ValueError: the source is gone or has changed, or the dataset's plan or rejects are missing.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        folder, manifest = dataset.folder, dataset.manifest
        plan = read_plan(folder)
        if plan is None:
            raise ValueError(f"{folder} has no plan.json, which says how its source was read")
        self._part = source_parts(manifest, plan)[dataset.split]
        self._framing = framing_of(manifest.size, manifest.framing)
        self._places = self._found(_rejected(folder, manifest, self._part.split))
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="originals")
        self._last: tuple[tuple[int, ...], list[Image.Image]] = ((), [])

    def frames(self, rows: Sequence[int]) -> list[Image.Image]:
        """What the image tokenizer saw of each row; the last answer is kept.

        Raises:
            ValueError: a picture can no longer be read, or is another row's.
        """
        if tuple(rows) != self._last[0]:
            records = [self._record(row) for row in rows]
            with warnings.catch_warnings():
                # Pillow warns of large photographs long before they are too large.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                frames = list(self._pool.map(self._frame, rows, records))
            self._last = (tuple(rows), frames)
        return self._last[1]

    def _found(self, rejected: set[int]) -> np.ndarray:
        """(N) for each row of the dataset, where in the source's part its picture is."""
        dataset, part = self._dataset, self._part
        numbers = part.rows if isinstance(part, Rows) else range(len(part))
        kept = [place for place, number in enumerate(numbers) if number not in rejected]
        own = [id_ for id_, of in zip(dataset.ids, dataset.view_of, strict=True) if of is None]
        if len(own) != len(kept):
            raise ValueError(
                f"{dataset.folder} ({dataset.split}) has {len(own)} pictures, its source has "
                f"{len(kept)} that were not rejected: prepare the data again"
            )
        places = dict(zip(own, kept, strict=True))
        return np.array(
            [places[of or id_] for id_, of in zip(dataset.ids, dataset.view_of, strict=True)]
        )

    def _record(self, row: int) -> Record:
        dataset, place = self._dataset, int(self._places[row])
        wanted = dataset.view_of[row] or dataset.ids[row]
        record = next(iter(self._part.read(place, place + 1)))
        if not isinstance(record, Record):
            raise self._gone(row, record.reason)
        if record.id != wanted:
            raise self._gone(row, f"there is {record.id!r} in its place")
        return record

    def _frame(self, row: int, record: Record) -> Image.Image:
        whole = self._dataset.view_of[row]
        try:
            image = load_rgb(record.image)
            if whole is None:
                return self._framing.frame(image)
            # An empty caption: which views a picture has was settled when it was prepared.
            return self._framing.views_of(image, "")[self._dataset.ids[row][len(whole) + 1 :]]
        except BadImage as error:
            raise self._gone(row, error.reason) from None

    def _gone(self, row: int, reason: str) -> ValueError:
        return ValueError(
            f"the picture of {self._dataset.ids[row]!r} in {self._part.name} is no longer what it "
            f"was ({reason}): restore the source, or align to features that `arra prepare` stores"
        )


def _rejected(folder: Path, manifest: Manifest, split: str) -> set[int]:
    """Row numbers of a source's split that became no row of the dataset."""
    path = folder / "rejects.jsonl"
    if not path.is_file() or sha256_of(path) != manifest.rejects_sha256:
        raise ValueError(f"{path} is missing or damaged: run the same `arra prepare` command again")
    rejects = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {reject["row"] for reject in rejects if reject["split"] == split}
