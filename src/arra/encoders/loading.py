"""transformers' models from folders and from tensors, with one sentence for everything missing."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging


def from_folder(kind: Any, folder: Path, options: dict[str, Any]) -> PreTrainedModel:
    """from_pretrained that reads safetensors only and refuses weights left at random."""
    return _from_pretrained(kind, folder, folder, {"use_safetensors": True, **options})


def from_tensors(
    kind: Any, config: Any, tensors: dict[str, Tensor], folder: Path, options: dict[str, Any]
) -> Any:
    """The same from tensors under transformers' published names; `folder` is for errors."""
    given = {"config": config, "state_dict": tensors, **options}
    return _from_pretrained(kind, folder, None, given)


def _from_pretrained(
    kind: Any, folder: Path, place: Path | None, options: dict[str, Any]
) -> PreTrainedModel:
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # the unused text tower would be reported key by key
    logging.disable_progress_bar()
    try:
        model, info = kind.from_pretrained(
            place,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"encoder {folder} has no readable safetensors weights ({reason})"
        ) from None
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"encoder {folder} does not fit its config.json ({reason})") from None
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"encoder {folder} lacks {len(missing)} weights, {missing[0]} among them: "
            f"it is not a complete {kind.__name__}"
            + (" (pool with @class instead)" if "visual_projection.weight" in missing else "")
        )
    return model
