"""The other half of a CLIP: captions to the space that it shares with images.

Read from the folder that load_encoder reads the vision tower of: transformers' CLIP and SigLIP,
and open_clip's format (open_clip_text.py), BioMedCLIP among them. The tokenizer must lie in the
folder too, as it does on the hub.

Legend: N captions, T tokens of a padded caption, D width of the space shared with images.
"""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerBase,
    SiglipConfig,
    SiglipTextModel,
)

from arra.encoders import open_clip
from arra.encoders.loading import from_folder
from arra.encoders.open_clip_text import TextTower, open_text_tower, read_clip_text
from arra.files import read_json
from arra.resolve import resolve_folder

_PROBE = "a photo of 3 small, unforgettable lighthouses; rain at dusk"


class ClipText:
    """Maps captions to embeddings (N, D) float32, on its device, not scaled to length 1.

    Attributes:
        name: of the architecture.
        length: the most tokens of a caption; what is longer is cut, its end token kept.
    """

    def __init__(self, tower: TextTower, folder: Path, device: torch.device | str) -> None:
        self.name, self.length = tower.name, tower.length
        self._tower, self._device = tower, torch.device(device)
        self._tokenizer = _open_tokenizer(folder, tower.bert)
        tower.model.to(self._device)
        self.model: Any = tower.model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Embeddings (N, D) of at least one caption."""
        rows = self._tokenizer(self._cleaned(captions), truncation=True, max_length=self.length)
        ids = rows["input_ids"]
        width = self.length if self._tower.full else max(map(len, ids))
        pad = self._tokenizer.pad_token_id or 0
        ids_NT = torch.tensor([row + [pad] * (width - len(row)) for row in ids])
        length_N = torch.tensor([len(row) for row in ids])
        mask_NT = (torch.arange(width) < length_N[:, None]).long()
        found = self._tower.read(self.model, ids_NT.to(self._device), mask_NT.to(self._device))
        return found.to(torch.float32)

    def too_long(self, captions: Sequence[str]) -> list[bool]:
        """Which captions are cut."""
        rows = self._tokenizer(self._cleaned(captions), truncation=False, verbose=False)
        return [len(row) > self.length for row in rows["input_ids"]]

    def _cleaned(self, captions: Sequence[str]) -> list[str]:
        if not self._tower.cleaned:
            return list(captions)
        return [" ".join(html.unescape(html.unescape(text)).split()) for text in captions]


def load_clip_text(spec: str | Path, device: torch.device | str = "cpu") -> ClipText:
    """The text tower of a CLIP.

    Args:
        spec: a folder, hub id or `builtin:NAME`, without a pooling.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: an encoder without a text tower that can be read, or without its tokenizer.
    """
    folder = resolve_folder(spec, "encoder")
    if open_clip.is_open_clip(folder):
        folder = resolve_folder(spec, "encoder", also=open_clip.PUBLISHED)
        return ClipText(open_text_tower(folder), folder, device)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"encoder {folder} has no config.json: it is not a model folder")
    raw = read_json(folder / "config.json")
    kind = raw.get("model_type")
    if kind not in ("clip", "siglip"):
        raise ValueError(
            f"encoder {folder} is of type {kind!r}: a CLIP-score needs a text tower beside the "
            f"images', of a whole CLIP or SigLIP or in open_clip's format"
        )
    tower = _clip(folder, raw) if kind == "clip" else _siglip(folder, raw)
    return ClipText(tower, folder, device)


def _clip(folder: Path, raw: dict[str, Any]) -> TextTower:
    whole = CLIPConfig.from_dict(raw)
    config: Any = whole.text_config
    config.projection_dim = whole.projection_dim  # said once for both towers
    model = from_folder(CLIPTextModelWithProjection, folder, {"config": config})
    return TextTower("CLIP", model, read_clip_text, int(config.max_position_embeddings))


def _siglip(folder: Path, raw: dict[str, Any]) -> TextTower:
    """SigLIP reads the last position of a caption that is always padded to its full length."""
    config: Any = SiglipConfig.from_dict(raw).text_config
    model = from_folder(SiglipTextModel, folder, {"config": config})

    def read(model: Any, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        return model(input_ids=ids_NT).pooler_output

    return TextTower("SigLIP", model, read, int(config.max_position_embeddings), full=True)


def _open_tokenizer(folder: Path, bert: bool) -> PreTrainedTokenizerBase:
    remedy = "put the tokenizer files of its model (tokenizer.json, tokenizer_config.json) there"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"encoder {folder} has no usable tokenizer ({reason}): {remedy}") from None
    # A folder without tokenizer files gives an empty tokenizer, without a word.
    pieces = len(set(tokenizer(_PROBE, verbose=False)["input_ids"]))
    if pieces < 4:
        raise ValueError(
            f"encoder {folder} has no usable tokenizer (it cuts a sentence into {pieces} tokens): "
            f"{remedy}"
        )
    if bert and tokenizer.cls_token != "[CLS]":
        raise ValueError(
            f"encoder {folder}: its tokenizer is not BERT's; of text towers that open_clip takes "
            f"from transformers, BERT is supported"
        )
    tokenizer.padding_side = "right"
    return tokenizer
