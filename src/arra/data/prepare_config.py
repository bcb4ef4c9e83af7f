"""What `arra prepare` may be told.

The field docstrings are the `--help` text.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from arra.data.framing import Framing
from arra.data.selection import Reading
from arra.encoders.text import TEXT_LENGTH
from arra.files import place

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


PLACE = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="PATH|URL",
    instance_from_str=lambda given: place(given[0]),
    is_instance=lambda value: isinstance(value, Path),
    str_from_instance=lambda value: [str(value)],
)


@dataclass(frozen=True)
class PrepareConfig:
    """Turns images and captions into a dataset of image codes and encoder features."""

    source: Annotated[str, tyro.conf.Positional]
    """Folder or file of images and captions, here or in an object store (s3://, ...), recognised by
    content (WebDataset, COCO, MIMIC-CXR, Parquet, tables, class folders, ...: docs/sources.md), hub
    id, or builtin:scenes (builtin:scenes:1-4 for up to four shapes)."""
    image_tokenizer: str
    """Folder, hub id or builtin:scenes: makes the codes."""
    out: Annotated[Path, PLACE]
    """Folder to write, also of an object store (s3://, gs://, ...); the same command again resumes
    or repairs it."""
    encoder: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """[NAME=]FOLDER|HUB_ID|builtin:NAME|MODULE:FUNCTION[@class|projected|mean|both|patch]: makes
    the features; may be given several times. NAME is the feature's name (default: the encoder's);
    pooling: the family's own, class where there is one (docs/encoders.md)."""
    encoder_dtype: Literal["float32", "bfloat16"] = "float32"
    """What encoders compute in; bfloat16 is faster where it is native, and gives other features."""
    grid_dtype: Literal["float16", "int8"] = "float16"
    """How grids of patches (@patch) are stored; int8 takes half, within 1/254 of each vector's
    largest value."""
    text_encoder: str | None = None
    """[NAME=]FOLDER|HUB_ID of a T5: also stores captions as its features, for models that are
    prompted by those; default: none. NAME is the feature's name (default: the encoder's)."""
    text_length: int = TEXT_LENGTH
    """Tokens of a caption that the text encoder sees at most; longer ones are cut."""
    size: int = 256
    """Pixels per side of the square that tokenizer and encoders see; of buckets about that."""
    framing: Literal["crop", "pad", "buckets"] = "crop"
    """crop: the centre square. pad: the whole picture, the rest of the square filled. buckets: the
    centre of a rectangle of about its aspect ratio and size x size pixels, as Lumina-mGPT does;
    for models that paint any grid."""
    pad_colour: str = "white"
    """What --framing pad fills with, a name or #rrggbb; black suits X-rays."""
    bucket_step: int = 0
    """Pixels: sides of --framing buckets are multiples of it; 0 = two codes (Lumina-mGPT's 32)."""
    views: Literal["none", "flip", "ten-crop"] = "none"
    """Further rows of each train picture, of which training draws one each time: mirrored, or
    LlamaGen's ten crops. Captions that say left or right get no mirrored ones."""
    min_side: int = 0
    """Pixels: leaves out pictures with a shorter side than that."""
    max_aspect: float | None = None
    """Leaves out pictures whose longest side is more than so many times the shortest."""
    text_column: str = "text"
    """Column that holds the caption, or several as a,b,c."""
    captions: Literal["first", "random", "join"] = "first"
    """Of several captions of one image (several columns, or a column that holds a list): the first
    that is not empty, one by --seed and the row's id, or all of them."""
    caption_template: str | None = None
    """Wording of captions: {text} is the source's caption, {COLUMN} another column's value, as in
    "{view} view chest x-ray image, {text}". Rows without one of the values are left out."""
    where: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """"COLUMN OP VALUE", OP one of >= <= > < == != in: leaves out rows that do not meet it, such as
    "aesthetic >= 5" or "view in AP,PA"; may be given several times."""
    language: str | None = None
    """Leaves out captions of another language than this ISO 639-1 code, such as en."""
    image_column: str = "image"
    """Column that holds the image or its path."""
    limit: int | None = None
    """Rows to read of each split of the source; default: all."""
    splits: tuple[str, ...] = ()
    """Splits of the source to prepare; default: all that it has."""
    val_fraction: float = 0.02
    """Fraction of train that becomes val where the source has no val; 0 takes none."""
    batch_size: Literal["auto"] | int = "auto"
    """Images per pass through tokenizer and encoders; auto: a GPU is tried once, a CPU takes 4.
    What was chosen is kept in plan.json, for resuming and for other machines."""
    shard_rows: int = 1024
    """Source rows per shard: at most so many are lost when the work is stopped."""
    threads: int = 0
    """CPU threads of tokenizer and encoders; 0 = what torch takes, kept when resuming."""
    workers: Literal["auto"] | int = "auto"
    """Processes that decode images: what crashes or hangs one becomes a reject. 0: threads of this
    process. auto: one per core but one, for fewer than 2,000 images 0. Changes no byte."""
    shard: str | None = None
    """I/N: makes only every N-th shard from the I-th (from 0), for N machines that share --out;
    docs/scale.md shows SLURM arrays and torchrun."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto = cuda where there is one."""
    engine: Literal["local", "ray"] = "local"
    """local: this machine. ray: Ray Data, with the same result (docs/cluster.md; arra[ray])."""
    ray_address: str | None = None
    """Joins a Ray cluster: HOST:PORT or auto; default: $RAY_ADDRESS, else Ray on this machine
    alone, for this command."""
    ray_workers: int = 0
    """Workers of --engine ray; 0 = as many as the cluster has room for."""
    ray_cpus: float = 0
    """CPUs of each worker; 0 = its GPU's share of them, without GPUs --threads."""
    ray_gpus: float = 0
    """GPUs of each worker; 0 = one where the device is cuda. 0.5 lets two workers share one."""
    seed: int = 0
    """Seed of the choice of val rows, and of builtin:scenes."""

    def __post_init__(self) -> None:
        for name in ("size", "batch_size", "shard_rows", "text_length"):
            value = getattr(self, name)
            if value != "auto" and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        not_negative = ("threads", "workers", "seed", "bucket_step", "min_side")
        for name in (*not_negative, "ray_workers", "ray_cpus", "ray_gpus"):
            value = getattr(self, name)
            if value != "auto" and value < 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative")
        shard_of(self.shard)
        if self.engine != "ray" and (self.ray_address or self.ray_workers):
            raise ValueError("--ray-address and --ray-workers need --engine ray")
        if self.max_aspect is not None and self.max_aspect < 1:
            raise ValueError("--max-aspect must be at least 1, which lets squares through")
        if self.limit is not None and self.limit < 1:
            raise ValueError("--limit must be at least 1")
        if not 0 <= self.val_fraction < 1:
            raise ValueError("--val-fraction must be at least 0 and less than 1")
        named_encoders(self.encoder)
        if self.text_encoder is not None:
            split_name("--text-encoder", self.text_encoder)

    @property
    def resolved(self) -> set[str]:
        """Entries of the plan that are not asked for here, but chosen when a dataset is begun."""
        chosen = {"batch_size": self.batch_size == "auto", "threads": self.threads == 0}
        return {name for name, free in chosen.items() if free}

    @property
    def reading(self) -> Reading:
        """How the source is read."""
        return Reading(
            text_column=self.text_column,
            image_column=self.image_column,
            limit=self.limit,
            seed=self.seed,
            captions=self.captions,
            caption_template=self.caption_template,
            where=self.where,
            language=self.language,
        )

    def framing_for(self, factor: int) -> Framing:
        """How pictures are framed for an image tokenizer that makes one code of `factor` pixels.

        Raises:
            ValueError: sizes that it cannot take, or a framing that cannot be.
        """
        step = self.bucket_step or 2 * factor
        for flag, pixels in (("--size", self.size), ("--bucket-step", step)):
            if pixels % factor:
                raise ValueError(
                    f"{flag} {pixels} does not fit image tokenizer {self.image_tokenizer}, which "
                    f"makes one code of {factor} pixels: choose a multiple"
                )
        return Framing(
            self.size,
            self.framing,
            self.pad_colour,
            step,
            self.views,
            self.min_side,
            self.max_aspect,
        )


def named_encoders(specs: tuple[str, ...]) -> dict[str | None, list[str]]:
    """Feature name -> encoder spec (in a list: unnamed ones share the key None).

    Raises:
        ValueError: a name twice, or one that cannot be a column name.
    """
    named: dict[str | None, list[str]] = {}
    for spec in specs:
        name, rest = split_name("--encoder", spec)
        if name is not None and name in named:
            raise ValueError(f"--encoder: the name {name!r} is given twice")
        named.setdefault(name, []).append(rest)
    return named


def shard_of(text: str | None) -> tuple[int, int]:
    """The machine's number and the number of machines that `--shard` says.

    Raises:
        ValueError: not of the form I/N with 0 <= I < N.
    """
    if text is None:
        return 0, 1
    matched = re.fullmatch(r"(\d+)/(\d+)", text)
    if matched is None:
        raise ValueError(f"--shard {text}: write I/N, such as 0/8 for the first of eight machines")
    number, machines = int(matched[1]), int(matched[2])
    if number >= machines:
        raise ValueError(
            f"--shard {text}: machines are counted from 0, so the last of {machines} is "
            f"{machines - 1}/{machines} (SLURM: --array=0-{max(0, machines - 1)})"
        )
    return number, machines


def split_name(flag: str, spec: str) -> tuple[str | None, str]:
    """`NAME=ENCODER` in two; NAME is None where none is given."""
    name, equals, rest = spec.partition("=")
    if not equals or "/" in name:  # an = within a path belongs to the path
        return None, spec
    if not _NAME.fullmatch(name) or not rest:
        raise ValueError(f"{flag} {spec}: write NAME=ENCODER, NAME of letters, digits, _.-")
    return name, rest
