"""What can be set when painting. Light on purpose: the command line reads it before torch loads."""

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import tyro

DEFAULT_SLOTS = 32
"""Rows per forward pass. Enough to hide Python's overhead of a small model, few enough that four
pictures do not wait for many idle rows; evaluation and the demo ask for more."""

DEFAULT_WINDOW = {"off": 8, "sjd": 8, "scd": 8, "tree": 64}
"""Codes that a speculating pass looks at (experiments/speculation)."""


@dataclass(frozen=True)
class Sampling:
    """How the next code is drawn from the logits, in this order.

    Attributes:
        cfg: guidance scale; logits = unguided + cfg * (guided - unguided). 1 = off.
        temperature: logits are divided by it; 0 = always the likeliest code.
        top_k: only the k likeliest codes may be drawn; 0 = all.
        top_p: only the fewest codes that together reach this probability may be drawn; 1 = all.
        cfg_interval: guidance is on while the share of codes painted is in [first, second); the
            rest of the picture is painted without.
    """

    cfg: float = 3.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        _require(0 <= self.cfg < math.inf, "--cfg must be at least 0 (1 = no guidance)", self.cfg)
        _require(
            0 <= self.temperature < math.inf,
            "--temperature must be at least 0 (0 = always the likeliest code)",
            self.temperature,
        )
        _require(
            self.top_k >= 0 and self.top_k == int(self.top_k),
            "--top-k must be a whole number of at least 0 (0 = all codes)",
            self.top_k,
        )
        _require(0 < self.top_p <= 1, "--top-p must be in (0, 1] (1 = all codes)", self.top_p)
        first, last = self.cfg_interval
        _require(
            0 <= first <= last <= 1,
            "--cfg-interval must be two shares of the picture in rising order, 0 to 1",
            f"{first} {last}",
        )

    def with_changes(
        self,
        cfg: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        cfg_interval: tuple[float, float] | None = None,
    ) -> "Sampling":
        """The same settings but for those given."""
        return Sampling(
            self.cfg if cfg is None else cfg,
            self.temperature if temperature is None else temperature,
            self.top_k if top_k is None else top_k,
            self.top_p if top_p is None else top_p,
            self.cfg_interval if cfg_interval is None else cfg_interval,
        )

    def to_json(self) -> dict[str, Any]:
        """As it stands in JSON files."""
        return {**asdict(self), "cfg_interval": list(self.cfg_interval)}


@dataclass(frozen=True)
class Speculation:
    """Several codes per forward pass, where they could be foreseen (docs/speculation.md).

    Attributes:
        mode: "sjd" = speculative Jacobi decoding, "scd" = its coupled form, "tree" = a tree of
            drafts by one noise.
        window: codes that a pass looks at, at most; None = the mode's own (`width`).
        adaptive: a picture's window is narrower where few of its codes can be foreseen.
    """

    mode: Literal["off", "sjd", "scd", "tree"] = "off"
    window: int | None = None
    adaptive: bool = False

    def __post_init__(self) -> None:
        _require(self.width >= 2, "--window must be at least 2", self.width)
        if self.adaptive and self.mode == "tree":
            raise ValueError("--adaptive-window is for sjd and scd: a tree has a fixed size")

    @property
    def width(self) -> int:
        return DEFAULT_WINDOW[self.mode] if self.window is None else self.window


@dataclass(frozen=True)
class GenerateConfig:
    """Paints prompts into a folder. The same command again paints only what is missing."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """An exported model, a run folder, a hub id or builtin:scenes."""
    out: str
    """Folder for the pictures, images.jsonl, grid.png and settings.json."""
    prompts: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT ...")
    ] = ()
    """What to paint; quote each prompt."""
    prompts_file: Annotated[str | None, tyro.conf.arg(name="prompts", metavar="FILE")] = None
    """UTF-8 file of more prompts: one per line, or JSON lines (*.jsonl) with "prompt" or "text"
    (GenEval's); or a folder of one .txt a prompt (DPG-Bench's)."""
    num: int = 4
    """Images per prompt."""
    seed: int = 0
    """Image j of every prompt uses seed + j."""
    cfg: float | None = None
    """Guidance scale, at least 0, 1 = off. Default: the model's own (pipeline.json)."""
    temperature: float | None = None
    """At least 0; 0 = always the likeliest code. Default: the model's own."""
    top_k: int | None = None
    """Draw from the k likeliest codes, 0 = all. Default: the model's own."""
    top_p: float | None = None
    """Draw from the fewest codes with this probability, in (0, 1], 1 = all. Default: the model's
    own."""
    cfg_interval: tuple[float, float] | None = None
    """Guidance only from this share of the picture to that, 0 to 1. Default: the model's own."""
    slots: int = DEFAULT_SLOTS
    """Rows per forward pass; a picture takes two with guidance, one without. More is faster for
    many pictures and needs more memory. A picture is the same to the last bit only at the same
    number; with several CPU threads, a multiple of 4."""
    compile: bool = False
    """Compile the decode step: faster pictures after a first one that takes a minute longer. Its
    rounding is its own."""
    speculate: Literal["off", "sjd", "scd", "tree"] = "off"
    """Several codes per forward pass, drawn from the same distribution: speculative Jacobi
    decoding, its coupled form, or a tree of drafts, which takes the fewest passes and the most
    arithmetic. For few pictures at a time (docs/speculation.md)."""
    window: int | None = None
    """Codes that a pass of --speculate looks at, at most. Default: 8, of a tree 64."""
    adaptive_window: bool = False
    """A picture's window is narrower where few of its codes can be foreseen (not of a tree)."""
    image_tokenizer: str | None = None
    """Folder, file or hub id; default: the one that the model was trained with."""
    text_encoder: str | None = None
    """Folder or hub id, for a model that is prompted by a text encoder's features; default: the one
    that the model was trained with."""
    grid: tuple[int, int] | None = None
    """Height and width of the images in codes. Default: what the model was trained on."""
    format: str | None = None
    """How a published checkpoint writes images, where its files do not tell (docs/chameleon.md)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights; auto = as they are stored, but float32 for float16 on a CPU."""
    quantization: Literal["off", "int8", "int4", "fp8"] = "off"
    """Smaller weights in the decoder blocks, an approximation: 8 or 4 bits, or fp8 on Hopper; needs
    `pip install 'arra[torchao]'` (docs/smaller-weights.md has what it costs and gives)."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu."""
    threads: int = 0
    """CPU threads; 0 = torch's default."""

    def __post_init__(self) -> None:
        Sampling().with_changes(
            self.cfg, self.temperature, self.top_k, self.top_p, self.cfg_interval
        )
        _require(self.num >= 1, "--num must be at least 1", self.num)
        if self.grid is not None:
            _require(min(self.grid) >= 1, "--grid must be two numbers of at least 1", self.grid)
        _require(self.threads >= 0, "--threads must be at least 0", self.threads)
        check_slots(self.slots)
        Speculation(self.speculate, self.window, self.adaptive_window)
        check_seed(self.seed)
        check_seed(self.seed + self.num - 1)


def check_slots(slots: int) -> None:
    """Refuses a number of images per forward pass that cannot be."""
    _require(slots >= 1, "--slots must be at least 1", slots)


def check_seed(seed: int) -> None:
    """Refuses a seed that a 64-bit generator does not take."""
    _require(0 <= seed < 2**63, "--seed must be in [0, 2^63)", seed)


def _require(condition: bool, rule: str, found: object) -> None:
    if not condition:
        raise ValueError(f"{rule}, got {found}")


NO_SPECULATION = Speculation()
