"""Recipes: functions that return a full training config; each names the source of its numbers.

arra train RECIPE --data DIR --out RUN [any field of the config as a flag]
"""

from collections.abc import Callable

from arra.config import TrainConfig
from arra.recipes.adapt import adapt
from arra.recipes.base import base
from arra.recipes.cca import cca
from arra.recipes.imagenet import imagenet, imagenet_subset
from arra.recipes.llm import llm
from arra.recipes.scenes import scenes

RECIPES: dict[str, Callable[[str, str], TrainConfig]] = {
    "scenes": scenes,
    "base": base,
    "imagenet": imagenet,
    "imagenet-subset": imagenet_subset,
    "llm": llm,
    "adapt": adapt,
    "cca": cca,
}
"""Name -> function of (prepared data folder, run folder)."""

START_FROM_A_MODEL = ("llm", "adapt", "cca")
"""Those whose settings are for weights that exist: `arra train` asks for --model."""
