"""`arra convert`: other people's checkpoint files into our folders, and back into their layouts.

What a file is, is told from the names of its tensors. Tensors are renamed, not computed with: they
keep their types, and come back byte for byte.
"""

import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from arra.files import atomic_dir, read_json
from arra.foreign import Foreign, Weights, read_foreign, write_original
from arra.image_tokenizers.loading import VQGAN, stored
from arra.image_tokenizers.published import (
    CHAMELEON,
    LLAMAGEN,
    Published,
    from_original,
    layout_of,
    to_original,
)
from arra.image_tokenizers.taming_yaml import settings_text
from arra.image_tokenizers.vq import VQConfig
from arra.models import llamagen_convert
from arra.models.llamagen_convert import DOWNSAMPLING
from arra.models.llamagen_model import LlamaGenForImageGeneration

UNUSED = "original_only.safetensors"
"""Tensors of an original file that no picture depends on, kept beside our model.safetensors."""


@dataclass(frozen=True)
class ConvertConfig:
    """Turn a published checkpoint into our folder, or write it in its original layout again."""

    source: Annotated[str, tyro.conf.Positional]
    """A checkpoint file (.pt .pth .ckpt .bin .safetensors), a folder with vqgan.ckpt, or ours."""
    out: str
    """The new folder."""
    to: Literal["arra", "llamagen", "chameleon"] = "arra"
    """arra: our folder, safetensors and config.json. Else the layout of that project's own files:
    tensors and names only, which its scripts load."""
    weights: Weights | None = None
    """Which weights, where a file holds both: the model's (default) or the averaged ones (ema)."""


@dataclass(frozen=True)
class Family:
    """One published layout.

    Attributes:
        title: what messages call it.
        target: its name for `--to`.
        model_type: of the config.json that `bring` writes.
        recognise: (names of tensors, what lay beside them) -> is a file in this layout?
        bring: reads a file and writes our folder; returns remarks, or "".
        give: reads our folder (first) and writes the layout into another (second).
    """

    title: str
    target: str
    model_type: str
    recognise: Callable[[Collection[str], Mapping[str, Any]], bool]
    bring: Callable[[Foreign, Path], str]
    give: Callable[[Path, Path], None]


M = TypeVar("M", bound=PreTrainedModel)


def model_family(
    title: str,
    target: str,
    model_class: type[M],
    *,
    recognise: Callable[[Collection[str]], bool],
    from_original: Callable[[Foreign], M],
    to_original: Callable[[M], dict[str, Tensor]],
    file_name: Callable[[M], str],
) -> Family:
    """A row for a model, whose original layout is a file that holds {"model": tensors}."""
    config_class = model_class.config_class
    assert config_class is not None, f"{model_class.__name__} names no config class"

    def bring(foreign: Foreign, folder: Path) -> str:
        from_original(foreign).save_pretrained(folder)
        return ""

    def give(ours: Path, folder: Path) -> None:
        with torch.device("meta"):
            model = model_class(config_class.from_pretrained(ours))
        tensors: dict[str, Tensor] = {}
        for file in sorted(ours.glob("*.safetensors")):
            tensors |= _read(file)[0]
        # assigned, not copied: each keeps the type it is stored in
        model.load_state_dict(tensors, assign=True)
        write_original(folder / file_name(model), {"model": to_original(model)})

    return Family(
        title,
        target,
        config_class.model_type,
        lambda names, beside: recognise(names),
        bring,
        give,
    )


# ---- image tokenizers ----------------------------------------------------------------------------


def _bring_tokenizer(foreign: Foreign, folder: Path) -> str:
    parts = from_original(foreign)
    assert parts.layout is not None
    parts.config.architectures = ["VQModel"]
    parts.config.save_pretrained(folder)
    _save(parts.tensors, folder / "model.safetensors", {"format": "pt"})
    if parts.unused:
        _save(parts.unused, folder / UNUSED, {"format": "pt", "layout": parts.layout.name})
    left = f"; {parts.dropped} tensors that only training reads were left out"
    return left if parts.dropped else ""


def _give_tokenizer(layout: Published, ours: Path, folder: Path) -> None:
    config = VQConfig.from_dict(read_json(ours / "config.json"))
    unused: dict[str, Tensor] = {}
    if (ours / UNUSED).is_file():
        kept, about = _read(ours / UNUSED)
        unused = kept if about.get("layout") == layout.name else {}
    tensors = to_original(layout, config, stored(ours, config), unused)
    if layout is LLAMAGEN:
        write_original(folder / f"vq_ds{config.factor()}.pt", {"model": tensors})
    else:
        write_original(folder / VQGAN, {"state_dict": tensors})
        (folder / VQGAN).with_suffix(".yaml").write_text(settings_text(config), encoding="utf-8")


