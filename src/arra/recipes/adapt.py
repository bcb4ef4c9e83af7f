"""ARRA-Adapt: a model that already paints learns a domain."""

import dataclasses

from arra.config import TrainConfig
from arra.recipes.llm import llm


def adapt(data: str, out: str) -> TrainConfig:
    """Goes on with the painter given as --model; align to an encoder of the domain.

    The settings of ARRA (arXiv 2503.07334v4 uses the same for both); the trained image head is kept
    as it is, where the released script zeroes its image rows.
    """
    return dataclasses.replace(llm(data, out), recipe="adapt")
