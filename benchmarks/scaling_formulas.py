"""The formulas of docs/scaling.md, with what they count on: what was measured stands under MEASURED
(scaling_measured.py does it again), what was assumed under ASSUMED, each with its source.

Legend: P parameters, N GPUs, M nodes, B images a step, A micro-batches a step, T tokens an image,
L blocks, d width, m width of the feed-forward layers, D of a feature, r of an adapter.
"""

import math
from dataclasses import dataclass, replace

KB, MB, GB, TB = 1e3, 1e6, 1e9, 1e12
GPUS_PER_NODE = 8
WORLDS = (8, 64, 256, 1024)

# By scaling_measured.py on two busy cores of a virtual machine, torch 2.13, pyarrow 26. Codes and
# features are random, which no real ones compress worse than.
MEASURED = {
    "image bytes": 1988.4,  # shards of 1,024 rows: 256 codes of 16,384, one feature of 768, a label
    "large image bytes": 3650.6,  # 1,024 codes of 8,192, one feature of 768, a caption of 40 words
    "manifest bytes": 167.9,  # of one shard, in a manifest of 976,563
    "manifest seconds": 11.7e-6,  # to parse and verify that
    "sum of 2": 0.33e-3,  # gloo all_reduce of six int64, median, loopback
    "sum of 4": 4.3e-3,  # the same with four processes, two to a core
}

ASSUMED = {
    "flops": 989e12,  # H100 SXM data sheet, dense bfloat16
    "nvlink": 450 * GB,  # bytes/s that a GPU sends: H100 data sheet, 900 GB/s both ways
    "link efficiency": 0.8,  # what collectives get of a link
    "hop": 2e-6,  # seconds of one step of a ring of GPUs, NVLink and network mixed
    "tcp hop": 50e-6,  # seconds of one step of gloo's ring between hosts
    "to host": 20 * GB,  # bytes/s from a GPU to pinned memory (PCIe 5 x16 has 64 GB/s)
    "node write": 2 * GB,  # bytes/s that a node writes to shared storage
    "store write": 50 * GB,  # bytes/s that the storage takes from all nodes
    # 419 unexpected interruptions in 54 days of 16,384 GPUs: arXiv 2407.21783, section 3.3.4
    "hours between failures of a GPU": 54 * 24 * 16_384 / 419,
}
NETWORKS = {"8 x 400 Gb/s": 400 * GB, "1 x 100 Gb/s": 12.5 * GB}
"""Name -> bytes/s that a node of 8 GPUs sends."""


@dataclass(frozen=True)
class Painter:
    """A model, its images and the batch it is planned with; `lora` is the adapter's rank."""

    name: str
    blocks: int
    width: int
    mlp: int
    vocabulary: int
    classes: int
    tokens: int
    batch: int
    mfu: float
    feature: int = 768
    lora: int = 0
    codes: int = 0

    @property
    def in_blocks(self) -> int:
        """4 d^2 of attention, 3 d m of the gated feed-forward layer, 2 norms."""
        d, m = self.width, self.mlp
        return self.blocks * (4 * d * d + 3 * d * m + 2 * d)

    @property
    def outside(self) -> int:
        """Token table, head, class table, last norm."""
        return self.width * (2 * self.vocabulary + self.classes + 1)

    @property
    def projector(self) -> int:
        """Linear(d, D), GELU, Linear(D, D), with biases."""
        D = self.feature
        return self.width * D + D * D + 2 * D

    @property
    def parameters(self) -> int:
        return self.in_blocks + self.outside

    @property
    def trained(self) -> int:
        """All; of an adapter: r (in + out) for every linear layer, and the rows of the codes."""
        if not self.lora:
            return self.parameters
        d, m = self.width, self.mlp
        layers = self.blocks * self.lora * (4 * 2 * d + 3 * (d + m))
        return layers + 2 * self.codes * d

    @property
    def flops(self) -> float:
        """Of one image, forward and backward: 6 per matrix parameter and token (4 where weights are
        frozen), 12 L d T^2 for attention; nothing for what is computed twice."""
        T = self.tokens
        matrices = self.in_blocks + self.width * self.vocabulary
        attention = 12 * self.blocks * self.width * T * T
        if self.lora:
            return 4 * matrices * T + 6 * self.trained * T + attention
        return 6 * (matrices + self.projector) * T + attention

    def compute(self, gpus: int) -> float:
        """Seconds a step on each of `gpus`."""
        return self.batch / gpus * self.flops / (ASSUMED["flops"] * self.mfu)


LLAMAGEN = [
    Painter("B 111M", 12, 768, 2048, 16_384, 1001, 256, 4096, 0.45),
    Painter("L 343M", 24, 1024, 2816, 16_384, 1001, 256, 4096, 0.45),
    Painter("XL 775M", 36, 1280, 3584, 16_384, 1001, 256, 4096, 0.45),
    Painter("3B", 24, 3200, 8704, 16_384, 1001, 256, 4096, 0.45),
]
SEVEN = Painter("7B", 32, 4096, 11_008, 65_536, 0, 1024 + 64, 1024, 0.40, codes=8192)
PAINTERS = [*LLAMAGEN, SEVEN, replace(SEVEN, name="7B LoRA 16", lora=16)]


