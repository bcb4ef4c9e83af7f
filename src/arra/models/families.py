"""Which family a checkpoint belongs to: the file `models/<model_type>.py`, else any causal LM.

A family is one file beside this one, named after the `model_type` of its config.json, that says
`FAMILY = <its Backbone>`. Nothing else in the package knows a family's name.
"""

import importlib
import importlib.util
import pkgutil
from pathlib import Path

from arra.files import read_json
from arra.foreign import Foreign
from arra.models.base import Backbone


def family_of(folder: Path) -> type[Backbone]:
    """The backbone class for the model in a standard folder (the one with config.json).

    Raises:
        ValueError: there is no readable config.json.
    """
    file = folder / "config.json"
    if not file.is_file() and (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} is an adapter without its model: name its run, or what `arra export` makes "
            f"of that without --adapter-only"
        )
    if not file.is_file():
        raise ValueError(f"{folder} cannot be loaded as a model: config.json is missing")
    config = read_json(file)
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(model_type, str):
        raise ValueError(f"{file} names no model_type: it is not a transformers model")
    return family_named(model_type)


def family_named(model_type: str) -> type[Backbone]:
    """The backbone class for a transformers `model_type`."""
    name = f"arra.models.{model_type}"
    if model_type.isidentifier() and importlib.util.find_spec(name) is not None:
        family = getattr(importlib.import_module(name), "FAMILY", None)
        if family is not None:
            return family
    from arra.models.causal_lm import CausalLM

    return CausalLM


def open_foreign(foreign: Foreign) -> Backbone:
    """The backbone in somebody else's checkpoint file, told by the names of its tensors.

    Raises:
        ValueError: no family has such a layout, or its own does not fit.
    """
    here = str(Path(__file__).parent)
    for info in pkgutil.iter_modules([here], "arra.models."):
        family = getattr(importlib.import_module(info.name), "FAMILY", None)
        backbone = None if family is None else family.from_foreign(foreign)
        if backbone is not None:
            return backbone
    names = sorted(foreign.tensors)
    raise ValueError(
        f"{foreign.path}: expected the transformer of a published painter (LlamaGen's c2i or t2i), "
        f"found {len(names)} tensors such as {', '.join(names[:2])}"
    )
