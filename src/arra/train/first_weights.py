"""The first weights of a model that is sharded: process 0 opens it, and each process gets its part.

Process 0 opens or makes the model as a run of one process does, and writes all that it is but its
weights into the run's folder. From there every process, 0 too, builds it on torch's `meta` device,
where tensors have no memory, and shards it. Then the weights come from process 0, one tensor at a
time, cut on arrival. So no other process ever holds more than its shards and one tensor, and files
are read once, whatever the number of processes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from arra.config import TrainConfig
from arra.models.adapted import put_on
from arra.models.loading import read_skeleton
from arra.train.adapters import Opened, peft_config
from arra.train.world import World


@dataclass
class FirstWeights:
    """What process 0 has for all, and the others do not.

    Attributes:
        held: name -> tensor of what is to be filled, in the type that it is stored in; nothing on
            other processes.
    """

    world: World
    held: dict[str, Tensor] = field(default_factory=dict)

    def take(self, part: str, module: nn.Module) -> None:
        """Holds the tensors of a module, which may then lose them; `part` is its later name."""
        if self.world.is_main:
            self.held |= {f"{part}.{name}": tensor for name, tensor in tensors_of(module)}

    def take_again(self, part: str, copy: str) -> None:
        """Holds what it has of a part for a second one as well, which is a copy of it."""
        again = {n: t for n, t in self.held.items() if n.startswith(f"{part}.")}
        self.held |= {f"{copy}{name.removeprefix(part)}": t for name, t in again.items()}

    @torch.no_grad()
    def fill(self, step: nn.Module) -> None:
        """Gives a sharded module its values; all processes must call this, and only once.

        Args:
            step: its tensors have memory by now, with anything in it.
        """
        for name, target in tensors_of(step):
            whole = torch.empty(target.shape, dtype=target.dtype, device=self.world.device)
            if self.world.is_main:
                whole.copy_(self.held.pop(name))
            if isinstance(target, DTensor):
                target.to_local().copy_(_part(whole, target))
            else:
                dist.broadcast(whole, src=0)
                target.copy_(whole)


def open_on_main(
    config: TrainConfig,
    run: Path,
    world: World,
    load: Callable[[], Opened],
    describe: Callable[[Opened], None],
) -> tuple[Opened, FirstWeights]:
    """What trains, on every process without memory, and its weights on process 0.

    Args:
        load: opens it on process 0, weights in the type that they are stored in.
        describe: writes all of it but its weights into `run`.

    Raises:
        ValueError, OSError: as `load` and `describe` do, on all processes.
    """
    first, widened = FirstWeights(world), config.model.dtype == "float32"

    def opened() -> dict[str, torch.dtype]:
        found = load()
        model = found.backbone.model
        if widened:
            model.config.dtype = torch.float32
        describe(found)
        first.take("model", model)
        wide = {n for n, p in model.named_parameters() if p.is_floating_point()} if widened else ()
        return {n: torch.float32 if n in wide else t.dtype for n, t in tensors_of(model)}

    types = world.on_main(opened)
    outlined = outline(config, run)
    tensors = dict(tensors_of(outlined.backbone.model))
    assert types.keys() == tensors.keys(), "the outline is of another model"
    for name, tensor in tensors.items():
        tensor.data = tensor.data.to(types[name])
    return outlined, first


def outline(config: TrainConfig, run: Path) -> Opened:
    """What the run in `run` trains, on the `meta` device."""
    family, tokenizer, layout, record = read_skeleton(run)
    with torch.device("meta"):
        backbone = family.assemble(family.empty_model(run / "model"), tokenizer, layout)
        backbone.set_attention(config.model.attention)
        if not config.lora.rank:
            return Opened(backbone)
        settings = peft_config(backbone, config.lora)
        return Opened(*put_on(backbone, settings, config.seed), record)


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All that a model computes with: its buffers too, those that are never saved among them."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _part(whole: Tensor, target: DTensor) -> Tensor:
    """This process's shard of what process 0 has in `whole`; the others' is not read."""
    mesh = target.device_mesh
    sharded = mesh if mesh.ndim == 1 else mesh["shard"]
    part = distribute_tensor(whole, sharded, target.placements[-1:]).to_local()
    if mesh.ndim > 1:  # only those that share a copy of the weights with process 0 have it by now
        dist.broadcast(part, group=mesh.get_group("replicate"), group_src=0)
    return part
