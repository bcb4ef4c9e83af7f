"""A frozen T5 encoder: captions to the features that a caption-conditional painter is prompted by.

As LlamaGen uses it (FoundationVision/LlamaGen ce98ec4, language/t5.py and extract_t5_feature.py):
the caption is cleaned (`caption_cleaning.py`), cut at `length` tokens (120 there) with the end
token kept, encoded with its padding masked, and only the vectors of its own tokens are kept. Its
T5 is google/flan-t5-xl, 2048 wide. It computes in bfloat16; here it is float32, rounded to the
float16 that datasets store, which has three more bits of mantissa.

Legend: N captions, T tokens of a padded caption, n of one caption, D feature width.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)

from arra.encoders.caption_cleaning import clean_caption
from arra.encoders.loading import from_folder
from arra.files import read_json
from arra.resolve import resolve_folder

TEXT_LENGTH = 120
"""Tokens of a caption, the end token included (LlamaGen: autoregressive/sample/sample_t2i.py)."""

CLEANING = 1
"""Version of the cleaning rules: part of the fingerprint."""

_SHAPING_KEYS = (
    "num_heads",
    "d_kv",
    "feed_forward_proj",
    "layer_norm_epsilon",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
)
"""Config values that change features without changing the shape of any weight."""

_PROBE = "a photo of 3 small, unforgettable lighthouses; rain at dusk"
"""How a tokenizer cuts this is part of the fingerprint, its files are not: they differ between
versions of transformers."""


class TextEncoder:
    """Maps captions to features, one (n, D) float16 tensor a caption, in main memory.

    Attributes:
        name: the last part of what was asked for, such as `flan-t5-xl`.
        spec: what was asked for.
        length: the most tokens of a caption.
        dim: D.
        fingerprint: sha256 over weights, config values, tokenizer, cleaning and length.
        model: the frozen transformers model, in eval mode.
    """

    def __init__(self, spec: str, folder: Path, length: int, device: torch.device | str) -> None:
        self.spec, self.length, self.device = spec, length, torch.device(device)
        self.name = re.sub(r"[^A-Za-z0-9_.-]", "-", Path(spec).expanduser().name) or "text"
        self._tokenizer = _open_tokenizer(folder)
        model = from_folder(T5EncoderModel, folder, {})
        config = model.config
        assert isinstance(config, T5Config)
        if len(self._tokenizer) > config.vocab_size:
            raise ValueError(
                f"text encoder {folder}: its tokenizer has {len(self._tokenizer)} tokens, but its "
                f"model {config.vocab_size}: they do not belong together"
            )
        self.dim = int(config.d_model)
        self.fingerprint = _fingerprint(model, self._tokenizer, length)
        model.to(self.device)  # type: ignore[arg-type]
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """Features (n, D) float16 of each caption; 1 <= n <= length (the end token is one).

        All in one pass. Which captions share it moves the last bit of float32, as products of
        other shapes round differently; a caption alone depends on nothing else. Infinite or NaN
        values are the caller's to refuse.
        """
        ids = [self.token_ids(caption) for caption in captions]
        if not ids:
            return []
        width = max(map(len, ids))
        pad = self._tokenizer.pad_token_id or 0
        ids_NT = torch.tensor([row + [pad] * (width - len(row)) for row in ids])
        length_N = torch.tensor([len(row) for row in ids])
        mask_NT = torch.arange(width) < length_N[:, None]
        hidden_NTD = self.model(
            input_ids=ids_NT.to(self.device), attention_mask=mask_NT.to(self.device)
        ).last_hidden_state
        hidden_NTD = hidden_NTD.to(torch.float16).cpu()
        return [hidden_NTD[i, : len(row)].clone() for i, row in enumerate(ids)]

    def token_ids(self, caption: str) -> list[int]:
        """The ids that the caption becomes, end token included."""
        cleaned = clean_caption(caption)
        return self._tokenizer(cleaned, truncation=True, max_length=self.length)["input_ids"]


def load_text_encoder(
    spec: str | Path, length: int = TEXT_LENGTH, device: torch.device | str = "cpu"
) -> TextEncoder:
    """Loads a frozen T5 encoder; of a whole T5 only the encoder's half is read.

    Args:
        spec: a folder or hub id with config.json, safetensors weights and tokenizer files.
        length: the most tokens of a caption; what is longer is cut.
        device: where it computes, in float32.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: no T5, no safetensors weights, or no usable tokenizer.
    """
    if length < 1:
        raise ValueError(f"a caption must have at least 1 token, got {length}")
    folder = resolve_folder(spec, "text encoder")
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"text encoder {folder} has no config.json: it is not a model folder"
        )
    kind = read_json(file).get("model_type")
    if kind != "t5":
        raise ValueError(f"text encoder {folder} is of type {kind!r}; supported is t5 (flan-t5-xl)")
    return TextEncoder(str(spec), folder, length, device)


def _open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"text encoder {folder} has no usable tokenizer ({reason}): put the tokenizer.json of "
            f"its model there"
        ) from None
    # A folder without tokenizer files gives an empty tokenizer, without a word.
    ids = tokenizer(_PROBE)["input_ids"]
    if len(set(ids)) < 4 or ids[-1] != tokenizer.eos_token_id:
        raise ValueError(
            f"text encoder {folder} has no usable tokenizer (it cuts a sentence into "
            f"{len(set(ids))} tokens): put the tokenizer.json of its model there"
        )
    return tokenizer


def _fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int) -> str:
    config = model.config.to_dict()
    described = {
        "family": "T5",
        "config": {key: config[key] for key in _SHAPING_KEYS if key in config},
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "probe": tokenizer(_PROBE)["input_ids"],
        "cleaning": CLEANING,
        "length": length,
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().contiguous().cpu().numpy().data)
    return digest.hexdigest()
