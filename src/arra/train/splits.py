"""The data of a run: in memory, or streamed."""

from collections.abc import Sequence
from pathlib import Path

from arra.config import TrainConfig
from arra.data.cache import ShardCache
from arra.data.manifest import read_manifest
from arra.data.shards import Dataset, open_dataset
from arra.data.split import Split
from arra.data.stream import Stream, open_beginning

CACHE = "cache"
"""In the run: shards that were fetched from an object store, unless --data.cache says where."""


def open_splits(config: TrainConfig, features: Sequence[str]) -> tuple[Split, Dataset | None]:
    """The training split, and the validation split if there is one.

    Of a streamed dataset as much of the latter is read as is looked at (--log.validate-images and
    --log.samples).

    Raises:
        FileNotFoundError, OSError, ValueError: as `open_dataset` and `Stream`.
    """
    folder, data = config.data_folder, config.data
    held_out = "val" in read_manifest(folder).splits
    if not data.stream:
        val = open_dataset(folder, "val", features=features) if held_out else None
        return open_dataset(folder, "train", features=features), val
    where = Path(data.cache).expanduser() if data.cache else Path(config.out) / CACHE
    cache = ShardCache(where, int(data.cache_gb * 1e9))
    looked_at = max(config.log.validate_images, config.log.samples, 1)
    val = open_beginning(folder, "val", features, cache, looked_at) if held_out else None
    stream = Stream(folder, "train", features, window=data.stream, lanes=data.lanes, cache=cache)
    return stream, val
