"""Opens standard Hugging Face folders: safetensors only, no code from the folder, no progress bar.

`trust_remote_code=False` is said rather than left out: the default asks the user on a terminal.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging


def open_causal_lm(folder: Path) -> PreTrainedModel:
    """The causal language model in `folder`, weights in the type they are stored in.

    Raises:
        OSError, ValueError, KeyError: no such model there, or not all of it.
    """
    try:
        with without_progress_bar():
            opened: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder} is damaged, or not what its config says: {reason}") from None
    model, found = opened
    missing = sorted(str(name) for name in found["missing_keys"])
    if missing:
        raise ValueError(
            f"{folder} is not a whole model: {len(missing)} tensors are missing, such as "
            f"{missing[0]}"
        )
    return model


def empty_causal_lm(folder: Path) -> PreTrainedModel:
    """The architecture that `folder`'s config.json describes, with fresh weights."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return _with_generation_config(model, folder)


def open_as(model_class: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """The model in `folder` as one of `model_class`, all its weights from there, in their type.

    Raises:
        ValueError: no such model is there, or a tensor is missing, unknown or misshapen.
    """
    told = logging.get_verbosity()
    logging.set_verbosity_error()  # no table of missing tensors: our sentence says it
    try:
        with without_progress_bar():
            loaded: Any = model_class.from_pretrained(
                folder, dtype="auto", use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder} cannot be loaded as {model_class.__name__}: {reason}") from None
    finally:
        logging.set_verbosity(told)
    model, found = loaded
    for what in ("missing", "unexpected", "mismatched"):
        names = sorted(str(name) for name in found[f"{what}_keys"])
        if names:
            raise ValueError(
                f"{folder} is not a whole {model_class.__name__}: {len(names)} tensors are {what}, "
                f"such as {names[0]}"
            )
    return model


def empty_as(model_class: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """The architecture that `folder`'s config.json describes, with fresh weights."""
    config_class: Any = model_class.config_class
    return _with_generation_config(model_class(config_class.from_pretrained(folder)), folder)


def _with_generation_config(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """How the model's own `generate` is set up is part of it: an export hands it on."""
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def open_text_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The text tokenizer in `folder`."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def open_tokenizer_file(folder: Path, tokens: Sequence[str]) -> PreTrainedTokenizerBase:
    """The text tokenizer as `folder`'s tokenizer.json has it, whatever class its config names.

    A class of its own may rebuild the tokenizer in its own way and split text otherwise.

    Raises:
        ValueError: the file is missing, has none of the special tokens that open and pad a
            sequence, or lacks one of `tokens`.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json: place the one published with it there")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in tokens if token not in vocabulary]
    missing += [f"a {n}" for n in ("bos_token", "pad_token") if getattr(tokenizer, n) is None]
    if missing:
        raise ValueError(
            f"{folder}: its text tokenizer has no {', '.join(missing[:3])}: it belongs to another "
            f"model"
        )
    return tokenizer


@torch.no_grad()
def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gives the weights another type in place, tensor by tensor.

    Buffers keep theirs: positions far out would be lost in frequencies of bfloat16.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Keeps transformers from drawing one while weights are read."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
