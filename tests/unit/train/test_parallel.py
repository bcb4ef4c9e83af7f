"""One trajectory however a step is computed: accumulated, recomputed, compiled, on several ranks.

What must agree is each term of the loss and both gradient norms at every step, over all ranks, and
the weights in the end. `retrieval` is within a micro-batch, and padding to its longest row: these
may differ.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import in_ranks
from small_runs import (
    CODES,
    GRID,
    small_config,
    small_dataset,
    small_run,
    tiny_chameleon,
    trajectory,
    whole,
)
from tiny_painters import emu3_special_tokens, emu3_tokenizer, publish_emu3, publish_janus
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from arra.config import AlignConfig, DataConfig, EngineConfig, LoraConfig, TrainConfig
from arra.generate.pipeline import Pipeline
from arra.train.parallel import engine_of
from arra.train.step import validate
from arra.train.world import World, open_world

Lines = list[dict[str, float]]
Result = tuple[Lines, dict[str, Tensor]]

BUSY = 900.0
"""Seconds that a rank has: on a busy machine the compiler alone takes minutes."""
FLOAT32 = 2e-4
"""Largest difference after 20 steps in float32, of a term by its size or of a weight: Adam divides
small gradients by their own size, and so magnifies their last bits."""


@pytest.fixture(autouse=True)
def wide() -> Iterator[None]:
    """Models, projectors and sums in float64, where no other type is said."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("classes"), classes=3)


