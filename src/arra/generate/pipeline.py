"""From prompts and seeds to pictures: a painter together with its image tokenizer.

Legend: N images, h and w codes per side, `NCHW` = channels first, uint8 pixels 0..255, n tokens of
a prompt, F width of its features.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from arra.config_json import from_json
from arra.data.images import to_pil
from arra.files import read_json
from arra.generate.captions import EncodedPrompts, PromptFeatures, encoded_prompts
from arra.generate.engine import Painted, Request, paint
from arra.generate.settings import DEFAULT_SLOTS, Sampling, check_slots
from arra.image_tokenizers import load_image_tokenizer
from arra.image_tokenizers.interface import ImageTokenizer
from arra.models import Backbone, load_model
from arra.models.loading import PIPELINE, Precision, model_place

FORMAT_VERSION = 1
INSIDE = "image_tokenizer"
"""Folder of an exported model that holds its image tokenizer."""


class Pipeline:
    """Paints prompts.

    Args:
        backbone: a model that paints.
        image_tokenizer: the one whose codes it was trained on.
        grid: (height, width) of its images in codes.
        sampling: used where a call does not say otherwise; by default the family's own.
        slots: images per forward pass, likewise.
        prompt_features: the prompts of a model that is prompted by features; `EncodedPrompts`, or
            a look-up where they are known.
    """

    def __init__(
        self,
        backbone: Backbone,
        image_tokenizer: ImageTokenizer,
        grid: tuple[int, int],
        sampling: Sampling | None = None,
        slots: int = DEFAULT_SLOTS,
        prompt_features: PromptFeatures | None = None,
    ) -> None:
        known = len(backbone.layout.code_ids)
        if image_tokenizer.codebook_size != known:
            raise ValueError(
                f"the model paints with {known} codes, the image tokenizer has "
                f"{image_tokenizer.codebook_size}: use the one that the model was trained with"
            )
        check_slots(slots)
        self.backbone, self.image_tokenizer = backbone, image_tokenizer
        self.grid, self.slots = grid, slots
        if sampling is None:
            sampling = Sampling(**backbone.sampling)  # type: ignore[arg-type]
        self.sampling = sampling
        self.prompt_features = prompt_features

    @classmethod
    def from_pretrained(
        cls,
        spec: str | Path,
        device: str | torch.device = "cpu",
        image_tokenizer: str | Path | None = None,
        *,
        text_encoder: str | None = None,
        grid: tuple[int, int] | None = None,
        published_format: str | None = None,
        dtype: Precision = "auto",
    ) -> "Pipeline":
        """Opens an exported model, a run folder (its newest checkpoint), a checkpoint as its
        authors published it, a hub id or `builtin:scenes`.

        Args:
            image_tokenizer: folder, file or hub id, where it is not at its recorded place or, for a
                published checkpoint, not inside it.
            text_encoder: folder or hub id likewise, of a model that is prompted by its features. It
                is opened when the first prompt comes.
            grid: (height, width) of the images in codes; default: what the model was trained on.
            published_format, dtype: see `load_model`.

        Raises:
            ValueError: no painter is there, or the image tokenizer is not the one it was trained
                with (compared by fingerprint).
        """
        folder = model_place(spec)
        backbone = load_model(spec, device, dtype=dtype, published_format=published_format)
        if not (folder / PIPELINE).is_file():
            encoded = encoded_prompts(backbone, {}, device, text_encoder)
            pipe = cls._of_published(backbone, folder, device, image_tokenizer, grid)
            pipe.prompt_features = encoded
            return pipe
        described = read_json(folder / PIPELINE)
        if described.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{folder / PIPELINE} has format {described.get('format_version')}, this version "
                f"reads {FORMAT_VERSION}: use the version of arra that wrote it"
            )
        tokenizer = _image_tokenizer(folder, described, image_tokenizer, str(device))
        height, width = described["grid"] if grid is None else grid
        sampling = from_json(Sampling, described["sampling"])
        encoded = encoded_prompts(backbone, described, device, text_encoder)
        return cls(backbone, tokenizer, (height, width), sampling, prompt_features=encoded)

    @classmethod
    def _of_published(
        cls,
        backbone: Backbone,
        folder: Path,
        device: str | torch.device,
        image_tokenizer: str | Path | None,
        grid: tuple[int, int] | None,
    ) -> "Pipeline":
        grid = grid or backbone.default_grid
        if grid is None:
            raise ValueError(f"{folder} does not say how large its images are: name it with --grid")
        try:
            tokenizer = load_image_tokenizer(image_tokenizer or folder, str(device))
        except ValueError as error:
            if image_tokenizer is not None:
                raise
            raise ValueError(f"{error}; name one with --image-tokenizer") from None
        return cls(backbone, tokenizer, grid)

    def __call__(
        self,
        prompts: str | Sequence[str],
        seeds: Sequence[int] | None = None,
        *,
        cfg: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        slots: int | None = None,
    ) -> list[Image]:
        """One RGB picture per prompt, in the order of the prompts; see `codes`."""
        sampling = self.sampling.with_changes(cfg, temperature, top_k, top_p)
        pictures: dict[int, Image] = {}
        for batch in self.paint(prompts, seeds, sampling, slots):
            pictures.update(
                zip(batch.indices, to_pil(self.decode(batch.codes_Nhw, slots)), strict=True)
            )
        return [pictures[index] for index in range(len(pictures))]

    def codes(
        self,
        prompts: str | Sequence[str],
        seeds: Sequence[int] | None = None,
        *,
        cfg: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        slots: int | None = None,
    ) -> Tensor:
        """The image codes of each prompt, (N, h, w) int64 on the CPU.

        Args:
            prompts: an empty one paints without a condition.
            seeds: one per prompt; by default the k-th repetition of a prompt has seed k, from 0.
            cfg, temperature, top_k, top_p: see `Sampling`; default: the model's own.
            slots: images per forward pass. A picture does not depend on which others are painted;
                to the last bit it does depend on this number.
        """
        sampling = self.sampling.with_changes(cfg, temperature, top_k, top_p)
        count = 1 if isinstance(prompts, str) else len(prompts)
        codes_Nhw = torch.empty(count, *self.grid, dtype=torch.long)
        for batch in self.paint(prompts, seeds, sampling, slots):
            codes_Nhw[batch.indices] = batch.codes_Nhw
        return codes_Nhw

    def paint(
        self,
        prompts: str | Sequence[str],
        seeds: Sequence[int] | None,
        sampling: Sampling,
        slots: int | None = None,
    ) -> Iterator[Painted]:
        """The same as batches that come as they are finished, in an order of their own."""
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = _repetitions(listed) if seeds is None else seeds
        if len(seeds) != len(listed):
            raise ValueError(f"{len(listed)} prompts need as many seeds, got {len(seeds)}")
        prefix_of = {
            prompt: tuple(self.backbone.condition(prompt, self.grid)) for prompt in set(listed)
        }
        text_of = self._text_of(listed)
        requests = [
            Request(prefix_of[prompt], seed, text_of.get(prompt))
            for prompt, seed in zip(listed, seeds, strict=True)
        ]
        return paint(self.backbone, requests, self.grid, sampling, self._rows(slots))

    def release_text_encoder(self) -> None:
        """Frees the text encoder's memory, if one was opened; prompts it has seen stay known."""
        if isinstance(self.prompt_features, EncodedPrompts):
            self.prompt_features.release()

    def _text_of(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Features (n, F) of the prompts that are not empty, if the model is prompted by such."""
        distinct = [prompt for prompt in dict.fromkeys(prompts) if prompt]
        if not self.backbone.text_slots or not distinct:
            return {}
        if self.prompt_features is None:
            raise ValueError(
                "the model is prompted by a text encoder's features: give the pipeline "
                "`prompt_features`, or open it with Pipeline.from_pretrained"
            )
        return dict(zip(distinct, self.prompt_features(distinct), strict=True))

    def decode(self, codes_Nhw: Tensor, slots: int | None = None) -> Tensor:
        """Codes to pixels, uint8 NCHW on the CPU.

        Always `slots` images at a time, so that no pixel depends on how many there are.
        """
        rows = self._rows(slots)
        parts = []
        for part_Nhw in codes_Nhw.split(rows):
            full_Nhw = torch.zeros(rows, *part_Nhw.shape[1:], dtype=part_Nhw.dtype)
            full_Nhw[: len(part_Nhw)] = part_Nhw
            parts.append(self.image_tokenizer.decode(full_Nhw)[: len(part_Nhw)].cpu())
        return torch.cat(parts)

    def _rows(self, slots: int | None) -> int:
        return self.slots if slots is None else slots


def _repetitions(prompts: Sequence[str]) -> list[int]:
    """How often each prompt came before: image j of every prompt gets seed j."""
    seen: dict[str, int] = {}
    seeds = []
    for prompt in prompts:
        seeds.append(seen.get(prompt, 0))
        seen[prompt] = seeds[-1] + 1
    return seeds


def _image_tokenizer(
    folder: Path, described: dict[str, Any], given: str | Path | None, device: str
) -> ImageTokenizer:
    recorded = described["image_tokenizer"]
    inside = folder / INSIDE
    spec = given or (inside if inside.is_dir() else recorded["spec"])
    tokenizer = load_image_tokenizer(spec, device)
    if tokenizer.fingerprint != recorded["fingerprint"]:
        raise ValueError(
            f"{spec} is not the image tokenizer that {folder} was trained with (another "
            f"fingerprint): name the right one with --image-tokenizer"
        )
    return tokenizer
