"""Counts the bytes of living tensors, and their matrix products, while code runs.

The code may run on tensors without memory (`FakeTensorMode`): a 7B training step then takes seconds
on a laptop. What is counted are storages, each once, from the operator that made one until the last
reference to it is gone, autograd's own included. Scratch inside a kernel is not seen.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *a: Any, **k: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""The fused CPU kernels, which PyTorch's own registry leaves out."""


class LiveBytes(TorchDispatchMode):
    """Within this context every operator's results are counted.

    Attributes:
        live: bytes of storages that exist now.
        peak: the most that `live` has been since `restart`.
        peak_phase: what `phase` was then; the user of this class sets `phase`.
        peak_gradients: what `gradients` was then.
        gradients: bytes of the parameters' gradients; see `watch`.
        flops: phase -> floating-point operations of matrix products, 2 per multiply-add.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.gradients = self.peak_gradients = 0
        self.phase = self.peak_phase = ""
        self.flops: Counter[str] = Counter()
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._gradients: dict[int, weakref.ref[Any]] = {}
        self._marked = self._highest = 0

    def restart(self) -> None:
        """Forgets the peak and the products, not what lives."""
        self.peak, self.peak_gradients, self.peak_phase = self.live, self.gradients, self.phase
        self.flops.clear()

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Counts tensors that were made before; returns the bytes that this added."""
        before = self.live
        for tensor in tensors:
            self._add(tensor)
        return self.live - before

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Follows the gradients of these from now on; to be called once."""
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._gradients:  # it comes by again with every further micro-batch
            return

        def gone(_: Any) -> None:
            self.gradients -= size
            del self._gradients[key]

        self._gradients[key] = weakref.ref(storage, gone)
        self.gradients += size

    def mark(self) -> None:
        """Starts the measurement that `since_mark` reads."""
        self._marked = self._highest = self.live

    def since_mark(self) -> int:
        """The most that `live` has risen above what it was at the mark."""
        return self._highest - self._marked

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._storages:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, gone)
        self.live += size
        self._highest = max(self._highest, self.live)
        if self.live > self.peak:
            self.peak, self.peak_gradients, self.peak_phase = self.live, self.gradients, self.phase

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in CPU_ATTENTION:
            self.flops[self.phase] += CPU_ATTENTION[packet](*args, **kwargs)
        elif packet in flop_registry:
            count: Any = flop_registry[packet]
            self.flops[self.phase] += count(*args, **kwargs, out_val=out)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return out
