"""Opens standard Hugging Face folders: safetensors only, no code from the folder, no progress bar.

`trust_remote_code=False` is said rather than left out: the default asks the user on a terminal.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging


def open_causal_lm(folder: Path) -> PreTrainedModel:
    """The causal language model in `folder`, weights in float32.

    Raises:
        OSError, ValueError, KeyError: no such model there; transformers' own words say what.
    """
    with _no_progress_bar():
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )


def empty_causal_lm(folder: Path) -> PreTrainedModel:
    """The architecture that `folder`'s config.json describes, with fresh weights."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def open_text_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The text tokenizer in `folder`."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
