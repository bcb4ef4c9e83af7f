"""What a training run is: frozen dataclasses, validated once (`config_json.py` writes them).

A recipe (see recipes/) returns a full `TrainConfig`; the command line overrides single fields.
Field docstrings are the `--help` text; units stand first.
"""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

SIZES = {
    "B": (12, 768, 12, 2048),
    "L": (24, 1024, 16, 2816),
    "XL": (36, 1280, 20, 3584),
    "XXL": (48, 1536, 24, 4096),
    "3B": (24, 3200, 32, 8704),
}
"""Name -> blocks, width, heads, feed-forward width: FoundationVision/LlamaGen ce98ec4, gpt.py."""


@dataclass(frozen=True)
class ModelConfig:
    """A fresh model (used when --model names none), or how a text-only model is grown."""

    architecture: str = "llama"
    """Of a fresh model: a causal language model by transformers' model type, which reads captions;
    llamagen, which takes their features (prepare --text-encoder) or classes; or auto = llamagen
    where the dataset has such features or classes, else llama."""
    size: Literal["custom", "B", "L", "XL", "XXL", "3B"] = "custom"
    """LlamaGen's sizes (111M, 343M, 775M, 1.4B, 3.1B); each sets layers, hidden-size, heads and
    mlp-size of a fresh model. custom = as these say."""
    dropout: float = 0.0
    """Of a fresh llamagen: of its embeddings and of what each layer adds (0.1 in LlamaGen)."""
    layers: int = 6
    """Decoder blocks of a fresh model."""
    hidden_size: int = 192
    """Width of a fresh model."""
    heads: int = 6
    """Attention heads of a fresh model."""
    mlp_size: int = 512
    """Width of the feed-forward layers of a fresh model."""
    max_length: int = 256
    """Tokens of the longest sequence of a fresh model; longer captions are cut."""
    text_vocabulary: int = 512
    """Tokens of the byte-level BPE fitted on the captions for a fresh model."""
    layout: Literal["grid", "chameleon", "lumina"] = "chameleon"
    """How an image is written: codes only; begin and end; or sizes and row ends as well."""
    rep: bool = False
    """Add one extra token before each image (the paper's <REP> ablation)."""
    new_rows: Literal["statistics", "codebook"] = "statistics"
    """How a grown model's new rows start: like the old ones, or from the image codebook."""
    reset_image_head: bool = False
    """Start the output rows of a published model's image codes anew (as new_rows says), because it
    was never taught to paint. Never done unasked: it would wipe a trained head."""
    format: str | None = None
    """How a published checkpoint writes images, where its files do not tell (docs/chameleon.md)."""
    dtype: Literal["float32", "auto"] = "float32"
    """Type of the weights: float32, or auto = as the checkpoint stores them (bfloat16 takes half
    the memory, but loses steps below 1/256 of a weight; needs the run's dtype bfloat16)."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """transformers' attention: sdpa = fused; eager = plain products (1.5 x faster in bfloat16 on a
    CPU at 80 tokens); auto = fused where the model has it (Gemma 2 has not)."""

    def __post_init__(self) -> None:
        if self.size != "custom":
            names = ("layers", "hidden_size", "heads", "mlp_size")
            for name, value in zip(names, SIZES[self.size], strict=True):
                object.__setattr__(self, name, value)
        _require(0 <= self.dropout < 1, "--model.dropout must be in [0, 1)", self.dropout)


@dataclass(frozen=True)
class LoraConfig:
    """Train a low-rank adapter on the blocks and the rows of image tokens; --model names the rest.

    Needs `pip install 'arra[peft]'`.
    """

    rank: int = 0
    """Rank of the adapter's matrices; 0 = no adapter, the whole model trains."""
    alpha: float = 0.0
    """Scale: the adapter adds alpha / rank * B A x; 0 = twice the rank."""
    dropout: float = 0.0
    """Fraction of the adapter's inputs that is dropped."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get one, such as q_proj v_proj; none given = all of them."""
    quantize: Literal["none", "4bit"] = "none"
    """4bit = the frozen linear layers of the blocks are kept as 4-bit NF4 (QLoRA); needs
    `pip install 'arra[quantize]'`."""


