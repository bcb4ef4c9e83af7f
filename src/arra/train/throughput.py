"""How fast a run is and what memory it takes, from clocks and counters on the host: nothing here
waits for the device.

Times in which no step is computed (validation, painting, checkpoints) are taken apart, so that the
rates are those of training alone; their share of the time is `overhead`. `data_wait` is the share
of the rest in which this process had no batch.
"""

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from arra.doctor.devices import peak_tflops
from arra.models.base import Backbone

if TYPE_CHECKING:
    from arra.train.setup import Run

MEASURED = (
    *("images_per_s", "tokens_per_s", "tflops", "mfu", "overhead", "data_wait"),
    *("memory_gb", "memory_reserved_gb"),
)
"""Fields of a log line that depend on the machine and the moment: two runs that are equal may
differ in these alone."""


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations of a forward and backward pass, by what they grow with.

    A product with a matrix of P values takes 2 P operations a token forwards, 2 P for its input's
    gradient and 2 P for its own, if it trains. Attention takes 4 T d a token and layer forwards and
    twice that backwards, whole rows counted (PaLM, arXiv 2204.02311, appendix B). What is computed
    a second time (activation checkpointing), norms and projectors are not counted.

    Attributes:
        per_token: of the blocks' matrices.
        per_square: of attention, for each of a row's T x T pairs.
        per_trained: of the head, at each position that has a label.
    """

    per_token: int
    per_square: int
    per_trained: int

    @classmethod
    def of(cls, backbone: Backbone) -> "ModelFlops":
        """Of a dense model: of one with experts, all of which count, it is too much."""
        config = backbone.model.config.get_text_config()
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or backbone.hidden_size // heads
        return cls(
            per_token=_products(backbone.blocks),
            per_square=12 * backbone.num_layers * heads * head,
            per_trained=_products(backbone.head),
        )

    def total(self, tokens: float, squares: float, trained: float) -> float:
        """Of so many tokens, pairs and labels."""
        return self.per_token * tokens + self.per_square * squares + self.per_trained * trained


class Throughput:
    """Rates since the last log line.

    Args:
        first_step: optimizer steps done before this session.
    """

    def __init__(self, run: "Run", first_step: int) -> None:
        self.run, self.flops = run, ModelFlops.of(run.backbone)
        self.peak = _peak(run)
        self._at, self._step, self._apart = time.monotonic(), first_step, 0.0

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What happens inside is no training: it does not count in the rates."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._apart += time.monotonic() - begun

    def since_last(self, step: int, means: Mapping[str, float]) -> dict[str, float]:
        """Fields of the log line for `step` optimizer steps done. All processes call it.

        Args:
            means: `tokens`, `squares` and `labels` of a mean step (step.py).
        """
        run, now = self.run, time.monotonic()
        wall = max(now - self._at, 1e-9)
        seconds, steps = max(wall - self._apart, 1e-9), step - self._step
        overhead = min(1.0, self._apart / wall)
        self._at, self._step, self._apart = now, step, 0.0
        # None of them where --data.skip-steps passed over all steps since the last line.
        tokens, squares, labels = (means.get(n, 0.0) for n in ("tokens", "squares", "labels"))
        work = self.flops.total(tokens, squares, labels) * steps
        fields = {
            "images_per_s": steps * run.config.batch_size / seconds,
            "tokens_per_s": tokens * steps / seconds,
            "tflops": work / seconds / 1e12,
        }
        if self.peak is not None:
            fields["mfu"] = fields["tflops"] / (self.peak * run.world.size)
        waited, run.loader.waited = run.loader.waited, 0.0
        shares = {"overhead": overhead, "data_wait": min(1.0, waited / seconds)}
        return fields | shares | self._memory()

    def _memory(self) -> dict[str, float]:
        """In 10^9 bytes, of the process that has most: on GPUs since the last call, on a CPU since
        the process began."""
        device = self.run.world.device
        if device.type == "cuda":
            own = {
                "memory_gb": torch.cuda.max_memory_allocated(device),
                "memory_reserved_gb": torch.cuda.max_memory_reserved(device),
            }
            torch.cuda.reset_peak_memory_stats(device)
        else:
            own = {"memory_gb": peak_resident()}
        world = self.run.world
        all_of = world.sum(
            {
                f"{name} {rank}": value * (rank == world.rank)
                for name, value in own.items()
                for rank in range(world.size)
            }
        )
        return {
            name: max(all_of[f"{name} {rank}"] for rank in range(world.size)) / 1e9 for name in own
        }


def peak_resident() -> int:
    """Bytes of main memory that this process has held at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _peak(run: "Run") -> float | None:
    """10^12 operations a second of one process' device, if it is known."""
    if run.world.device.type != "cuda":
        return None
    return peak_tflops(torch.cuda.get_device_name(run.world.device), run.config.dtype)


def _products(module: nn.Module) -> int:
    """Operations a token of all of a module's matrices, forwards and backwards."""
    return sum(
        (6 if p.requires_grad else 4) * _values(p) for p in module.parameters() if p.ndim >= 2
    )


def _values(parameter: Tensor) -> int:
    """Packed 4-bit weights are two a byte."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)
