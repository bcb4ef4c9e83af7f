"""docs/scaling.md holds what benchmarks/scaling.py works out, and the formulas know our models."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def formulas(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "scaling_formulas", ROOT / "benchmarks" / "scaling_formulas.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "scaling_formulas", module)
    spec.loader.exec_module(module)
    return module


def test_the_page_holds_the_tables(tmp_path: Path) -> None:
    page = tmp_path / "scaling.md"
    page.write_text((ROOT / "docs" / "scaling.md").read_text())
    script = ROOT / "benchmarks" / "scaling.py"
    done = subprocess.run(
        [sys.executable, script, "--write", page], capture_output=True, text=True, check=True
    )
    assert page.read_text() == (ROOT / "docs" / "scaling.md").read_text(), (
        "run `python benchmarks/scaling.py --write docs/scaling.md`"
    )
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["largest_world"]["3B"]["hybrid, 8 x 400 Gb/s"] >= 64


def test_assumptions_of_the_page_are_those_of_the_formulas(formulas: ModuleType) -> None:
    page = re.sub(r"\s+", " ", (ROOT / "docs" / "scaling.md").read_text())
    assumed, measured = formulas.ASSUMED, formulas.MEASURED
    for words in (
        f"| {assumed['flops'] / 1e12:.0f} TFLOPS",
        f"| {assumed['nvlink'] / 1e9:.0f} GB/s sent by a GPU",
        f"| {assumed['link efficiency']:.0%}".replace("%", " %"),
        f"| {assumed['hop'] * 1e6:.0f} µs",
        f"| {assumed['tcp hop'] * 1e6:.0f} µs",
        f"| {assumed['to host'] / 1e9:.0f} GB/s",
        f"| {assumed['node write'] / 1e9:.0f} GB/s from a node",
        f"{assumed['store write'] / 1e9:.0f} GB/s from all",
        f"one in {assumed['hours between failures of a GPU']:,.0f} GPU-hours",
        f"takes {measured['image bytes']:,.0f} bytes in a shard",
        f"{measured['manifest bytes']:.0f} bytes and {measured['manifest seconds'] * 1e6:.0f} µs",
    ):
        assert words in page, words


def test_parameters_are_those_of_the_models(formulas: ModuleType) -> None:
    from arra.config import SIZES
    from arra.models.llamagen import LlamaGenConfig
    from arra.models.llamagen_model import LlamaGenForImageGeneration

    sizes = {(p.blocks, p.width, p.mlp): p for p in formulas.LLAMAGEN}
    for name in ("B", "L", "XL", "3B"):
        layers, width, heads, mlp = SIZES[name]
        config = LlamaGenConfig(
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
        )
        with torch.device("meta"):
            model = LlamaGenForImageGeneration(config)
        count = sum(p.numel() for p in model.parameters())
        assert sizes[layers, width, mlp].parameters == count
