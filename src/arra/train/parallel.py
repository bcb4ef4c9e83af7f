"""How the processes of a run share one `Step`: each holds all of it (DDP), or shards of it (FSDP2).

What is computed is the same: gradients are summed over processes once per optimizer step, after
the last micro-batch, and every term is divided by its count over all of them (step.py). Both
engines would take a mean, which is right for losses that are means; they are told to add. (To scale
the loss up instead would be the same but for rounding: transformers' norms compute in float32, and
3 x / 3 is not x.)
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.export import register_dataclass
from torch.nn.parallel import DistributedDataParallel

from arra.config import EngineConfig, TrainConfig
from arra.models.adapted import Adapter
from arra.objective import Terms
from arra.train.blocks import eagerly
from arra.train.world import World

# FSDP2 looks for tensors that need gradients in what a module returns.
register_dataclass(Terms, serialized_type_name="arra.objective.Terms")


class Engine:
    """A `Step` as one of several processes runs it.

    Attributes:
        module: what is called for the terms of a micro-batch.
        narrow_blocks: blocks that are gathered in bfloat16.
    """

    def __init__(
        self, module: nn.Module, world: World, narrow_blocks: Sequence[nn.Module] = ()
    ) -> None:
        self.module, self.world, self.narrow_blocks = module, world, narrow_blocks

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of one micro-batch: gradients stay on their process
        until the step's last one."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
            self.module.set_is_last_backward(last)
            yield
        elif isinstance(self.module, DistributedDataParallel):
            with nullcontext() if last else self.module.no_sync():
                yield
        else:
            yield

    @contextmanager
    def painting(self) -> Iterator[None]:
        """Around calls of the model that do not pass through `Step`: what is sharded outside of the
        blocks is gathered, and no block is compiled. The processes must make the same calls.

        Nothing is autocast there (a key/value cache wants one type): blocks that are gathered in
        bfloat16 compute in it, all else in its own type.
        """
        if not isinstance(self.module, FSDPModule):
            with eagerly():
                yield
            return
        hooks = [
            block.register_forward_pre_hook(_narrowed, with_kwargs=True)
            for block in self.narrow_blocks
        ]
        self.module.unshard()
        try:
            with eagerly():
                yield
        finally:
            self.module.reshard()
            for hook in hooks:
                hook.remove()


def is_sharded(config: TrainConfig, world: World) -> bool:
    """Whether the processes of a run hold shards of its weights."""
    return world.size > 1 and config.engine.parallel != "ddp"


def engine_of(
    step: nn.Module,
    blocks: Sequence[nn.Module],
    objective: nn.Module,
    config: TrainConfig,
    world: World,
    used: Iterable[nn.Parameter] = (),
) -> Engine:
    """Wraps a `Step`, in place where it is sharded: collect its parameters afterwards.

    Args:
        blocks, objective: its parts that are sharded, and gathered, apart; the rest is one part.
        used: frozen parameters that a forward pass needs.

    Raises:
        ValueError: the flags do not fit one another, or the number of processes.
    """
    if not is_sharded(config, world):
        if world.size == 1:
            return Engine(step, world)
        return Engine(_replicated(step, config, world.device), world)
    _check_sharding(config)
    mesh = _mesh(config.engine, world)
    # Inputs are autocast's to cast; features are not cast at all.
    plain = MixedPrecisionPolicy(cast_forward_inputs=False)
    inner = plain
    half = config.dtype == "bfloat16" and not _needs_wide_norms(blocks, world.device)
    if half:
        # Blocks are gathered in bfloat16. What surrounds them (tables, norm, projectors) stays as
        # it is, and with it the residual stream, as on one device.
        inner = replace(plain, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=inner)
    if any(True for _ in objective.parameters()):
        # A part has weights of one type: those of a model that trains in bfloat16 are of another.
        fully_shard(objective, mesh=mesh, mp_policy=plain)
    # Without an adapter what is frozen is what training does not use, as an image encoder: it stays
    # whole, and is not gathered in each step.
    unused = set() if config.lora.rank else {p for p in step.parameters() if not p.requires_grad}
    unused -= set(used)
    fully_shard(step, mesh=mesh, mp_policy=plain, ignored_params=unused)
    for module in step.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other, NCCL needs no other
    return Engine(step, world, list(blocks) if half else ())


def _narrowed(block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The hidden states in bfloat16, and the angles that transformers hands on by name, a pair. A
    mask stays as it is: the lowest float32 would become -inf, and a row of it NaN."""
    named = {n: _narrow(v) if isinstance(v, tuple) else v for n, v in kwargs.items()}
    return (*map(_narrow, args[:1]), *args[1:]), named


def _narrow(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_narrow(part) for part in value)
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.bfloat16() if floats else value


def _needs_wide_norms(blocks: Sequence[nn.Module], device: torch.device) -> bool:
    """Whether a block has a layer norm, and no autocast widens it: a CPU's takes no bfloat16 weight
    beside a float32 input."""
    modules = (module for block in blocks for module in block.modules())
    return device.type == "cpu" and any(isinstance(m, nn.LayerNorm) for m in modules)


def _replicated(
    step: nn.Module, config: TrainConfig, device: torch.device
) -> DistributedDataParallel:
    # A schedule that ends the alignment leaves projectors without a gradient.
    late = config.align.schedule in ("stop", "cosine") and config.align.until < 1
    with warnings.catch_warnings():
        # torch 2.13 has another name for `broadcast_buffers`, which 2.11 does not know.
        warnings.simplefilter("ignore", FutureWarning)
        replicated = DistributedDataParallel(
            step,
            None if device.type == "cpu" else [device],
            broadcast_buffers=False,
            find_unused_parameters=late,
        )
    replicated.register_comm_hook(None, _added)
    return replicated


def _added(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's reduction of some gradients: their sum."""
    done = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return done.then(lambda future: future.value()[0])


def _check_sharding(config: TrainConfig) -> None:
    if config.lora.quantize != "none":
        raise ValueError(
            "--lora.quantize: 4-bit weights cannot be sharded: use --engine.parallel ddp"
        )
    if config.optim.bits == 8:
        raise ValueError(
            "--optim.bits 8: bitsandbytes' states cannot be sharded: use --engine.parallel ddp, or "
            "--optim.bits 32, whose states are sharded over the processes"
        )


def _mesh(config: EngineConfig, world: World) -> DeviceMesh:
    kind = world.device.type
    if config.parallel != "hybrid":
        return init_device_mesh(kind, (world.size,))
    shard = config.shard_ranks or world.local_size
    if world.size % shard:
        raise ValueError(
            f"--engine.shard-ranks {shard} does not divide the {world.size} processes of the run"
        )
    shape = (world.size // shard, shard)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def after_wrapping(adapter: Adapter, before: dict[int, str], model: nn.Module) -> Adapter:
    """The adapter with the parameters that sharding put in place of its own.

    Args:
        before: id -> name of the model's parameters before it was wrapped.
    """
    now = dict(model.named_parameters())
    return replace(adapter, tensors={n: now[before[id(t)]] for n, t in adapter.tensors.items()})
