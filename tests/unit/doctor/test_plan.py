"""The plan against training itself, and what its page says."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from arra import cli
from arra.config import AlignConfig, EngineConfig, LoraConfig, ModelConfig, OptimConfig, TrainConfig
from arra.doctor.live import LiveBytes
from arra.doctor.made_up import Material, one_image
from arra.doctor.rehearsal import Rehearsal, rehearse

FILE = Path(__file__).parents[3] / "benchmarks" / "plan.py"
SPEC = importlib.util.spec_from_file_location("benchmark_plan", FILE)
assert SPEC is not None
assert SPEC.loader is not None
benchmark = importlib.util.module_from_spec(SPEC)
sys.modules["benchmark_plan"] = benchmark
SPEC.loader.exec_module(benchmark)

MODEL = ModelConfig(layers=2, hidden_size=32, heads=2, mlp_size=64, max_length=64)
GRID, CODES = (4, 4), 64


def config(**changes: object) -> TrainConfig:
    start = TrainConfig("", "", model=MODEL, batch_size=8, threads=1, device="cpu")
    return dataclasses.replace(start, align=AlignConfig(layer=(1,)), **changes)  # type: ignore[arg-type]


def plan(settings: TrainConfig, accumulate: int = 1) -> Rehearsal:
    material = Material(one_image("a red circle", GRID, {"clip": 16}), codebook_size=CODES)
    micro = settings.micro_batch or settings.batch_size
    return rehearse(settings, micro, accumulate, material, paint=False)


@pytest.mark.parametrize("case", [c for c in benchmark.cases() if c.quick], ids=lambda c: c.name)
def test_peak_is_within_15_percent_of_what_the_allocator_saw(case: benchmark.Case) -> None:
    measured = benchmark.measured_live(case)
    predicted = benchmark.predicted(case)
    assert abs(predicted["peak"] / measured - 1) <= 0.15
    run = benchmark.run_of(case)
    assert predicted["parameters"] == sum(p.numel() for p in run.step.parameters())


def test_each_flag_moves_its_own_part() -> None:
    plain = plan(config())
    weights = sum(dataclasses.astuple(plain.parts)[:-1]) * 4
    assert plain.memory.all_gradients == weights
    assert weights <= plain.memory.weights <= weights + 4096  # and buffers
    assert 2 * weights <= plain.memory.optimizer <= 2 * weights + 1024  # and step counts
    averaged = plan(config(optim=OptimConfig(ema=0.999)))
    assert averaged.memory.average == weights - plain.parts.projectors * 4
    deep = dataclasses.replace(MODEL, layers=6)
    kept = plan(config(model=deep)).memory.kept_by_blocks
    recomputing = EngineConfig(activation_checkpointing="full")
    assert plan(config(model=deep, engine=recomputing)).memory.kept_by_blocks < kept / 3
    wide = dataclasses.replace(MODEL, hidden_size=128, mlp_size=256)
    full = plan(config(model=wide)).memory.optimizer
    assert plan(config(model=wide, optim=OptimConfig(bits=8))).memory.optimizer < 0.3 * full
    assert plan(config(), accumulate=4).flops == 4 * plain.flops


def test_a_contrast_has_a_frozen_copy_and_twice_the_rows() -> None:
    baseline = dataclasses.replace(config(), align=AlignConfig(weight=0.0))
    plain, found = plan(baseline), plan(dataclasses.replace(baseline, objective="cca"))
    assert found.memory.weights == 2 * plain.memory.weights
    assert found.memory.optimizer == plain.memory.optimizer
    assert found.tokens == 2 * plain.tokens
    # Twice the rows forwards and backwards, and forwards once more; the head once more again.
    assert 2.6 * plain.flops < found.flops < 3.4 * plain.flops


def test_flops_follow_from_parameters_and_tokens() -> None:
    found = plan(config(model=dataclasses.replace(MODEL, attention="sdpa")))
    wide = found.parts.blocks
    # 6 per parameter and token; attention, head and projector come on top.
    assert 6 * wide * found.tokens < found.flops < 9 * wide * found.tokens + 6 * 8 * 64 * 64 * 600


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    benchmark.save_base(folder)
    (folder / "model.safetensors").unlink()  # a plan reads no weights
    return folder


def test_an_adapter_trains_little(text_model: Path) -> None:
    path = str(text_model)
    whole = plan(config(model_path=path))
    adapted = plan(config(model_path=path, lora=LoraConfig(rank=4)))
    assert adapted.parts.trained < 0.2 * whole.parts.trained
    assert adapted.memory.optimizer < 0.2 * whole.memory.optimizer
    packed = plan(config(model_path=path, lora=LoraConfig(rank=4, quantize="4bit")))
    blocks = whole.parts.blocks
    assert adapted.memory.weights - packed.memory.weights > 0.8 * 3.5 * blocks


def test_a_storage_counts_once_and_until_it_is_gone() -> None:
    with FakeTensorMode(), LiveBytes() as live:
        a = torch.zeros(1000)
        view = a[10:].view(99, 10)
        assert live.live == 4000
        b = a + 1
        del a
        assert live.live == 8000
        del view, b
        assert live.live == 0
        live.mark()
        torch.zeros(10) + torch.ones(10)
    assert live.peak == 8000
    assert live.since_mark() == 120


# ---- the command ---------------------------------------------------------------------------------

SMALL = [
    *("doctor", "--plan", "scenes", "--model.layers", "2", "--model.hidden-size", "32"),
    *("--model.heads", "2", "--model.mlp-size", "64", "--align.layer", "1"),
    *("--tflops", "0.01", "--prompt-tokens", "4", "--codebook-size", "64"),
]


def test_the_page_names_parts_fit_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SMALL, "--gpus", "2", "--gpu", "a100-40gb"]) == 0
    page = capsys.readouterr().out
    for words in ("optimizer states", "fits a100-40gb", "1,000 images", "2 GPUs", "32 images = 2"):
        assert words in page


def test_what_does_not_fit_is_told_what_to_change(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    tight = ["--memory", "0.5", "--micro-batch", "1", "--json", "--out", str(out)]
    assert cli.main([*SMALL, *tight]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text())
    assert found["fits"] is False
    assert found["accumulate"] == 32
    flags = [other["flags"] for other in found["alternatives"]]
    assert flags[0] == "--engine.activation-checkpointing full"
    assert all("--lora" not in other for other in flags), "nothing to adapt"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("doctor", 2, "--plan RECIPE"),
        ("doctor --plan portrait", 2, "there is no recipe 'portrait'"),
        ("doctor --plan scenes --gpus 0", 2, "--gpus must be at least 1"),
        ("doctor --plan scenes --gpus 3", 1, "cannot be split over 3 GPUs"),
        ("doctor --plan scenes --gpu abacus", 1, "--gpu abacus is not in the table"),
        ("doctor --plan llm --model ./nowhere", 1, "nowhere"),
        ("doctor --plan scenes --data ./nowhere", 1, "is no prepared dataset"),
        ("doctor --plan scenes --align.layer 9 --gpu l4", 1, "align.layer 9 does not exist"),
    ],
)
def test_bad_input_gets_one_sentence(
    arguments: str, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = cli.main(arguments.split())
    except SystemExit as stop:  # a flag's own value: tyro's box
        found = stop.code  # type: ignore[assignment]
    assert found == code
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
