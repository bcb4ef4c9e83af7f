"""Sources through the package `datasets`: the Hugging Face hub, and folders of `save_to_disk`.

A data set of the hub is fetched as a whole, or streamed: then nothing but the row groups of Parquet
files that a range of rows needs. Other formats are streamed from the copy in Parquet that the hub
makes of most data sets (its branch refs/convert/parquet).
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from arra.data.captions import CaptionColumns
from arra.data.source_options import check_options
from arra.data.source_parquet import ParquetSource, TableSource, values_of_column
from arra.data.sources import SPLIT_NAMES, Record, Reject, Source, digest, pick_split
from arra.files import place

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_OPTIONS: dict[str, tuple[str, ...]] = {"streaming": ("yes",), "config": ()}
CONVERTED = "refs/convert/parquet"


def holds_dataset(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of a Dataset or a DatasetDict."""
    single = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return single or (folder / "dataset_dict.json").is_file()


def open_disk(
    folder: Path, split: str | None, text: CaptionColumns, image_column: str, name: str
) -> "DatasetSource":
    """A folder of `save_to_disk`; its splits are the DatasetDict's, else the Dataset's, else train.

    Raises:
        ValueError: `datasets` is not installed, or the folder is damaged.
    """
    datasets = _datasets(name)
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is damaged ({_first_line(error)}): fetch it again") from None
    if isinstance(loaded, datasets.Dataset):
        loaded = {str(loaded.split or "train"): loaded}
    by_split = {SPLIT_NAMES.get(key, key): value for key, value in loaded.items()}
    chosen = pick_split(name, tuple(by_split), split)
    sizes = [(path.name, path.stat().st_size) for path in sorted(folder.rglob("*.arrow"))]
    dataset = by_split[chosen]
    return DatasetSource(name, chosen, tuple(by_split), dataset, text, image_column, sizes)


def open_hub(
    name: str,
    split: str | None,
    text: CaptionColumns,
    image_column: str,
    options: Mapping[str, str],
) -> Source:
    """A data set of the hub.

    Args:
        name: OWNER/NAME.
        split, text, image_column: as in `open_source_at`.
        options: `config=NAME` where a data set has several; `streaming=yes` fetches only the rows
            that are read, each time they are.

    Raises:
        FileNotFoundError: the name is no hub id.
        ValueError: packages are missing, or the hub or the data set cannot be reached.
    """
    if not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"source {name!r} is neither an existing path nor a hub id")
    check_options(name, options, _OPTIONS)
    datasets = _datasets(name)
    named = (name, options["config"]) if "config" in options else (name,)
    if "streaming" in options:
        builder = _from_hub(name, lambda: datasets.load_dataset_builder(*named))
        return open_streamed(name, builder, split, text, image_column)
    loaded = _from_hub(name, lambda: datasets.load_dataset(*named))
    by_split = {SPLIT_NAMES.get(key, key): value for key, value in loaded.items()}
    chosen = pick_split(name, tuple(by_split), split)
    return DatasetSource(name, chosen, tuple(by_split), by_split[chosen], text, image_column, [])


def open_streamed(
    name: str, builder: Any, split: str | None, text: CaptionColumns, image_column: str
) -> ParquetSource:
    """The Parquet files of a data set, wherever they are, without fetching them.

    Args:
        name: as named.
        builder: the data set's `datasets.DatasetBuilder`; of it only names are used.
        split, text, image_column: as in `open_source_at`.

    Raises:
        ValueError: universal_pathlib is not installed, or there is nothing in Parquet.
    """
    if builder.name == "parquet":
        files = builder.config.data_files
    else:
        copy = place(f"hf://datasets/{name}@{CONVERTED}")
        files = _from_hub(name, lambda: _converted(copy, builder.config.name))
    by_split = {
        SPLIT_NAMES.get(str(key), str(key)): [place(str(each)) for each in each_split]
        for key, each_split in files.items()
    }
    if not by_split:
        raise ValueError(
            f"{name} has no Parquet files on the hub, so it cannot be streamed: leave out "
            f"streaming=yes to fetch it"
        )
    chosen = pick_split(name, tuple(by_split), split)
    return ParquetSource(name, chosen, tuple(by_split), by_split[chosen], text, image_column)


def _converted(root: Path, config: str) -> dict[str, list[Path]]:
    """Split -> files of the hub's own copy: CONFIG/SPLIT/0000.parquet."""
    found: dict[str, list[Path]] = {}
    for path in sorted(root.glob(f"{config}/*/*.parquet"), key=str):
        split = path.parent.name
        if split.startswith("partial-"):
            raise ValueError(f"the hub's copy in Parquet holds only the beginning ({split})")
        found.setdefault(split, []).append(path)
    return found


class DatasetSource(TableSource):
    """A `datasets.Dataset`: its images stay encoded, its rows stay in Arrow."""

    def __init__(
        self,
        name: str,
        split: str,
        splits: tuple[str, ...],
        dataset: Any,
        text: CaptionColumns,
        image_column: str,
        sizes: list[tuple[str, int]],
    ) -> None:
        self._dataset = dataset.with_format("arrow")
        schema = dataset.features.arrow_schema
        super().__init__(name, split, splits, schema, text, image_column, None)
        if len(dataset) == 0:
            raise ValueError(f"{name}: split {split} has no rows")
        if "id" in schema.names:
            self._find_duplicates(self._column("id"))
        content = getattr(dataset, "_fingerprint", None)
        # A folder may be moved, so its content is what it is known by.
        known_by = ("hub", name) if not sizes else ("disk", sizes)
        self.fingerprint = digest(*known_by, split, content, text.identity, image_column)

    def __len__(self) -> int:
        return len(self._dataset)

    def _column(self, name: str) -> Iterator[Any]:
        return iter(values_of_column(self._dataset.select_columns(name)[:][name]))

    def read(self, start: int, stop: int) -> Iterator[Record | Reject]:
        """Yields rows start..stop-1."""
        yield from self._rows(self._dataset[start : min(stop, len(self))], start)


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError(
            f"source {name!r} is no files that are read directly; to read it from the hub or as "
            f"written by the package datasets, install 'arra[data]'"
        ) from None
    return datasets


def _from_hub(name: str, ask: Any) -> Any:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return ask()
    except (
        FileNotFoundError,
        ConnectionError,
        TimeoutError,
        OfflineModeIsEnabled,
        HfHubHTTPError,
        ValueError,
    ) as error:
        raise ValueError(
            f"source {name!r} is no existing path and cannot be had from the hub "
            f"({_first_line(error)}). Offline, download its Parquet files elsewhere and pass their "
            f"folder"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
