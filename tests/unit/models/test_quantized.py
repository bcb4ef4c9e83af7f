"""Smaller weights: what is rounded, how far, what is refused, and that rows stay alone.

Legend: N rows, I inputs, O outputs.
"""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import tiny_exports
import torch
from grown_painter import grown
from torch import nn

from arra.config import ModelConfig
from arra.generate.pictures import generate, weights_sha256
from arra.generate.pipeline import Pipeline
from arra.generate.settings import GenerateConfig
from arra.models import quantized
from arra.models.base import Backbone
from arra.models.four_bits import linear_layers
from arra.models.loading import load_for_training, load_model
from arra.models.quantized import (
    GROUP,
    Int4Linear,
    Int8Linear,
    Quantization,
    quantize_weights,
    rounded,
)

pytest.importorskip("torchao")
MODULES = {"int8": Int8Linear, "int4": Int4Linear}


@torch.no_grad()
def llamagen(width: int = GROUP) -> Backbone:
    config = ModelConfig("llamagen", layers=2, hidden_size=width, heads=2, mlp_size=2 * width)
    backbone = load_for_training(
        None,
        config,
        codebook_KC=torch.zeros(24, 3),
        captions=(),
        seed=0,
        grid=(2, 4),
        class_names=("cat", "dog"),
    )
    torch.manual_seed(0)
    for parameter in backbone.model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=0.2)
    backbone.model.eval()
    return backbone


