"""One optimizer step of a planned run, carried out on tensors without memory.

It is the training loop's own step (`train/loop.py:optimizer_step`) on what the training's own
`assemble` puts together, so a flag that changes what trains changes the plan. Counted is what
lives; nothing is computed by formula but the two stand-ins (`stand_ins.py`).

Legend: B rows, T tokens.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arra.config import TrainConfig
from arra.data.shards import Dataset
from arra.doctor.live import LiveBytes
from arra.doctor.made_up import USUAL_GRID, Material, Repeated, tensors_of, with_tensors
from arra.doctor.memoryless import faker, without_memory
from arra.doctor.stand_ins import EightBitAdamW, quantise_blocks
from arra.generate.engine import COLUMN_STEP
from arra.generate.lane import PREFILL_ROWS, PROMPT_STEP
from arra.generate.settings import DEFAULT_SLOTS
from arra.models.adapted import Adapter, put_on
from arra.models.base import Backbone, Grid
from arra.models.outline import outline_for_training
from arra.train.adapters import peft_config
from arra.train.setup import Run, assemble
from arra.train.step import optimizer_step
from arra.train.tally import Tally
from arra.train.world import World

MICROS = 2
"""Micro-batches that are carried out at most: from the second on, each peak is the same."""


@dataclass(frozen=True)
class Parts:
    """Parameters by group, counted once each; `trained` of them have gradients."""

    tables: int
    blocks: int
    head: int
    rest: int
    projectors: int
    trained: int

    @property
    def total(self) -> int:
        return self.tables + self.blocks + self.head + self.rest + self.projectors


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, at the highest moment of an optimizer step.

    Attributes:
        weights: parameters and buffers, those of the projectors too.
        optimizer: AdamW's states.
        average: the averaged weights (--optim.ema).
        batch: codes, positions and features of all micro-batches of a step.
        gradients: those that exist at the peak.
        all_gradients: those that the backward pass leaves.
        activations: all else at the peak: what blocks keep for the backward pass, what the loss
            holds, and scratch.
        peak: their sum.
        peak_phase: what was going on: forward, loss, backward or optimizer.
        kept_by_blocks: what lives after the forward pass through the blocks, for the backward.
        loss_scratch: the most that the loss adds to it: the logits of one chunk, and the head's
            gradients.
    """

    weights: int
    optimizer: int
    average: int
    batch: int
    gradients: int
    all_gradients: int
    activations: int
    peak: int
    peak_phase: str
    kept_by_blocks: int
    loss_scratch: int


@dataclass(frozen=True)
class Painting:
    """Bytes while pictures are painted, and what the cache has of it."""

    images: int
    rows: int
    columns: int
    cache: int
    peak: int


@dataclass(frozen=True)
class Rehearsal:
    """What one device does in an optimizer step.

    Attributes:
        flops: floating-point operations of all matrix products, recomputation included.
        tokens: positions per optimizer step, padding included.
        row_tokens: length of a row.
        weight_dtype: of the model; that of most of its parameters.
        grid, codes: of an image; of the image tokenizer.
    """

    parts: Parts
    memory: Memory
    painting: Painting | None
    flops: int
    tokens: int
    row_tokens: int
    weight_dtype: str
    grid: Grid
    codes: int


