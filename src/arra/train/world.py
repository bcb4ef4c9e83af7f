"""The processes of one run: who this is, and the few things that all of them agree on.

`torchrun` starts the processes and says by environment variables how many there are; without it
there is one, and nothing here does anything. Tensors travel by the device's own backend (NCCL on
GPUs); what steers the run (counts, stop signs, messages) by gloo on the CPU, so that agreeing never
waits for a GPU.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

Value = TypeVar("Value")
LETTING_GO = 0.2
"""Seconds before a group of processes is ended: without them one end in ten hung on a busy CPU."""
HEARING = 3.0
"""Seconds in which a process that ends with a mistake waits to hear of the same on process 0."""
SAID = "process 0 says so"
"""Note on a mistake (PEP 678) that need not be told once more."""


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: of this process, from 0; process 0 is the one that writes and prints.
        size: how many there are.
        local_rank, local_size: the same, on this machine.
        device: what this process computes on.
        group: whose messages are whose; None = the one that all share.
        machine, heads: of several machines, the processes of this one, and the first of each.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: dist.ProcessGroup | None = None
    machine: dist.ProcessGroup | None = None
    heads: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            self.sum({})

    def sum(self, numbers: Mapping[str, int]) -> dict[str, int]:
        """Each number added over all processes; the names must be the same on each.

        Once a step: over several machines it is added within each, and then between them, for one
        ring around N processes takes 2 (N - 1) steps (docs/scaling.md).
        """
        if self.size == 1:
            return dict(numbers)
        total = torch.tensor([*numbers.values(), 1])
        if self.machine is None:
            dist.all_reduce(total, group=self.group)
        else:
            dist.reduce(total, group=self.machine, group_dst=0)
            if self.local_rank == 0:
                dist.all_reduce(total, group=self.heads)
            dist.broadcast(total, group=self.machine, group_src=0)
        return dict(zip(numbers, total.tolist(), strict=False))

    def total(self, numbers: Tensor) -> Tensor:
        """A CPU tensor added over all processes."""
        if self.size > 1:
            numbers = numbers.clone()
            dist.all_reduce(numbers, group=self.group)
        return numbers

    def apart(self) -> "World":
        """The same processes with messages of their own, for a thread beside the main one."""
        if self.size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo"), machine=None, heads=None)

    def by_machine(self) -> "World":
        """The same processes, who add up by machine from now on, if these have equally many."""
        if self.size == 1:
            return self
        alike = self.rank % self.local_size == self.local_rank
        sizes = set(self.on_all(lambda: self.local_size if alike else 0))
        if 0 in sizes or len(sizes) > 1 or self.local_size in (1, self.size):
            return self
        machine, _ = dist.new_subgroups(self.local_size, backend="gloo")
        heads = dist.new_group(range(0, self.size, self.local_size), backend="gloo")
        return replace(self, machine=machine, heads=heads)

    def on_main(self, act: Callable[[], Value]) -> Value:
        """What `act` gives on process 0, on all of them; so is a mistake that it names.

        Raises:
            ValueError, OSError: raised by `act`, here and on every other process.
        """
        if self.size == 1:
            return act()
        heard = [_tried(act) if self.is_main else None]
        dist.broadcast_object_list(heard, src=0, group=self.group, device=torch.device("cpu"))
        return _told(heard)[0]

    def on_all(self, act: Callable[[], Value]) -> list[Value]:
        """What `act` gives on each process, in their order, on all of them; so is a mistake.

        Raises:
            ValueError, OSError: raised by `act` on one of them.
        """
        if self.size == 1:
            return [act()]
        heard: list[Value | Exception | None] = [None] * self.size
        dist.all_gather_object(heard, _tried(act), group=self.group)
        return _told(heard)


def _tried(act: Callable[[], Value]) -> Value | Exception:
    try:
        return act()
    except (ValueError, OSError) as error:
        return error


def _told(answers: list[Any]) -> list[Any]:
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


def _is_said(mistake: str, store: dist.Store, rank: int) -> bool:
    """Whether process 0 ends with the same mistake, and so tells it for all.

    Asked of the store where the processes met: whoever made no mistake waits for something else.
    """
    try:
        if rank == 0:
            store.set("mistake", mistake)
            return False
        store.wait(["mistake"], timedelta(seconds=HEARING))
        return store.get("mistake") == mistake.encode()
    except dist.DistError:  # it has made none, or the store went with it
        return False


@contextmanager
def open_world(device: str) -> Iterator[World]:
    """Joins the processes that torchrun started; one that was started alone is a world of one.

    Args:
        device: "cpu", or "cuda": each process takes the GPU of its local rank.

    A mistake that ends this process as it ends process 0 is raised on with the note `SAID`.
    """
    if "LOCAL_RANK" not in os.environ:
        yield World(torch.device(device))
        return
    local = int(os.environ["LOCAL_RANK"])
    place = torch.device(device)
    backend = "gloo"
    if place.type == "cuda":
        place, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(place)
    store, rank, size = next(rendezvous("env://"))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        local_size = int(os.environ["LOCAL_WORLD_SIZE"])
        yield World(place, rank, size, local, local_size).by_machine()
    except (ValueError, OSError, FloatingPointError) as error:
        if _is_said(str(error), store, rank):
            error.add_note(SAID)
        raise
    finally:
        # gloo's threads let go of the last tensors a moment after these have arrived, and need the
        # interpreter's lock for it; what ends a group waits for its threads and holds that lock.
        time.sleep(LETTING_GO)
        dist.destroy_process_group()