@dataclass(frozen=True)
class AlignConfig:
    """The alignment term, lambda * L_GVA. Weight 0 is the plain autoregressive baseline."""

    weight: float = 1.0
    """lambda (1 in the paper)."""
    layer: tuple[int, ...] = (1,)
    """Blocks whose output is aligned, counted from 1 (the paper: 1 of 32)."""
    targets: tuple[str, ...] = ()
    """Names of the features, vectors or grids, to align to; none given = all that there are."""
    online: tuple[str, ...] = ()
    """NAME=ENCODER[@POOLING]: features that the dataset does not hold, computed in every step from
    the pictures that it was prepared from (docs/encoders.md). For grids too large to store."""
    positions: Literal["hybnext", "holding", "rep", "all", "last"] = "hybnext"
    """Which positions are aligned; hybnext = those that predict an image code (the paper)."""
    centred: bool = False
    """Align to features minus the dataset's mean feature instead of raw ones (the paper)."""
    schedule: Literal["constant", "step", "cosine", "stop"] = "constant"
    """lambda over time: constant; half after `until`; cosine to 0 at `until`; 0 after `until`."""
    until: float = 1.0
    """Fraction of the run at which the schedule acts."""

    def __post_init__(self) -> None:
        if len(self.online_encoders) != len(self.online):
            raise ValueError("--align.online gives a name twice")

    @property
    def online_encoders(self) -> dict[str, str]:
        """Name -> encoder of `online`."""
        found = {}
        for each in self.online:
            name, equals, spec = each.partition("=")
            if not equals or not spec or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
                raise ValueError(f"--align.online {each}: write NAME=ENCODER[@POOLING]")
            found[name] = spec
        return found


@dataclass(frozen=True)
class LossConfig:
    """The next-token loss."""

    text: bool = False
    """Also train on the prompts."""
    vocab: Literal["all", "image"] = "all"
    """Softmax over the whole vocabulary or over the tokens of images only."""
    z: float = 0.0
    """Weight of log(Z)^2 (1e-5 in the paper's medical runs)."""
    chunk: int = 1024
    """Positions whose logits exist at one time."""


@dataclass(frozen=True)
class CcaConfig:
    """Of --objective cca: beta and lambda of arXiv 2410.09347 (docs/cca.md)."""

    beta: float = 0.02
    """How fast a likelihood ratio saturates its term: smaller = further from the start."""
    weight: float = 1000.0
    """lambda: how much an image behind another's prompt is repelled. thu-ml/CCA's LlamaGens: 1000
    (B, XL, XXL), 300 (L), 500 (3B)."""

    def __post_init__(self) -> None:
        _require(self.beta > 0, "--cca.beta must be more than 0", self.beta)
        _require(self.weight >= 0, "--cca.weight must be at least 0", self.weight)


@dataclass(frozen=True)
class DataConfig:
    """What is read besides the prepared dataset."""

    text: str | None = None
    """A UTF-8 file of plain text to mix in, one passage a line: the model keeps writing."""
    text_fraction: float = 0.0
    """Fraction of each batch that is text only."""
    prompt_dropout: float = 0.1
    """Fraction of images whose prompt is dropped, for guidance (0.1 in LlamaGen)."""
    stream: int = 0
    """Shards that are shuffled with one another, of each lane; the dataset is then read shard by
    shard while training (docs/streaming.md). 0 = it is read into memory at the start."""
    lanes: int = 8
    """Parts that the shards of an epoch are dealt to when streaming; each feeds as many images to
    every batch. A multiple of the number of processes that the run may ever have."""
    cache: str | None = None
    """A folder on this machine's disk for shards that are streamed from an object store; processes
    and runs may share it. Default: `cache` in the run's folder."""
    cache_gb: float = 20.0
    """10^9 bytes that the cache takes at most."""
    skip_steps: tuple[str, ...] = ()
    """Steps whose batches are passed over without an update, such as 1200-1210: to get a run past
    batches that it failed on (docs/training.md)."""

    @property
    def skipped(self) -> list[range]:
        """The ranges of `skip_steps`; the first step is 1.

        Raises:
            ValueError: one of them is no range of steps.
        """
        found = []
        for each in self.skip_steps:
            match = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", each)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if last < first:
                raise ValueError(f"--data.skip-steps {each}: write a step or a range, as 1200-1210")
            found.append(range(first, last + 1))
        return found

    def __post_init__(self) -> None:
        assert self.skipped is not None


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup: float = 0.03
    """Fraction of the run that warms up linearly."""
    final_lr: float = 0.1
    """Learning rate at the end as a fraction of the peak (cosine)."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; norms, biases and token tables have none."""
    beta1: float = 0.9
    """AdamW's first-moment decay."""
    beta2: float = 0.95
    """AdamW's second-moment decay."""
    bits: Literal[32, 8] = 32
    """Bits of AdamW's two states: 8 = bitsandbytes' blockwise quantised ones, a quarter of the
    memory; needs `pip install 'arra[quantize]'`."""
    clip: float = 1.0
    """Largest gradient norm of the model; the projectors are clipped apart, to the same norm."""
    ema: float = 0.0
    """Decay of the averaged weights, 0 = none. Early on min(decay, (1 + t) / (10 + t))."""


