"""What `arra bench generate` compares: our painter in its ways, the original LlamaGen's `generate`
from a checkout, and transformers' own with guidance.

Legend: N pictures, T tokens of a prompt, n tokens of a caption, F width of its features.
"""

import copy
import importlib
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import LlamaConfig

from arra.bench.train_arms import CHAMELEON, CLASSES, CODES, SIZES, shaped
from arra.doctor.made_up import captions
from arra.generate.engine import Engine
from arra.generate.pipeline import Pipeline
from arra.generate.request import Painted, Request, RowsPainted, Steps
from arra.generate.settings import NO_SPECULATION, Sampling, Speculation
from arra.image_tokenizers.vq import VQConfig, VQModel
from arra.models.base import Backbone, Grid
from arra.models.folders import cast_weights
from arra.models.loading import load_for_training
from arra.models.quantized import Quantization, quantize_weights

CAPTION_TOKENS = 20
"""Of a made-up caption's features."""
TEXT = LlamaConfig(
    vocab_size=2048 + 2 + CODES,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=512,
)
"""GPT-B's shape as a language model that reads captions, of a class that transformers has."""
SIDE = {"7B": 32, "tiny": 4}
"""Of a picture in codes, where it is not 16."""
ORIGINALS = ("B", "L", "XL")
"""Sizes that LlamaGen calls GPT-B, GPT-L and GPT-XL."""


def fresh_painter(name: str, device: torch.device, dtype: torch.dtype) -> Backbone:
    """A model of this size in random weights; a 7B is made where it will be used."""
    if name == "7B":
        backbone = shaped(CHAMELEON, 8192, device)
    elif name == "text":
        backbone = shaped(TEXT, CODES, device)
    else:
        backbone = load_for_training(
            None,
            replace(SIZES[name].model, dropout=0.0),
            codebook_KC=torch.zeros(CODES, 8),
            captions=(),
            seed=0,
            grid=grid_of(name),
            class_names=[str(number) for number in range(CLASSES)],
        )
    cast_weights(backbone.model, dtype)
    backbone.model.eval()
    return backbone.to(device)


def grid_of(name: str) -> Grid:
    """The grid that a model of this size paints."""
    side = SIDE.get(name, 16)
    return side, side


def requests_of(
    backbone: Backbone, grid: Grid, images: int, sampling: Sampling, *, streamed: bool = False
) -> list[Request]:
    """Pictures of made-up prompts: classes, captions or a caption's features."""
    chosen = torch.Generator().manual_seed(0)
    prompts = [str(i) for i in range(images)] if backbone.text_tokenizer is None else captions(16)
    requests = []
    for number in range(images):
        text_nF = None
        prompt = prompts[number % len(prompts)]
        if backbone.text_slots:
            prompt = ""
            text_nF = torch.randn(CAPTION_TOKENS, backbone.text_width, generator=chosen)
        prefix = tuple(backbone.condition(prompt, grid))
        requests.append(Request(prefix, number, grid, sampling, text_nF, streamed))
    return requests


# ---- ours ----------------------------------------------------------------------------------------


def smaller(backbone: Backbone, quantization: Quantization) -> Backbone:
    """A copy with smaller weights in its blocks."""
    copied = copy.deepcopy(backbone)
    quantize_weights(copied, quantization, backbone.device)
    return copied


@dataclass(frozen=True)
class Way:
    """One of our ways to paint."""

    backbone: Backbone
    compiled: bool = False
    speculation: Speculation = NO_SPECULATION

    def engine(self, slots: int) -> Engine:
        return Engine(self.backbone, slots, compiled=self.compiled, speculation=self.speculation)


class Ours:
    """Paints a few pictures per call, with an engine that is kept.

    Of the last call: `forwards` of all rows, prompts not counted; `painted`, what it finished.
    """

    def __init__(self, requests: Sequence[Request], engine: Engine) -> None:
        self.requests, self.engine = requests, engine
        self.forwards = 0
        self.painted: list[Painted] = []

    def __call__(self) -> None:
        before, self.painted = self.engine.forwards, []
        for request in self.requests:
            self.engine.submit(request)
        for events in self.engine.events():
            self.painted += [event for event in events if isinstance(event, Painted)]
        self.forwards = self.engine.forwards - before

    @property
    def images(self) -> int:
        return len(self.requests)

    @property
    def forwards_each(self) -> float:
        """Passes that a picture took part in, with the one of its prompt."""
        return 1 + sum(each.forwards for each in self.painted) / self.images

    @property
    def kept(self) -> int:
        """Codes that were foreseen."""
        return sum(each.kept for each in self.painted)

    def first_rows(self) -> float:
        """The share of one streamed picture's time after which its first row of codes is there."""
        begun = time.perf_counter()
        first = None
        self.engine.submit(replace(self.requests[0], streamed=True))
        for events in self.engine.events():
            if first is None and any(isinstance(event, RowsPainted) for event in events):
                first = time.perf_counter() - begun
        assert first is not None, "a picture of several rows tells of the first"
        return first / (time.perf_counter() - begun)