def rehearse(
    config: TrainConfig, micro: int, accumulate: int, material: Material, *, paint: bool = True
) -> Rehearsal:
    """Carries out one optimizer step and one painting of a run; seconds, for any size of model.

    Args:
        micro: images per forward pass on one device.
        accumulate: forward passes per optimizer step on one device.
        material: whose longest sample fills every row.
        paint: False = leave painting out.

    Raises:
        ValueError: parts do not fit one another, as in training; or the model cannot run without
            values.
    """
    done = min(accumulate, MICROS)
    data = dataclasses.replace(config.data, prompt_dropout=0.0)
    optim = dataclasses.replace(config.optim, bits=32)
    # A compiler needs values; what it fuses away is memory that the plan has too much.
    engine = dataclasses.replace(config.engine, compile=False)
    planned = dataclasses.replace(
        config, batch_size=micro * done, micro_batch=micro, data=data, optim=optim, engine=engine
    )
    live = LiveBytes()
    try:
        with without_memory() as fake:
            backbone, adapter = outlined(config, material)
            aligned = list(config.align.targets) or ["assumed"]
            sample = material.sample(backbone, aligned if config.align.weight else [])
            alone = World(torch.device("cpu"))
            run = assemble(planned, Path("."), alone, backbone, sample, None, "", adapter)
        if config.optim.bits == 8:
            run.state.optimizer = EightBitAdamW(run.state.optimizer.param_groups)
        _longest_passages(run)
        _contrasted_with_itself(run)
        micros = with_tensors(run.loader.step(0), faker(fake))
        run.loader = Repeated(micros)
        with without_memory(fake), live:
            memory, flops = _steps(run, live, accumulate)
            painting = _painting(run, live, sample) if paint else None
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        name = config.model_path or config.model.architecture
        raise ValueError(
            f"{name} cannot run on tensors without values, so it cannot be planned ({reason})"
        ) from None
    rows = micros[0].batch.ids_BT.shape
    return Rehearsal(
        parts=_count(run),
        memory=memory,
        painting=painting,
        flops=flops * accumulate // done,
        tokens=rows.numel() * accumulate,
        row_tokens=rows[1],
        weight_dtype=str(backbone.model.dtype).removeprefix("torch."),
        grid=_grid(sample),
        codes=len(backbone.layout.code_ids),
    )


def outlined(config: TrainConfig, material: Material) -> tuple[Backbone, Adapter | None]:
    """The run's backbone, with its adapter if it has one; where tensors have no memory."""
    backbone = outline_for_training(
        config.model_path,
        config.model,
        codebook_size=material.codebook_size,
        captions=material.captions,
        grid=material.grid or USUAL_GRID,
        class_names=material.class_names,
        text_width=max((t.dim for t in material.text_features), default=0),
        text_slots=max((t.length for t in material.text_features), default=0),
    )
    if not config.lora.rank:
        return backbone, None
    if config.lora.quantize == "4bit":
        quantise_blocks(backbone, torch.bfloat16 if config.dtype == "bfloat16" else torch.float32)
    return put_on(backbone, peft_config(backbone, config.lora), config.seed)


def _steps(run: Run, live: LiveBytes, accumulate: int) -> tuple[Memory, int]:
    """A step of a run that is under way: the optimizer has its states."""
    model, objective = run.step.model, run.step.objective
    micros = run.loader.step(0)
    weights = live.hold([*model.parameters(), *model.buffers()])
    weights += live.hold([*objective.parameters(), *objective.buffers(), *run.step.frozen])
    average = live.hold(run.state.average.weights.values()) if run.state.average else 0
    one = live.hold(tensors_of(micros))
    batch = one * accumulate // len(micros)
    optimizer = _make_states(run.state.optimizer)
    live.watch([*model.parameters(), *objective.parameters()])
    marks = _Marks(run, live)
    live.restart()
    with marks:
        optimizer_step(run, 0, Tally(run.world))
    gradients = live.peak_gradients
    held = weights + average + one + optimizer
    memory = Memory(
        weights=weights,
        optimizer=optimizer,
        average=average,
        batch=batch,
        gradients=gradients,
        all_gradients=marks.gradients,
        activations=live.peak - held - gradients,
        peak=live.peak - one + batch,
        peak_phase=live.peak_phase,
        kept_by_blocks=marks.kept,
        loss_scratch=marks.loss,
    )
    return memory, live.flops.total()