@dataclass(frozen=True)
class EngineConfig:
    """How a step is computed: on how many processes, and what is traded for memory.

    A run may be resumed with another engine; the mathematics stays, the last bits may differ.
    """

    parallel: Literal["auto", "ddp", "fsdp", "hybrid"] = "auto"
    """Of several processes (torchrun): ddp = each holds everything; fsdp = weights, gradients and
    optimizer states are sharded over all; hybrid = sharded in groups. auto = fsdp."""
    shard_ranks: int = 0
    """hybrid: processes that share one copy of the weights; 0 = those of one machine."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again: full = whole blocks; selective = all but the results
    of matrix products and attention."""
    compile: bool = False
    """torch.compile for each decoder block; needs a C++ compiler on a CPU."""
    cross_entropy: Literal["auto", "ours", "liger"] = "auto"
    """What computes the loss: Liger's fused kernel (on CUDA, `pip install liger-kernel`; with a
    plain linear head, the whole vocabulary and no z-loss), or our chunks; auto = liger where it is
    installed and can. The run card says which."""

    def __post_init__(self) -> None:
        _require(self.shard_ranks >= 0, "--engine.shard-ranks must be at least 0", self.shard_ranks)


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run's state is saved."""

    every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """How many checkpoints to keep; 0 = all."""
    background: bool = True
    """Write while training goes on: takes memory for a copy of the state on the machine."""


