"""manifest.json: what a prepared dataset says about itself.

Legend: D feature width, K codebook size.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arra.files import place, read_json, read_sealed, write_sealed

FORMAT_VERSION = 1
FILE = "manifest.json"
AGAIN = "run the same `arra prepare` command again, it makes only what is damaged anew"


@dataclass(frozen=True)
class ShardInfo:
    """One Parquet file of a split; `views` of its rows are further views of the others."""

    file: str
    rows: int
    sha256: str
    views: int = 0


@dataclass(frozen=True)
class SplitInfo:
    """The shards of one split, in order; `rows` is their sum."""

    rows: int
    shards: list[ShardInfo]

    @property
    def views(self) -> int:
        """How many of the rows are further views of others."""
        return sum(shard.views for shard in self.shards)


@dataclass(frozen=True)
class TokenizerInfo:
    """The image tokenizer that made the codes: K codes, `factor` pixels per code and side."""

    spec: str
    fingerprint: str
    codebook_size: int
    factor: int


@dataclass(frozen=True)
class FeatureInfo:
    """One encoder's features, with statistics over the train split (float64 sums of the stored
    float16 values).

    Attributes:
        dim: D.
        encoder: the encoder's fingerprint.
        spec: what was asked for, without the pooling.
        pooling: class, projected, mean or both.
        mean: (D) mean of the raw features.
        unit_mean: (D) mean of the raw features scaled to length 1.
        centred_unit_mean: (D) mean of (feature - mean) scaled to length 1.
        dtype: what the encoder computed in.
    """

    dim: int
    encoder: str
    spec: str
    pooling: str
    mean: list[float]
    unit_mean: list[float]
    centred_unit_mean: list[float]
    dtype: str = "float32"


@dataclass(frozen=True)
class GridInfo(FeatureInfo):
    """One encoder's grids of patch features (grid_column.py), with statistics over the cells as
    training sees them, of images spread evenly over the train split.

    Attributes:
        grid: the encoder's own rows and columns.
        stored: float16 or int8.
    """

    grid: list[int] = field(default_factory=list)
    stored: str = "float16"


@dataclass(frozen=True)
class TextFeatureInfo:
    """The captions as one text encoder's features.

    Attributes:
        dim: D.
        encoder: the encoder's fingerprint.
        spec: what was asked for.
        length: the most tokens of a caption.
    """

    dim: int
    encoder: str
    spec: str
    length: int


@dataclass(frozen=True)
class Manifest:
    """A prepared dataset.

    Attributes:
        splits: name -> shards. Splits without a usable row are left out.
        tokenizer: what made the codes.
        features: name -> encoder and statistics; the column is `feature.<name>`.
        size: pixels per side that tokenizer and encoders saw; of buckets about that.
        crop: how pictures were framed, in words.
        framing: the same for `framing.framing_of`.
        columns: extra columns of the source, name -> string, int64, double or bool.
        class_names: names of the integers in the column `label`, where the source says them.
        source: the source's name, columns and fingerprint per split.
        rejects: how many rows were left out; rejects.jsonl lists them.
        rejects_sha256: of rejects.jsonl.
        text_features: name -> text encoder; the column is `text_feature.<name>`.
        grids: name -> encoder and statistics of its patches; the column is `grid.<name>`. No name
            is in `features` as well.
    """

    splits: dict[str, SplitInfo]
    tokenizer: TokenizerInfo
    features: dict[str, FeatureInfo]
    size: int
    crop: str
    columns: dict[str, str] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)
    rejects: int = 0
    rejects_sha256: str = ""
    text_features: dict[str, TextFeatureInfo] = field(default_factory=dict)
    framing: dict[str, Any] = field(default_factory=dict)
    grids: dict[str, GridInfo] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def aligned(self) -> dict[str, FeatureInfo]:
        """Everything that may be aligned to: features and grids."""
        return {**self.features, **self.grids}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json with the SHA-256 of its own content. Written last: it says "done"."""
    write_sealed(folder / FILE, dataclasses.asdict(manifest))


def read_manifest(folder: Path | str) -> Manifest:
    """Reads and verifies manifest.json.

    Raises:
        FileNotFoundError: the folder is no prepared dataset, or preparing it was not finished.
        ValueError: damaged, or written by another version of the format.
    """
    path = place(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: {folder} is no prepared dataset, or `arra prepare` did not "
            f"finish there (the same command again resumes it)"
        )
    content = read_json(path)
    if not isinstance(content, dict) or "format_version" not in content:
        raise ValueError(f"{path} is not the manifest of a prepared dataset")
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {content['format_version']}, this version of arra reads "
            f"{FORMAT_VERSION}: prepare the data again"
        )
    try:
        content = read_sealed(path)
    except ValueError as error:
        raise ValueError(f"{error}: {AGAIN}") from None
    content["splits"] = {
        name: SplitInfo(split["rows"], [ShardInfo(**shard) for shard in split["shards"]])
        for name, split in content["splits"].items()
    }
    content["tokenizer"] = TokenizerInfo(**content["tokenizer"])
    content["features"] = {k: FeatureInfo(**info) for k, info in content["features"].items()}
    content["text_features"] = {
        k: TextFeatureInfo(**info) for k, info in content.get("text_features", {}).items()
    }
    content["grids"] = {k: GridInfo(**info) for k, info in content.get("grids", {}).items()}
    return Manifest(**content)
