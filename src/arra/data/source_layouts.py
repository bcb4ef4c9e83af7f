"""Which kind of source a folder or file is, told by its content."""

from collections.abc import Mapping
from pathlib import Path

from arra.data import (
    source_coco,
    source_conversations,
    source_datasets,
    source_deepeyenet,
    source_folders,
    source_mimic,
    source_parquet,
    source_tables,
    source_webdataset,
)
from arra.data.captions import CaptionColumns
from arra.data.source_options import check_options
from arra.data.sources import Source
from arra.files import reached


def open_source_at(
    path: Path,
    located: str,
    split: str | None,
    text: CaptionColumns,
    image_column: str,
    name: str,
    options: Mapping[str, str],
) -> Source:
    """Opens a folder, a file, or (where there is none) a hub id.

    Args:
        path, located: where it is, and that as the user wrote it.
        split, image_column: as in `open_source`.
        text: which columns hold the caption.
        name: the source as named, with its options.
        options: what stood behind `?`.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no such option, split or column, or nothing readable.
    """
    source = None
    if reached(path):
        source = _published(path, split, text, image_column, name, options)
    if source is not None:
        return source
    if reached(path):
        check_options(name, options, {})
    if path.is_dir():
        if source_parquet.holds_parquet(path):
            return source_parquet.open_parquet(path, split, text, image_column, name)
        return source_folders.open_folder(path, split, text, image_column, name)
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            return source_parquet.open_parquet(path, split, text, image_column, name)
        if suffix in source_tables.TABLE_SUFFIXES:
            return source_tables.open_table(path, split, text, image_column, name)
        raise ValueError(
            f"{name} cannot be read as a source: files are .json with conversations, .tar, .tsv, "
            f".parquet, .jsonl or .csv; name the folder of other layouts"
        )
    if located.startswith((".", "/", "~")) or located.count("/") != 1:
        # A name without an owner is a mistyped path more often than an old data set of the hub's.
        raise FileNotFoundError(
            f"source {located} does not exist: check the path (hub ids are OWNER/NAME)"
        )
    return source_datasets.open_hub(located, split, text, image_column, options)


def _published(
    path: Path,
    split: str | None,
    text: CaptionColumns,
    image_column: str,
    name: str,
    options: Mapping[str, str],
) -> Source | None:
    """A source of a published layout; None if the path has none of them."""
    if path.suffix.lower() == ".tar" if path.is_file() else source_webdataset.tar_files(path):
        check_options(name, options, {})
        return source_webdataset.open_webdataset(path, split, text, image_column, name)
    if path.is_dir() and source_coco.caption_files(path):
        return source_coco.open_coco(path, split, text, image_column, name, options)
    if path.is_dir() and source_datasets.holds_dataset(path):
        check_options(name, options, {})
        return source_datasets.open_disk(path, split, text, image_column, name)
    if path.is_dir() and source_mimic.tables(path) is not None:
        return source_mimic.open_mimic(path, split, text.only(name), image_column, name, options)
    if path.is_dir() and source_deepeyenet.description_files(path):
        check_options(name, options, {})
        return source_deepeyenet.open_deepeyenet(path, split, text.only(name), image_column, name)
    if path.is_file() and source_conversations.holds_conversations(path):
        return source_conversations.open_conversations(
            path, split, text.only(name), image_column, name, options
        )
    return None