def linear(inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_layer_computes_with_rounded_weights(kind: str, dtype: torch.dtype) -> None:
    layer = linear(2 * GROUP, 48, dtype)
    smaller = MODULES[kind](copy.deepcopy(layer))
    eye_II = torch.eye(2 * GROUP, dtype=dtype)
    weight_OI = (smaller(eye_II) - layer.bias).T.float()
    span = 2 * layer.weight.float().abs().max() if kind == "int4" else layer.weight.abs().max()
    step = span / (15 if kind == "int4" else 127)
    rounding = 2.0**-7 if dtype == torch.bfloat16 else 1e-6
    off_OI = (weight_OI - layer.weight.float()).abs()
    assert off_OI.max() <= step / 2 + rounding * span
    assert off_OI.max() > 0, "nothing was rounded"
    assert smaller(eye_II.view(2, -1, 2 * GROUP)).shape == (2, GROUP, 48)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_row_of_a_product_stands_alone(kind: str) -> None:
    smaller = MODULES[kind](linear(2 * GROUP, 64, torch.bfloat16))
    for rows in (2, 4, 7, 32):
        x_NI = torch.randn(rows, 2 * GROUP, dtype=torch.bfloat16)
        alone_NI = torch.randn_like(x_NI)
        place = torch.randperm(rows)
        y_NO = smaller(x_NI)
        assert torch.equal(smaller(x_NI[place]), y_NO[place]), "the place in the batch shows"
        alone_NI[-1] = x_NI[0]
        assert torch.equal(smaller(alone_NI)[-1], y_NO[0]), "neighbours show"


def test_rows_stand_alone_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products run on a CPU too, slowly."""
    from torchao.quantization import quant_api

    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularity: None)
    full = linear(32, 48, torch.bfloat16)
    layer = rounded(copy.deepcopy(full), "fp8")
    x_NI = torch.randn(4, 32, dtype=torch.bfloat16)
    other_NI = x_NI * torch.tensor([1.0, 8, 8, 8])[:, None].bfloat16()
    y_NO, expected_NO = layer(x_NI), full(x_NI)
    assert torch.equal(layer(other_NI)[0], y_NO[0])
    assert 0 < (y_NO - expected_NO).norm() < 0.06 * expected_NO.norm()
    assert torch.equal(layer(torch.zeros_like(x_NI)), full(torch.zeros_like(x_NI)))


@pytest.mark.parametrize("kind", ["llamagen", "llama", "gemma2", "chameleon", "janus", "emu3"])
def test_blocks_are_rounded_and_nothing_else(kind: str, tmp_path: Path) -> None:
    backbone = llamagen() if kind == "llamagen" else tiny_exports.painter(kind, tmp_path)
    ids_BT = torch.arange(8).remainder(backbone.vocab_size).view(1, -1)
    before = dict(backbone.model.named_parameters())
    names = set(linear_layers(backbone))
    full_BTD = backbone.last_hidden(ids_BT)
    quantize_weights(backbone, "int8")
    after = dict(backbone.model.named_parameters())
    gone = {name.rpartition(".")[0] for name in before if name not in after}
    assert gone == names
    assert {n for n, m in backbone.model.named_modules() if isinstance(m, Int8Linear)} == names
    assert all(after[name] is before[name] for name in after)
    head = {id(p) for p in backbone.head.parameters()}
    assert head <= {id(p) for p in after.values()}
    hidden_BTD = backbone.last_hidden(ids_BT)
    assert 0 < (hidden_BTD - full_BTD).norm() < 0.1 * full_BTD.norm()


def test_transposed_layers_are_rounded_too() -> None:
    backbone = grown("gpt2")
    ids_BT = torch.arange(6)[None]
    full_BTD = backbone.last_hidden(ids_BT)
    quantize_weights(backbone, "int8")
    hidden_BTD = backbone.last_hidden(ids_BT)
    assert 0 < (hidden_BTD - full_BTD).norm() < 0.1 * full_BTD.norm()


# ---- refused -------------------------------------------------------------------------------------


def test_what_cannot_be_rounded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(backbone: Backbone, kind: Quantization, device: str = "cpu") -> str:
        with pytest.raises(ValueError, match="--quantization") as error:
            quantize_weights(backbone, kind, device)
        return str(error.value)

    assert "Hopper" in refused(llamagen(), "fp8")
    said = refused(llamagen(32), "int4")
    assert "has 32 inputs, which groups of 64 do not divide: use --quantization int8" in said
    assert "groups of 16 do not divide: leave it out" in refused(llamagen(24), "int8")
    double = llamagen()
    double.model.double()
    assert "float64 on cpu: add --dtype bfloat16" in refused(double, "int8")
    twice = llamagen()
    quantize_weights(twice, "int8")
    assert "quantised already" in refused(twice, "int4")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        quantized.importlib.util,
        "find_spec",
        lambda name: None if name == "torchao" else found(name),
    )
    assert "pip install 'arra[torchao]'" in refused(llamagen(), "int8")


def test_an_adapter_and_a_base_in_4_bits_are_refused() -> None:
    peft = pytest.importorskip("peft")
    adapted = llamagen()
    peft.get_peft_model(adapted.model, peft.LoraConfig(target_modules=["wqkv"]))
    with pytest.raises(ValueError, match="carries an adapter: merge it first"):
        quantize_weights(adapted, "int8")


def test_a_base_in_4_bits_is_refused() -> None:
    pytest.importorskip("bitsandbytes")
    from arra.models.four_bits import quantize

    packed = llamagen()
    quantize(packed, "bfloat16")
    with pytest.raises(ValueError, match="no plain linear layers"):
        quantize_weights(packed, "int8")


# ---- painting ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_exports.export("llama", tmp_path_factory.mktemp("export"))


@pytest.mark.parametrize("kind", ["int8"])
def test_a_picture_is_the_same_alone_and_among_others(exported: Path, kind: Quantization) -> None:
    pipe = Pipeline.from_pretrained(exported, quantization=kind, dtype="bfloat16")
    prompts = ["a red circle", "two blue squares left of a line", "a line"] * 3
    codes_Nhw = pipe.codes(prompts, slots=8)
    for index in (0, 4, 8):
        again_1hw = pipe.codes([prompts[index]], seeds=[index // 3], slots=8)
        assert torch.equal(again_1hw[0], codes_Nhw[index])


def test_pictures_in_int4_stand_alone() -> None:
    from arra.generate.engine import Engine
    from arra.generate.request import Request
    from arra.generate.settings import Sampling

    backbone = llamagen()
    backbone.model.bfloat16()
    quantize_weights(backbone, "int4")
    made = [
        Request(tuple(backbone.condition(name, (2, 4))), seed, (2, 4), Sampling(cfg=2.0))
        for seed, name in enumerate(["cat", "dog", "cat", "dog", "dog"])
    ]
    together = Engine(backbone, 4).paint(made)
    for request, codes_hw in zip(made, together, strict=True):
        assert torch.equal(Engine(backbone, 4).paint([request])[0], codes_hw)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@torch.inference_mode()
def test_a_lean_step_computes_what_the_layers_do(kind: Quantization) -> None:
    backbone = llamagen()
    quantize_weights(backbone, kind)
    cache = backbone.new_cache(4, 9)
    prefix_R1 = torch.tensor([backbone.condition("cat", (2, 4))] * 4)
    backbone.prefill(prefix_R1, cache, torch.arange(4))
    ids_R1, places_R1 = torch.tensor([[3], [9], [20], [7]]), torch.ones(4, 1, dtype=torch.long)
    plain_R1D = backbone.step(ids_R1, places_R1, cache)
    with backbone.decoding():
        assert backbone._decode_step is not None  # type: ignore[attr-defined]
        lean_R1D = backbone.step(ids_R1, places_R1, cache)
    assert backbone._decode_step is None  # type: ignore[attr-defined]
    torch.testing.assert_close(lean_R1D, plain_R1D, rtol=1e-4, atol=1e-5)


def test_a_folder_keeps_its_weights_size(exported: Path, tmp_path: Path) -> None:
    def paint(kind: Quantization) -> None:
        generate(GenerateConfig(str(exported), str(tmp_path), ("a line",), quantization=kind))

    paint("int8")
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["quantization"] == "int8"
    paint("int8")
    with pytest.raises(ValueError, match="--quantization: int8 -> off"):
        paint("off")


def test_weights_of_torchao_have_a_sum() -> None:
    backbone = llamagen()
    full = weights_sha256(backbone)
    for layer in linear_layers(backbone).values():
        rounded(layer, "int8")
    first = weights_sha256(backbone)
    assert first not in (full, weights_sha256(llamagen()))
    layer = next(iter(linear_layers(backbone).values()))
    layer.weight.qdata[0, 0] ^= 1
    assert weights_sha256(backbone) != first


def test_a_model_is_opened_small(exported: Path) -> None:
    backbone = load_model(exported, quantization="int8", dtype="bfloat16")
    kept = sum(t.nbytes for t in backbone.blocks.state_dict().values())
    full = sum(t.nbytes for t in load_model(exported).blocks.state_dict().values())
    assert kept < 0.3 * full


@pytest.mark.long
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_compiled_layers_compute_the_same(kind: str) -> None:
    smaller = MODULES[kind](linear(2 * GROUP, 64, torch.bfloat16))
    x_NI = torch.randn(4, 2 * GROUP, dtype=torch.bfloat16)
    assert torch.equal(torch.compile(smaller, fullgraph=True)(x_NI), smaller(x_NI))
