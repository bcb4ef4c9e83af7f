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
from arra.generate.engine import Engine, Tally
from arra.generate.pixels import decoded, to_pixels
from arra.generate.request import Event, Painted, Request
from arra.generate.settings import (
    DEFAULT_SLOTS,
    NO_SPECULATION,
    Sampling,
    Speculation,
    check_slots,
)
from arra.image_tokenizers import load_image_tokenizer
from arra.image_tokenizers.interface import ImageTokenizer
from arra.models import Backbone, load_model
from arra.models.loading import PIPELINE, Precision, model_place
from arra.models.quantized import Quantization

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
        slots: rows per forward pass, likewise; a picture takes two with guidance, one without.
        compiled: compile the decode step; the first picture then takes about a minute longer.
        speculation: whether a forward pass may paint several codes; see `Speculation`.
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
        *,
        compiled: bool = False,
        speculation: Speculation = NO_SPECULATION,
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
        self.prompt_features, self.compiled = prompt_features, compiled
        self.speculation = speculation
        self._engine: Engine | None = None

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
        quantization: Quantization = "off",
    ) -> "Pipeline":
        """Opens an exported model, a run folder (its newest checkpoint), a checkpoint as its
        authors published it, a hub id or `builtin:scenes`.

        Args:
            image_tokenizer: folder, file or hub id, where it is not at its recorded place or, for a
                published checkpoint, not inside it.
            text_encoder: folder or hub id likewise, of a model that is prompted by its features. It
                is opened when the first prompt comes.
            grid: (height, width) of the images in codes; default: what the model was trained on.
            published_format, dtype, quantization: see `load_model`.

        Raises:
            ValueError: no painter is there, or the image tokenizer is not the one it was trained
                with (compared by fingerprint).
        """
        folder = model_place(spec)
        backbone = load_model(
            spec, device, dtype=dtype, published_format=published_format, quantization=quantization
        )
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
        cfg_interval: tuple[float, float] | None = None,
        slots: int | None = None,
    ) -> list[Image]:
        """One RGB picture per prompt, in the order of the prompts; see `codes`."""
        sampling = self.sampling.with_changes(cfg, temperature, top_k, top_p, cfg_interval)
        pictures = dict(self.pictures(self.requests(prompts, seeds, sampling), slots))
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
        cfg_interval: tuple[float, float] | None = None,
        slots: int | None = None,
    ) -> Tensor:
        """The image codes of each prompt, (N, h, w) int64 on the CPU.

        Args:
            prompts: an empty one paints without a condition.
            seeds: one per prompt; by default the k-th repetition of a prompt has seed k, from 0.
            cfg, temperature, top_k, top_p, cfg_interval: see `Sampling`; default: the model's own.
            slots: rows per forward pass. A picture does not depend on which others are painted; to
                the last bit it does depend on this number.
        """
        sampling = self.sampling.with_changes(cfg, temperature, top_k, top_p, cfg_interval)
        requests = self.requests(prompts, seeds, sampling)
        if not requests:
            return torch.empty(0, *self.grid, dtype=torch.long)
        return torch.stack(self.engine(slots).paint(requests))

    def pictures(
        self, requests: Sequence[Request], slots: int | None = None
    ) -> Iterator[tuple[int, Image]]:
        """Pictures as they are finished, each with its request's number."""
        finished = (
            [(number, event.codes_hw) for number, event in events]
            for events in self._events(requests, slots)
        )
        device = self.backbone.device
        for pictures in decoded(finished, self._as_pictures, device):
            yield from pictures

    def _as_pictures(self, painted: list[tuple[int, Tensor]]) -> list[tuple[int, Image]]:
        by_grid: dict[torch.Size, list[tuple[int, Tensor]]] = {}
        for number, codes_hw in painted:
            by_grid.setdefault(codes_hw.shape, []).append((number, codes_hw))
        pictures: list[tuple[int, Image]] = []
        for each in by_grid.values():
            images = to_pil(self.decode(torch.stack([codes_hw for _, codes_hw in each])))
            pictures += zip([number for number, _ in each], images, strict=True)
        return pictures

    def stream(
        self,
        prompts: str | Sequence[str],
        seeds: Sequence[int] | None = None,
        *,
        cfg: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        cfg_interval: tuple[float, float] | None = None,
        slots: int | None = None,
    ) -> Iterator[tuple[int, Image, bool]]:
        """Pictures row by row, as (prompt's number, picture, whether it is finished).

        A part of a picture is what is painted so far, as high as that; its lowest pixels may change
        a little with the next rows, as the image tokenizer decodes neighbouring codes together. A
        finished picture equals that of a call.
        """
        sampling = self.sampling.with_changes(cfg, temperature, top_k, top_p, cfg_interval)
        requests = self.requests(prompts, seeds, sampling, streamed=True)
        for events in self._events(requests, slots):
            for number, event in events:
                finished, codes_1hw = isinstance(event, Painted), event.codes_hw[None]
                # A part is nobody's to compare: it is decoded alone.
                decode = self.decode if finished else self.image_tokenizer.decode
                [image] = to_pil(decode(codes_1hw).cpu())
                yield number, image, finished

    def requests(
        self,
        prompts: str | Sequence[str],
        seeds: Sequence[int] | None,
        sampling: Sampling,
        *,
        streamed: bool = False,
    ) -> list[Request]:
        """What the engine is asked for, one per prompt.

        Raises:
            ValueError: there are not as many seeds as prompts, or the model does not take a prompt.
        """
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = repetitions(listed) if seeds is None else seeds
        if len(seeds) != len(listed):
            raise ValueError(f"{len(listed)} prompts need as many seeds, got {len(seeds)}")
        prefix_of = {
            prompt: tuple(self.backbone.condition(prompt, self.grid)) for prompt in set(listed)
        }
        text_of = self._text_of(listed)
        return [
            Request(
                prefix_of[prompt], seed, self.grid, sampling, text_of.get(prompt), streamed=streamed
            )
            for prompt, seed in zip(listed, seeds, strict=True)
        ]

    def engine(self, slots: int | None = None) -> Engine:
        """The engine that paints: it is kept, with its memory, as long as nothing else is asked."""
        slots = self.slots if slots is None else slots
        kept = self._engine
        asked = slots, self.backbone, self.speculation
        if kept is None or (kept.slots, kept.backbone, kept.speculation) != asked or kept.busy:
            self._engine = kept = Engine(
                self.backbone, slots, compiled=self.compiled, speculation=self.speculation
            )
        return kept

    @property
    def tally(self) -> Tally:
        """What the pictures took that its engine has painted so far."""
        return self.engine().tally if self._engine is None else self._engine.tally

    def _events(
        self, requests: Sequence[Request], slots: int | None
    ) -> Iterator[list[tuple[int, Event]]]:
        """What happens to these requests, each event with its request's number."""
        engine = self.engine(slots)
        numbers = {engine.submit(request): number for number, request in enumerate(requests)}
        try:
            for events in engine.events():
                yield [(numbers[event.ticket], event) for event in events]
        finally:
            for ticket in numbers:  # of a caller who asks for no more
                engine.cancel(ticket)

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

    def decode(self, codes_Nhw: Tensor) -> Tensor:
        """Codes to pixels, uint8 NCHW on the CPU."""
        return to_pixels(self.image_tokenizer, codes_Nhw)


def repetitions(prompts: Sequence[str]) -> list[int]:
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