@pytest.fixture(scope="module")
def chameleon(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_chameleon(tmp_path_factory.mktemp("chameleon"))


@pytest.fixture
def config(data: Path) -> TrainConfig:
    return small_config(data)


@pytest.fixture
def llamagen(classes: Path) -> TrainConfig:
    config = small_config(classes)
    return replace(config, model=replace(config.model, architecture="llamagen", hidden_size=32))


def trained(config: TrainConfig, steps: int) -> Result:
    with open_world("cpu") as world:
        return trajectory(small_run(config, world), steps)


def on(ranks: int, config: TrainConfig, steps: int) -> Result:
    """What rank 0 found, after all have found the same."""
    first, *others = in_ranks(ranks, trained, config, steps, timeout=BUSY)
    for other in others:
        assert other[0] == first[0]
        assert all(torch.equal(other[1][name], first[1][name]) for name in first[1])
    return first


def assert_agree(found: Result, expected: Result, tolerance: float) -> None:
    for step, (a, b) in enumerate(zip(found[0], expected[0], strict=True)):
        for name in b:
            if name.split("/")[0] in ("ar", "z", "gva", "gva_constant", "loss", "grad_norm"):
                off = abs(a[name] - b[name]) / max(1.0, abs(b[name]))
                assert off <= tolerance, f"step {step} {name}: {a[name]!r} for {b[name]!r}"
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        off = float((found[1][name] - tensor).abs().max())
        assert off <= tolerance, f"{name} is off by {off:.2g}"


def engine(parallel: str = "auto", recompute: str = "none", **more: object) -> EngineConfig:
    return EngineConfig(parallel, activation_checkpointing=recompute, **more)  # type: ignore


ARMS = {
    "accumulated": (1, 1, engine()),
    "full": (1, 0, engine(recompute="full")),
    "selective": (1, 0, engine(recompute="selective")),
    "ddp, 2 ranks": (2, 0, engine("ddp")),
    "fsdp, 2 ranks": (2, 0, engine("fsdp")),
    "ddp, 2 ranks, accumulated, full": (2, 2, engine("ddp", "full")),
    "fsdp, 2 ranks, accumulated, selective": (2, 2, engine("fsdp", "selective")),
}
"""name -> ranks, images per micro-batch, engine."""
LONG_ARMS = ARMS | {
    "ddp, 3 ranks": (3, 2, engine("ddp")),
    "fsdp, 3 ranks": (3, 2, engine("fsdp")),
    "ddp, 4 ranks": (4, 1, engine("ddp")),
    "fsdp, 4 ranks": (4, 1, engine("fsdp", "full")),
    "hybrid, 2 x 2 ranks": (4, 0, engine("hybrid", shard_ranks=2)),
    "hybrid, 4 ranks of one machine": (4, 1, engine("hybrid", "selective")),
}
COMPILED = {
    "compiled": (1, 0, engine(compile=True)),
    "compiled, full": (1, 2, engine(recompute="full", compile=True)),
    "compiled, selective": (1, 2, engine(recompute="selective", compile=True)),
    "compiled, fsdp, 2 ranks": (2, 2, engine("fsdp", "selective", compile=True)),
    "compiled, ddp, 2 ranks": (2, 2, engine("ddp", compile=True)),
}


@pytest.fixture(scope="module")
def alone() -> dict[tuple[TrainConfig, int, torch.dtype], Result]:
    return {}


def arm_agrees(
    arm: tuple[int, int, EngineConfig],
    config: TrainConfig,
    alone: dict[tuple[TrainConfig, int, torch.dtype], Result],
    steps: int,
    tolerance: float,
) -> None:
    ranks, micro, chosen = arm
    key = (config, steps, torch.get_default_dtype())
    if key not in alone:
        alone[key] = on(1, config, steps)
    split = replace(config, micro_batch=micro, engine=chosen)
    assert_agree(on(ranks, split, steps), alone[key], tolerance)


@pytest.mark.parametrize("arm", ARMS)
def test_the_same_trajectory(arm: str, config: TrainConfig, alone: dict) -> None:
    arm_agrees(ARMS[arm], config, alone, 4, 1e-10)


PUBLISHED: dict[str, Callable[[Path], object]] = {
    "chameleon": tiny_chameleon,
    "janus": lambda folder: publish_janus(folder, CODES),
    "emu3": lambda folder: publish_emu3(folder, emu3_tokenizer(emu3_special_tokens(CODES)), CODES),
}


@pytest.mark.parametrize("architecture", ["llamagen", *PUBLISHED])
def test_other_families_sharded(
    architecture: str, config: TrainConfig, llamagen: TrainConfig, tmp_path: Path, alone: dict
) -> None:
    """What Janus and Emu3 have besides (an image tokenizer, an image encoder) stays whole."""
    chosen = llamagen
    if architecture in PUBLISHED:
        chosen = replace(config, model_path=str(PUBLISHED[architecture](tmp_path)))
    arm = (2, 2, engine("fsdp", "full"))
    arm_agrees(arm, chosen, alone, 3, 1e-10)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("architecture", ["llama", "llamagen", "chameleon"])
@pytest.mark.parametrize("arm", LONG_ARMS | COMPILED)
def test_the_same_twenty_steps(
    arm: str,
    architecture: str,
    dtype: str,
    config: TrainConfig,
    llamagen: TrainConfig,
    chameleon: str,
    alone: dict,
) -> None:
    if architecture != "llama":
        config = llamagen if architecture == "llamagen" else replace(config, model_path=chameleon)
    torch.set_default_dtype(getattr(torch, dtype))
    tolerance = 1e-10 if dtype == "float64" else FLOAT32
    if arm in COMPILED and architecture != "llamagen":
        tolerance = FLOAT32  # transformers' norms compute in float32 whatever the type
    arm_agrees((LONG_ARMS | COMPILED)[arm], config, alone, 20, tolerance)


# ---- what a run may have besides ----------------------------------------------------------------


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_alignment_that_ends(parallel: str, config: TrainConfig, alone: dict) -> None:
    """Projectors have no gradient from then on, and do not move."""
    ending = replace(config, steps=4, align=AlignConfig(weight=0.5, schedule="stop", until=0.5))
    arm_agrees((2, 2, engine(parallel)), ending, alone, 4, 1e-10)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_rows_of_text_and_ranks_of_unequal_shares(
    parallel: str, config: TrainConfig, tmp_path: Path, alone: dict
) -> None:
    """3 text rows and 8 images in 6 parts: some have no text, some one image and some two."""
    passages = tmp_path / "passages.txt"
    passages.write_text("a line and a circle\nsquares\nblue and red\n")
    mixed = DataConfig(text=str(passages), text_fraction=0.25, prompt_dropout=0.9)
    arm = (3, 2, engine(parallel))
    arm_agrees(arm, replace(config, data=mixed), alone, 3, 1e-10)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_averaged_adapters(parallel: str, config: TrainConfig, chameleon: str, alone: dict) -> None:
    pytest.importorskip("peft")
    optim = replace(config.optim, ema=0.9)
    adapted = replace(config, model_path=chameleon, lora=LoraConfig(rank=2), optim=optim)
    torch.set_default_dtype(torch.float32)  # peft's own type
    arm_agrees((2, 2, engine(parallel)), adapted, alone, 3, 1e-5)


def averages(config: TrainConfig) -> dict[str, Tensor]:
    with open_world("cpu") as world:
        run = small_run(config, world)
        trajectory(run, 3)
        assert run.state.average is not None
        kinds = {type(p) for p in run.state.trained().values()}
        assert kinds == ({DTensor} if world.size > 1 else {nn.Parameter})
        return {name: whole(tensor) for name, tensor in run.state.average.weights.items()}


def test_averaged_weights_are_sharded_as_the_weights(config: TrainConfig) -> None:
    config = replace(config, optim=replace(config.optim, ema=0.9))
    (expected,) = in_ranks(1, averages, config)
    for found in in_ranks(2, averages, config):
        assert all(torch.allclose(found[n], t, atol=1e-12) for n, t in expected.items())


def test_tied_tables_stay_tied(config: TrainConfig, alone: dict) -> None:
    """qwen3's fresh models tie them."""
    tied = replace(config, model=replace(config.model, architecture="qwen3"))
    arm_agrees((2, 0, engine("fsdp")), tied, alone, 3, 1e-10)


def between_steps(config: TrainConfig) -> tuple[Tensor, dict[str, float], Result]:
    """Codes painted and a validation between steps, and what was trained around them."""
    with open_world("cpu") as world:
        run = small_run(config, world)
        trajectory(run, 1)
        run.step.eval()
        with torch.random.fork_rng(), run.engine.painting():
            tokenizer = SimpleNamespace(codebook_size=CODES)
            pipe = Pipeline(run.backbone, tokenizer, grid=GRID)  # type: ignore[arg-type]
            prompts = ["a line" if run.backbone.text_tokenizer else "1", ""]
            codes = pipe.codes(prompts, seeds=[1, 2])
        run.step.train()
        means = validate(run)
        return codes, means, trajectory(run, 2)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_painting_and_validation_between_steps(parallel: str, config: TrainConfig) -> None:
    """5 images of validation on 2 ranks, 4 at a time: the second has one, then none."""
    ((codes, means, expected),) = in_ranks(1, between_steps, config)
    split = replace(config, engine=engine(parallel))
    for painted, validated, found in in_ranks(2, between_steps, split):
        assert torch.equal(painted, codes)
        for name in ("loss_ar", "loss_gva", "loss_z"):
            assert validated[name] == pytest.approx(means[name], abs=1e-10)
        assert_agree(found, expected, 1e-10)


@pytest.mark.parametrize("architecture", ["llama", "llamagen", "chameleon", "gpt2"])
def test_mixed_precision(
    architecture: str, config: TrainConfig, llamagen: TrainConfig, chameleon: str
) -> None:
    """Blocks gathered in bfloat16 compute what autocast does on one rank, but for their norms'
    weights; weights and reductions stay float32. gpt2's layer norms are gathered as they are."""
    torch.set_default_dtype(torch.float32)
    if architecture in ("llamagen", "chameleon"):
        config = llamagen if architecture == "llamagen" else replace(config, model_path=chameleon)
    else:
        eager = replace(config.model, architecture=architecture, attention="eager")
        config = replace(config, model=eager)
    config = replace(config, dtype="bfloat16")
    ((_, means, expected),) = in_ranks(1, between_steps, config)
    for _, validated, found in in_ranks(2, between_steps, config):
        assert validated["loss_ar"] == pytest.approx(means["loss_ar"], rel=2e-3)
        for a, b in zip(found[0], expected[0], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
        assert all(tensor.dtype == torch.float32 for tensor in found[1].values())


# ---- what is refused ----------------------------------------------------------------------------


def test_what_cannot_be_sharded_is_refused(config: TrainConfig, chameleon: str) -> None:
    def refused(changed: TrainConfig, match: str) -> None:
        world = World(torch.device("cpu"), size=4, local_size=4)
        with pytest.raises(ValueError, match=match):
            engine_of(nn.Linear(2, 2), nn.ModuleList(), nn.Linear(2, 2), changed, world)

    four = LoraConfig(rank=2, quantize="4bit")
    refused(replace(config, model_path=chameleon, lora=four), "--engine.parallel ddp")
    refused(replace(config, optim=replace(config.optim, bits=8)), "--engine.parallel ddp")
    refused(replace(config, engine=engine("hybrid", shard_ranks=3)), "does not divide the 4")