@dataclass(frozen=True)
class LogConfig:
    """What is written while training."""

    every: int = 20
    """Steps between log lines."""
    validate_every: int = 0
    """Steps between validation losses; 0 = only at the end."""
    validate_images: int = 512
    """Images of the validation split used for it."""
    sample_every: int = 0
    """Steps between sample grids; 0 = none."""
    samples: int = 16
    """Images in a sample grid."""
    probe_every: int = 0
    """Steps between probes of how much of the targets each layer holds (docs/watching.md), and
    once more at the end; 0 = none. The plain baseline is probed for the dataset's features."""
    trackers: tuple[Literal["wandb", "trackio"], ...] = ()
    """Where curves and pictures go besides TensorBoard; each needs `pip install 'arra[NAME]'`."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The same command again resumes it."""

    data_folder: Annotated[str, tyro.conf.arg(name="data")]
    """A folder that `arra prepare` wrote."""
    out: str
    """The run folder; everything is written there."""
    recipe: tyro.conf.Suppress[str] = "scenes"
    model_path: Annotated[str | None, tyro.conf.arg(name="model")] = None
    """A causal language model (to grow) or an exported painter (to adapt): folder or hub id."""
    image_tokenizer: str | None = None
    """Checked against the dataset's; default: the one named in its manifest."""
    objective: Literal["arra", "cca"] = "arra"
    """arra = next-token prediction and alignment; cca = a painter (--model) learns to paint without
    guidance, by contrasting each image's prompt with others' (docs/cca.md)."""
    steps: int = 2000
    """Optimizer steps."""
    batch_size: int = 32
    """Images per optimizer step, of all processes together."""
    micro_batch: int = 0
    """Images per forward pass of one process, at most; 0 = its whole share of the batch."""
    seed: int = 0
    """Of weights, order and prompt dropout."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """bfloat16 = autocast (weights stay float32); on a CPU only where it has the instructions.
    auto = bfloat16 where it is native, else float32; recorded: a resume uses the same."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu."""
    threads: int = 0
    """CPU threads; 0 = torch's default. Recorded: a resume uses the same number."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    cca: CcaConfig = field(default_factory=CcaConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "--steps must be at least 1", self.steps)
        _require(self.batch_size >= 1, "--batch-size must be at least 1", self.batch_size)
        _require(self.micro_batch >= 0, "--micro-batch must be at least 0", self.micro_batch)
        self._check_lora()
        _require(self.align.weight >= 0, "--align.weight must be at least 0", self.align.weight)
        _require(0 < self.align.until <= 1, "--align.until must be in (0, 1]", self.align.until)
        self._check_stream()
        if self.objective == "cca":
            self._check_cca()
        for name in ("text_fraction", "prompt_dropout"):
            value = getattr(self.data, name)
            flag = f"--data.{name.replace('_', '-')}"
            _require(0 <= value < 1, f"{flag} must be in [0, 1)", value)
        if (self.data.text is None) != (self.data.text_fraction == 0):
            raise ValueError("--data.text and --data.text-fraction need each other")
        _require(
            self.model.hidden_size % self.model.heads == 0,
            "--model.heads must divide --model.hidden-size",
            f"{self.model.heads} and {self.model.hidden_size}",
        )

    def _check_stream(self) -> None:
        data = self.data
        _require(data.stream >= 0, "--data.stream must be at least 0", data.stream)
        _require(data.lanes >= 1, "--data.lanes must be at least 1", data.lanes)
        _require(data.cache_gb > 0, "--data.cache-gb must be more than 0", data.cache_gb)
        if data.stream and self.batch_size % data.lanes:
            raise ValueError(
                f"--batch-size {self.batch_size} is no multiple of --data.lanes {data.lanes}: each "
                f"lane of a stream feeds as many images to every batch"
            )
        if data.stream and self.align.online:
            raise ValueError(
                "--align.online reads the pictures of all images: leave out --data.stream, or "
                "store the features with `arra prepare --encoder`"
            )

    def _check_cca(self) -> None:
        _require(
            self.batch_size > 1,
            "--objective cca contrasts the images of a batch: --batch-size must be at least 2",
            self.batch_size,
        )
        unknown = {
            "--align.weight above 0 (projectors are trained beside next-token prediction)": (
                self.align.weight > 0
            ),
            "--loss.text": self.loss.text,
            "--loss.z above 0": self.loss.z > 0,
            "--data.text": self.data.text is not None,
            "--data.stream (prompts come from the whole batch)": self.data.stream > 0,
            "--log.probe-every": self.log.probe_every > 0,
            "--engine.cross-entropy liger (which gives sums only)": (
                self.engine.cross_entropy == "liger"
            ),
        }
        for flag in (flag for flag, given in unknown.items() if given):
            raise ValueError(f"--objective cca has no {flag}: leave it out, or set it to 0")

    def _check_lora(self) -> None:
        lora = self.lora
        _require(lora.rank >= 0, "--lora.rank must be at least 0", lora.rank)
        _require(lora.alpha >= 0, "--lora.alpha must be at least 0", lora.alpha)
        _require(0 <= lora.dropout < 1, "--lora.dropout must be in [0, 1)", lora.dropout)
        if lora.rank and self.model_path is None:
            raise ValueError("--lora.rank adapts weights that exist: name a model with --model")
        if not lora.rank and lora.quantize != "none":
            raise ValueError(
                "--lora.quantize keeps weights that cannot train: give it an adapter, --lora.rank"
            )

    def accumulate(self, ranks: int = 1) -> int:
        """Micro-batches per optimizer step on each of `ranks` processes."""
        share = -(-self.batch_size // ranks)
        return -(-share // (self.micro_batch or share))

    @property
    def text_rows(self) -> int:
        """Text-only rows added to each batch: fraction f of all rows = f/(1-f) of the images."""
        f = self.data.text_fraction
        return round(self.batch_size * f / (1 - f))


def _require(condition: bool, rule: str, found: object) -> None:
    if not condition:
        raise ValueError(f"{rule}, got {found}")
