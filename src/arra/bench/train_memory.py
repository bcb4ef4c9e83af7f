"""What a training step keeps in memory, by account: it does not depend on an allocator."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from arra.train.setup import Run


@dataclass(frozen=True)
class StepMemory:
    """Bytes.

    Attributes:
        weights: of the model and the projectors.
        gradients: of what trains, whole.
        optimizer: its states.
        saved: what autograd kept for the backward pass at the most, storages counted once and
            without the weights themselves.
    """

    weights: int
    gradients: int
    optimizer: int
    saved: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def step_memory(run: Run, one_step: Callable[[], object]) -> StepMemory:
    """Memory of a run whose optimizer has its states; does one more step."""
    parameters = list(run.step.parameters())
    trained = [p for p in parameters if p.requires_grad]
    states = run.state.optimizer.state.values()
    return StepMemory(
        weights=_bytes(parameters),
        gradients=_bytes(trained),
        optimizer=_bytes(v for state in states for v in state.values() if torch.is_tensor(v)),
        saved=saved_tensors(one_step, parameters),
    )


def saved_tensors(work: Callable[[], object], apart: Iterable[Tensor]) -> int:
    """The most bytes that autograd kept at a time during `work`, without those of `apart`."""
    book = _Book({tensor.untyped_storage().data_ptr() for tensor in apart})
    with torch.autograd.graph.saved_tensors_hooks(lambda t: _Saved(t, book), lambda s: s.tensor):
        work()
    return book.most


class _Book:
    def __init__(self, apart: set[int]) -> None:
        self.apart, self.held, self.now, self.most = apart, Counter[int](), 0, 0

    def add(self, place: int, size: int) -> None:
        self.held[place] += 1
        if self.held[place] == 1 and place not in self.apart:
            self.now += size
            self.most = max(self.most, self.now)

    def remove(self, place: int, size: int) -> None:
        self.held[place] -= 1
        if self.held[place] == 0 and place not in self.apart:
            self.now -= size


class _Saved:
    """A tensor for as long as autograd holds it."""

    def __init__(self, tensor: Tensor, book: _Book) -> None:
        self.tensor, self.book = tensor, book
        storage = tensor.untyped_storage()
        self.place, self.size = storage.data_ptr(), storage.nbytes()
        book.add(self.place, self.size)

    def __del__(self) -> None:
        self.book.remove(self.place, self.size)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