def with_pixels(pipe: Pipeline) -> dict[str, float]:
    """One picture of the empty prompt down to its pixels: by a call, and streamed row by row."""
    pipe("")
    begun = time.perf_counter()
    pipe("")
    called = time.perf_counter() - begun
    begun = time.perf_counter()
    times = [time.perf_counter() - begun for _ in pipe.stream("")]
    return {
        "called_seconds": called,
        "streamed_seconds": times[-1],
        "first_rows_seconds": times[0],
        "first_rows_share": times[0] / times[-1],
    }


def fresh_image_tokenizer(codes: int, device: torch.device) -> VQModel:
    """LlamaGen's VQ-16 in random weights (FoundationVision/LlamaGen ce98ec4, vq_model.py)."""
    config = VQConfig(codebook_size=codes, codebook_dim=8, l2_normalize=True)
    return VQModel(config).eval().to(device)


def step_bytes(backbone: Backbone, requests: Sequence[Request]) -> tuple[int, int]:
    """(weights, cache): bytes that a step of these pictures reads at the least.

    Weights: of the blocks, and of the head for the codes alone. Cache: what each row has painted,
    half of the picture on average, and its prompt.
    """
    head = sum(map(stored, backbone.head.parameters()))
    codes = len(backbone.layout.code_ids) / backbone.vocab_size
    inside = (*backbone.blocks.parameters(), *backbone.blocks.buffers())  # smaller ones are buffers
    blocks = sum(map(stored, inside))
    tokens = sum(
        request.rows
        * (len(request.prefix) + len(Steps.of(backbone.layout, request.grid).forced) / 2)
        for request in requests
    )
    return int(blocks + head * codes), int(tokens * token_bytes(backbone))


def token_bytes(backbone: Backbone) -> int:
    """Of the keys and values of one token, in all layers."""
    config = backbone.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * backbone.num_layers * heads * width * backbone.model.dtype.itemsize


def stored(weight: Tensor) -> int:
    """Bytes of a weight as it is kept, packed ones too."""
    if not is_traceable_wrapper_subclass(weight):
        return weight.nbytes
    names, _ = weight.__tensor_flatten__()
    return sum(stored(getattr(weight, name)) for name in names)


# ---- others' -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Others:
    """How somebody else paints pictures side by side, one forward pass for each code."""

    paint: Callable[[], Tensor]
    images: int
    forwards_each: float

    def __call__(self) -> Tensor:
        return self.paint()


def original(
    checkout: Path,
    name: str,
    images: int,
    sampling: Sampling,
    device: torch.device,
    dtype: torch.dtype,
) -> Others:
    """LlamaGen's own `generate`, unchanged, on its own model in random weights.

    FoundationVision/LlamaGen ce98ec4, autoregressive/sample/sample_c2i.py: its order of calls,
    without compiling, which is its default.
    """
    sys.path.insert(0, str(checkout))
    try:
        models = importlib.import_module("autoregressive.models.gpt").GPT_models
        generate = importlib.import_module("autoregressive.models.generate").generate
    finally:
        sys.path.remove(str(checkout))
    side, _ = grid_of(name)
    torch.manual_seed(0)
    model = models[f"GPT-{name}"](
        vocab_size=CODES, block_size=side**2, num_classes=1000, cls_token_num=1, model_type="c2i"
    )
    model.to(device=device, dtype=dtype).eval()
    classes_N = torch.arange(images, device=device)

    def paint() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of its choice of attention
            return generate(
                model,
                classes_N,
                side**2,
                cfg_scale=sampling.cfg,
                cfg_interval=-1,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                sample_logits=True,
            )

    return Others(paint, images, side**2)


def by_transformers(backbone: Backbone, requests: Sequence[Request]) -> Others:
    """The model's own `generate` with guidance, as many tokens as ours feeds.

    It draws from all tokens, as it knows nothing of images, but for the end, which it may not draw.

    Raises:
        ValueError: the model has none.
    """
    model: Any = backbone.model
    if not model.can_generate():
        raise ValueError(
            f"--transformers: {type(model).__name__} has no generate() of transformers' own; use "
            f"--size text, or a --model that has"
        )
    request = requests[0]
    sampling, images = request.sampling, len(requests)
    steps = Steps.of(backbone.layout, request.grid)
    empty = backbone.without_prompt(request.prefix, request.grid)

    def ids_of(prefix: Sequence[int]) -> Tensor:
        ids = [[*prefix, *steps.opening]] * images
        return torch.tensor(ids, device=backbone.device)

    ids_NT, empty_NT = ids_of(request.prefix), ids_of(empty)
    tokens = len(steps.forced)
    guidance: dict[str, Any] = {"guidance_scale": sampling.cfg}
    if model.config.model_type == "janus":
        guidance["generation_mode"] = "image"
    else:
        guidance |= {
            "negative_prompt_ids": empty_NT,
            "negative_prompt_attention_mask": torch.ones_like(empty_NT),
            "max_new_tokens": tokens,
            "min_new_tokens": tokens,
        }

    def paint() -> Tensor:
        return model.generate(
            ids_NT,
            attention_mask=torch.ones_like(ids_NT),
            do_sample=True,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            pad_token_id=backbone.layout.pad,
            **guidance,
        )

    return Others(paint, images, tokens)
