"""A step of fixed shape without Python in between: compiled, and on a GPU one recorded graph."""

from collections.abc import Callable

import torch

WARM_UP = 2
"""Calls before a graph is recorded: libraries then have what they allocate at first use."""


class Step:
    """Calls `run`, which reads and writes tensors at fixed places and returns nothing.

    Args:
        compiled: call `torch.compile`'s version of it; on a GPU its kernels are recorded once as a
            CUDA graph, which launches them together from then on.
    """

    def __init__(
        self, run: Callable[[], None], device: torch.device, *, compiled: bool = False
    ) -> None:
        self._run = torch.compile(run, dynamic=False) if compiled else run
        self._records = compiled and device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        if not self._records or self._calls < WARM_UP:
            self._calls += 1
            self._run()
            return
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):  # recorded, not run
            self._run()
        self._graph.replay()