# ---- communication -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Of one step: bytes that a GPU sends by NVLink, that a node sends by network, ring steps."""

    inside: float
    network: float
    hops: float

    def seconds(self, network: float) -> float:
        """Links work at the same time; each step of a ring costs a hop."""
        share = ASSUMED["link efficiency"]
        links = max(self.inside / (ASSUMED["nvlink"] * share), self.network / (network * share))
        return links + self.hops * ASSUMED["hop"]


def ddp(painter: Painter, gpus: int, micro: int = 1) -> Traffic:
    """A ring all-reduce of float32 gradients: 2 (N-1)/N 4 P bytes sent by each GPU, and as many by
    each node. NCCL's tree takes 2 log2(N) steps, for each bucket of 25 MiB."""
    trained = painter.trained + painter.projector
    sent = 2 * (gpus - 1) / gpus * 4 * trained
    buckets = math.ceil(4 * trained / (25 * 2**20))
    return Traffic(sent, sent if gpus > GPUS_PER_NODE else 0, buckets * 2 * math.log2(gpus))


def _sharded(painter: Painter, ranks: int, micro: int) -> tuple[float, float, float]:
    """(gathered bytes, reduced bytes, ring steps) of FSDP2 over `ranks`, (N-1)/N of everything:
    blocks are gathered twice a micro-batch in bfloat16, the rest once in float32; gradients of what
    trains are reduced once in float32."""
    part = (ranks - 1) / ranks
    outside = painter.outside + painter.projector
    gathered = part * micro * (2 * 2 * painter.in_blocks + 4 * outside)
    reduced = part * 4 * (painter.trained + painter.projector)
    collectives = (painter.blocks + 1) * (2 * micro + 1)
    return gathered, reduced, collectives * (ranks - 1)


def fsdp(painter: Painter, gpus: int, micro: int = 1) -> Traffic:
    """FSDP2 over all GPUs."""
    gathered, reduced, hops = _sharded(painter, gpus, micro)
    sent = gathered + reduced
    return Traffic(sent, sent if gpus > GPUS_PER_NODE else 0, hops)


def hybrid(painter: Painter, gpus: int, micro: int = 1) -> Traffic:
    """FSDP2 inside each node; over the M nodes an all-reduce of each GPU's shard of the gradients,
    2 (M-1)/M 4 P bytes a node."""
    gathered, reduced, hops = _sharded(painter, GPUS_PER_NODE, micro)
    nodes = gpus // GPUS_PER_NODE
    between = 2 * (nodes - 1) / nodes * 4 * (painter.trained + painter.projector)
    steps = (painter.blocks + 1) * 2 * math.log2(nodes) if nodes > 1 else 0
    return Traffic(gathered + reduced + between / GPUS_PER_NODE, between, hops + steps)


ENGINES = {"ddp": ddp, "fsdp": fsdp, "hybrid": hybrid}


def largest(painter: Painter, engine: str, network: float) -> int:
    """The most GPUs, doubling from 8, that compute at least as long as they communicate."""
    found, gpus = 0, GPUS_PER_NODE
    while gpus <= min(1024, painter.batch):
        if ENGINES[engine](painter, gpus).seconds(network) > painter.compute(gpus):
            break
        found, gpus = gpus, gpus * 2
    return found


def ring_steps(ranks: int) -> int:
    """Steps of a small all-reduce in gloo's ring."""
    return 2 * (ranks - 1)


def steps_by_machine(ranks: int) -> int:
    """Steps of the same added within machines, then in a ring of their first processes, and handed
    out: reduce and broadcast within a machine take at most as many steps as a ring there."""
    here = min(ranks, GPUS_PER_NODE)
    return ring_steps(here) + (ring_steps(ranks // here) if ranks > here else 0)


def gloo_sum(ranks: int) -> float:
    """Seconds of a step's sum of counts."""
    return steps_by_machine(ranks) * ASSUMED["tcp hop"]


# ---- data ----------------------------------------------------------------------------------------


def repeated(nodes: int, lanes: int) -> float:
    """How often a shard is fetched in an epoch: lane l feeds slots l B/L to (l+1) B/L - 1 of every
    batch, so M/L nodes share one; the processes of a node share a cache."""
    return max(1.0, nodes / lanes)


# ---- checkpoints ---------------------------------------------------------------------------------


def checkpoint_bytes(painter: Painter) -> dict[str, float]:
    """Float32: what trains, two moments, its average; projectors with their moments."""
    trained, projector = painter.trained, painter.projector
    return {
        "weights": 4.0 * trained,
        "moments": 8.0 * trained,
        "average": 4.0 * trained,
        "projector": 12.0 * projector,
    }


def write_seconds(size: float, nodes: int) -> float:
    """All nodes write their part at the same time, to storage that has a limit."""
    return size / min(nodes * ASSUMED["node write"], ASSUMED["store write"])


def staging_seconds(size: float, gpus: int) -> float:
    """Every GPU copies its part to pinned memory; what else an async save does, runs beside."""
    return size / gpus / ASSUMED["to host"]


def best_interval(blocked: float, gpus: int) -> tuple[float, float]:
    """Young's interval sqrt(2 d F) for a save that blocks d seconds and F seconds between failures,
    and the share of time that saving and repeating cost, sqrt(2 d / F)."""
    between = ASSUMED["hours between failures of a GPU"] * 3600 / gpus
    return math.sqrt(2 * blocked * between), math.sqrt(2 * blocked / between)
