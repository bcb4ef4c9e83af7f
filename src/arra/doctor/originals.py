"""The pictures that rows were made of, read once more from the source that the manifest names."""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from arra.data.images import BadImage, load_rgb
from arra.data.manifest import Manifest, ShardInfo
from arra.data.originals import source_parts
from arra.data.sources import Record
from arra.doctor.scan import SplitScan, values_of

Row = tuple[str, int]
"""Split, and row within it."""


class SourcePictures:
    """The source of a dataset, opened as its plan says.

    Args:
        folder, manifest, plan: the dataset.
        source: where the source is now, if not where the manifest says.

    Raises:
        ValueError: the source is gone, or its content is another.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, plan: Mapping[str, Any], source: str | None
    ) -> None:
        self.folder, self._each = folder, int(plan["options"]["shard_rows"])
        self._parts = source_parts(manifest, plan, source)

    def read(self, scans: Mapping[str, SplitScan], rows: Iterable[Row]) -> dict[Row, Image.Image]:
        """The pictures of rows as they are in the source, upright RGB; those not found are absent.

        A shard's source rows are read until the last one that is wanted.

        Raises:
            OSError, ValueError: the source cannot be read any more.
        """
        found: dict[Row, Image.Image] = {}
        wanted: dict[tuple[str, str], dict[str, Row]] = {}
        for split, row in rows:
            shards = scans[split].shards
            shard = shards[_shard_of(shards, row)]
            id_ = values_of(self.folder, shards, "id", [row])[row]
            wanted.setdefault((split, shard.file), {})[id_] = (split, row)
        for (split, file), ids in wanted.items():
            start = _number(file) * self._each
            part = self._parts[split]
            for record in part.read(start, min(start + self._each, len(part))):
                if isinstance(record, Record) and record.id in ids:
                    place = ids.pop(record.id)
                    with contextlib.suppress(BadImage):  # told as a row without an original
                        found[place] = load_rgb(record.image)
                if not ids:
                    break
        return found


def _shard_of(shards: list[ShardInfo], row: int) -> int:
    ends = np.cumsum([shard.rows for shard in shards])
    return int(np.searchsorted(ends, row, side="right"))


def _number(file: str) -> int:
    """5 of train-00005.parquet: which rows of the source a shard was made of."""
    return int(Path(file).stem.rpartition("-")[2])