def _save(tensors: Mapping[str, Tensor], path: Path, about: dict[str, str]) -> None:
    # clones: safetensors refuses tensors that look into the same memory
    save_file({n: t.clone().contiguous() for n, t in tensors.items()}, path, metadata=about)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut off ({error}): get it again") from None


def _tokenizer(layout: Published) -> Family:
    return Family(
        layout.title,
        layout.name,
        VQConfig.model_type,
        lambda names, beside: layout_of(names) is layout,
        _bring_tokenizer,
        partial(_give_tokenizer, layout),
    )


def _painter_file(model: LlamaGenForImageGeneration) -> str:
    """As the project names them: the condition and the pixels per side."""
    short = {"class": "c2i", "text": "t2i"}[model.config.condition]
    return f"{short}_{model.config.grid_width * DOWNSAMPLING}.pt"


FAMILIES: tuple[Family, ...] = (
    _tokenizer(LLAMAGEN),
    _tokenizer(CHAMELEON),
    model_family(
        "LlamaGen's transformer",
        "llamagen",
        LlamaGenForImageGeneration,
        recognise=llamagen_convert.recognise,
        from_original=lambda foreign: llamagen_convert.from_original(
            foreign.tensors, foreign.beside, foreign.path.name
        ),
        to_original=llamagen_convert.to_original,
        file_name=_painter_file,
    ),
)
"""The table. To add a model, append a `model_family(...)` with the functions of its models/ file:
recognise, from_original, to_original; whatever `--to` it names must be in `ConvertConfig.to`."""


# ---- the verb ------------------------------------------------------------------------------------


def convert(config: ConvertConfig) -> str:
    """Writes `config.out`; returns a line about what was done.

    Raises:
        ValueError: the source is in no known layout, damaged, holds code, or does not fit the
            layout that is asked for.
        FileExistsError: `out` is there already.
    """
    source = _source(Path(config.source).expanduser())
    if source.is_dir():
        if config.to == "arra":
            raise ValueError(f"{source} is our own format already: say what it becomes with --to")
        if config.weights is not None:
            raise ValueError(f"{source} holds one set of weights: --weights is for files with two")
        family = _for_target(source, read_json(source / "config.json")["model_type"], config.to)
        with atomic_dir(config.out) as temporary:
            family.give(source, temporary)
        return f"{source} -> {config.out}, as {family.title}"
    foreign = read_foreign(source, config.weights)
    family = _recognised(foreign)
    target = None if config.to == "arra" else _for_target(source, family.model_type, config.to)
    with atomic_dir(config.out) as temporary:
        ours = temporary if target is None else temporary / "ours"
        ours.mkdir(exist_ok=True)
        remark = family.bring(foreign, ours)
        if target is not None:
            target.give(ours, temporary)
            shutil.rmtree(ours)
    if foreign.both:
        other = "model" if foreign.weights == "ema" else "ema"
        remark += f"; these are its weights {foreign.weights!r}, --weights {other} takes the others"
    return f"{source} is {family.title} -> {config.out}{remark}"


def _source(source: Path) -> Path:
    """A checkpoint file, or a folder with one of our config.json."""
    if source.is_dir():
        if (source / "pipeline.json").is_file() and (source / "model" / "config.json").is_file():
            source = source / "model"  # an exported painter
        if (source / "config.json").is_file():
            found = read_json(source / "config.json").get("model_type")
            if found in {family.model_type for family in FAMILIES}:
                return source
            raise ValueError(
                f"{source} is a {found!r} in transformers' format, which loads as it is: nothing "
                f"to convert"
            )
        if (source / VQGAN).is_file():
            return source / VQGAN
        raise ValueError(f"{source}: expected {VQGAN} or config.json in it, found neither")
    return source


def _recognised(foreign: Foreign) -> Family:
    names = foreign.tensors.keys()
    for family in FAMILIES:
        if family.recognise(names, foreign.beside):
            return family
    known = ", ".join(family.title for family in FAMILIES)
    raise ValueError(
        f"{foreign.path}: expected one of {known}, found {len(names)} tensors such as "
        f"{', '.join(sorted(names)[:2])}"
    )


def _for_target(source: Path, model_type: str, target: str) -> Family:
    fitting = [family for family in FAMILIES if family.model_type == model_type]
    for family in fitting:
        if family.target == target:
            return family
    known = ", ".join(family.target for family in fitting)
    raise ValueError(f"{source} is a {model_type!r}, which --to {known} can write, not {target}")
