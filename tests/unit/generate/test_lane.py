"""One decode step: it asks nothing of the host, and may be compiled.

Legend: h and w codes per side.
"""

import pytest
import torch
from grown_painter import GRID, grown
from torch.utils._python_dispatch import TorchDispatchMode

from arra.generate.engine import Engine
from arra.generate.lane import Lane
from arra.generate.request import Request
from arra.generate.settings import Sampling
from arra.models.base import Backbone

READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select", "unique")
"""What needs a value, or a shape that follows from one, on the host."""


class _NoReads(TorchDispatchMode):
    """Refuses what would make the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert name not in READS, f"{name} reads a value of the device"
        if "index" in name:  # a mask as an index has a size that only the device knows
            for index in [each for arg in args if isinstance(arg, list) for each in arg]:
                assert index is None or index.dtype != torch.bool, "a mask stands as an index"
        return func(*args, **(kwargs or {}))


def requests(backbone: Backbone) -> list[Request]:
    kinds = [Sampling(cfg=2.0, top_k=5), Sampling(cfg=1.0), Sampling(cfg=3.0, temperature=0.0)]
    prefix = tuple(backbone.condition("a circle", GRID))
    return [Request(prefix, i, GRID, each) for i, each in enumerate(kinds)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_a_step_reads_nothing_from_the_device(architecture: str) -> None:
    extra = {"head_dim": 16, "sliding_window": 10} if architecture == "gemma2" else {}
    backbone = grown(architecture, **extra)
    lane = Lane(backbone, rows=5, columns=64)
    with torch.inference_mode(), backbone.decoding():
        lane.admit(enumerate(requests(backbone)))
        with _NoReads():
            for _ in range(3):
                assert lane.advance() == []


def test_what_would_read_is_noticed() -> None:
    some = torch.rand(4)
    with pytest.raises(AssertionError, match="reads a value"), _NoReads():
        float(some.sum())
    with pytest.raises(AssertionError, match="a mask stands"), _NoReads():
        some[some > 0.5]


@pytest.mark.long
def test_a_compiled_step_paints_the_same() -> None:
    """In float64, where rounding decides nothing; a picture does not depend on its neighbours."""
    backbone = grown("llama")
    backbone.model.double()
    wanted = requests(backbone)
    plain = Engine(backbone, slots=5).paint(wanted)
    engine = Engine(backbone, slots=5, compiled=True)
    assert all(map(torch.equal, engine.paint(wanted), plain))
    assert torch.equal(engine.paint(wanted[1:2])[0], plain[1])


@pytest.mark.gpu
def test_a_recorded_step_paints_the_same() -> None:
    """On a GPU a compiled step is replayed as one graph; pictures come and go beside each other."""
    backbone = grown("llama")
    backbone.model.double()
    backbone.to("cuda")
    wanted = requests(backbone) * 4
    plain = Engine(backbone, slots=5).paint(wanted)
    assert all(map(torch.equal, Engine(backbone, slots=5, compiled=True).paint(wanted), plain))