def _make_states(optimizer: torch.optim.Optimizer) -> int:
    """Lets the optimizer make its states; their bytes."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    states = [t for values in optimizer.state.values() for t in values.values()]
    return sum(_bytes_of(states))


class _Marks:
    """Tells a `LiveBytes` what is going on, and measures between the marks."""

    def __init__(self, run: Run, live: LiveBytes) -> None:
        self.run, self.live = run, live
        self.kept = self.loss = self.gradients = self._before = 0

    def __enter__(self) -> None:
        step = self.run.step
        self._handles: list[Any] = [
            step.register_forward_pre_hook(self._forward),
            step.objective.register_forward_pre_hook(self._loss),
            step.register_forward_hook(self._backward),
            self.run.state.optimizer.register_step_pre_hook(self._optimizer),
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.live.phase = ""

    def _forward(self, *_: Any) -> None:
        self.live.phase, self._before = "forward", self.live.live

    def _loss(self, *_: Any) -> None:
        self.live.phase = "loss"
        self.kept = self.live.live - self._before
        self.live.mark()

    def _backward(self, *_: Any) -> None:
        self.live.phase = "backward"
        self.loss = self.live.since_mark()

    def _optimizer(self, *_: Any) -> None:
        self.live.phase = "optimizer"
        self.gradients = self.live.gradients


@torch.no_grad()
def _painting(run: Run, live: LiveBytes, sample: Dataset) -> Painting:
    """One forward pass over prompts and one step behind it, as `generate/lane.py` does them,
    beside the weights alone."""
    backbone = run.backbone
    grid = _grid(sample)
    guided = float(backbone.sampling["cfg"]) != 1
    rows = DEFAULT_SLOTS
    prompt = len(backbone.condition(sample.texts[0], grid)) + backbone.text_slots
    width = -(-prompt // PROMPT_STEP) * PROMPT_STEP
    columns = -(-(prompt + backbone.layout.image_length(*grid)) // COLUMN_STEP) * COLUMN_STEP
    backbone.model.eval()
    before = live.live
    cache = backbone.new_cache(rows, columns)
    begun = min(rows, PREFILL_ROWS)
    ids_BT = torch.zeros(begun, width, dtype=torch.long)
    live.restart()
    backbone.prefill(ids_BT, cache, torch.arange(begun))
    kept = live.live - before
    ids_R1 = torch.zeros(rows, 1, dtype=torch.long)
    with backbone.decoding():
        backbone.head(backbone.step(ids_R1, ids_R1, cache)[:, -1])
    weights = sum(_bytes_of([*backbone.model.parameters(), *backbone.model.buffers()]))
    del cache
    images = rows // 2 if guided else rows
    return Painting(images, rows, columns, kept, weights + live.peak - before)


def _grid(sample: Dataset) -> Grid:
    return int(sample.grids[0][0]), int(sample.grids[0][1])


def _bytes_of(tensors: Iterable[Tensor]) -> Iterable[int]:
    return {id(t): t.untyped_storage().nbytes() for t in tensors}.values()


def _count(run: Run) -> Parts:
    """Parameters by group; a table that serves twice counts as the first."""
    model, seen = run.step.model, set[int]()

    def new(module: nn.Module) -> int:
        fresh = {id(p): p for p in module.parameters() if id(p) not in seen}
        seen.update(fresh)
        return sum(_values(p) for p in fresh.values())

    tables = sum(new(m) for m in model.modules() if isinstance(m, nn.Embedding))
    blocks = new(run.backbone.blocks)
    head = new(run.backbone.head)
    rest, projectors = new(model), new(run.step.objective)
    trained = sum(p.numel() for p in run.step.parameters() if p.requires_grad)
    return Parts(tables, blocks, head, rest, projectors, trained)


def _values(parameter: Tensor) -> int:
    """Packed 4-bit weights are two a byte."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def _contrasted_with_itself(run: Run) -> None:
    """There is one sample: its prompt stands for another's, as long as the longest."""
    run.loader.others_of = lambda samples: [row for (row,) in samples]  # type: ignore[method-assign]


def _longest_passages(run: Run) -> None:
    """Rows of plain text are drawn from a file: plan with its longest."""
    loader = run.loader
    if loader.passages:
        longest = max(loader.passages, key=len)
        loader.passages = [longest]
