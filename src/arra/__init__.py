"""ARRA: train autoregressive models to paint, with global alignment (arXiv 2503.07334)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arra.encoders import load_encoder
    from arra.generate.pipeline import Pipeline
    from arra.image_tokenizers import load_image_tokenizer
    from arra.integrations.hf_data import PreparedImages
    from arra.integrations.hf_trainer import ArraTrainer
    from arra.models import load_model
    from arra.objective import Objective, Target

__version__ = "0.1.0"
__all__ = [
    "ArraTrainer",
    "Objective",
    "Pipeline",
    "PreparedImages",
    "Target",
    "load_encoder",
    "load_image_tokenizer",
    "load_model",
]

_HOME = {
    "ArraTrainer": "arra.integrations.hf_trainer",
    "Objective": "arra.objective",
    "Pipeline": "arra.generate.pipeline",
    "PreparedImages": "arra.integrations.hf_data",
    "Target": "arra.objective",
    "load_encoder": "arra.encoders",
    "load_image_tokenizer": "arra.image_tokenizers",
    "load_model": "arra.models",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: `import arra` alone takes no time (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'arra' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
