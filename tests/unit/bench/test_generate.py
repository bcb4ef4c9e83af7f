"""`arra bench generate`: rates, the share of memory's speed, one JSON line at the end."""

import json

import pytest
import torch
from torch import nn

from arra.bench.bandwidth import read_bandwidth
from arra.bench.generate import BenchGenerateConfig
from arra.bench.generate_arms import (
    by_transformers,
    fresh_painter,
    requests_of,
    step_bytes,
    stored,
    token_bytes,
)
from arra.cli import main
from arra.generate.engine import Engine
from arra.generate.settings import Sampling
from arra.models.base import Backbone

CPU = torch.device("cpu")


def test_the_table_and_the_line(capsys) -> None:
    tiny = ["--size", "tiny", "--quick", "--dtype", "float32", "--device", "cpu"]
    assert main(["bench", "generate", *tiny, "--speculate", "scd"]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    one = ", one picture"
    assert set(result["arms"]) == {"plain", "plain" + one, "scd", "scd" + one}
    low, high = result["scd_times_plain_interval"]
    assert low <= result["scd_times_plain"] <= high
    assert result["arms"]["scd"]["forwards_per_image"] <= 16
    plain = result["arms"]["plain"]
    assert result["tokens_per_s"] == plain["tokens_per_s"]
    assert plain["tokens_per_s"] == pytest.approx(2 * 16 / plain["seconds"], rel=1e-3)
    assert plain["images_per_s"] == pytest.approx(2 / plain["seconds"], rel=1e-3)
    assert plain["forwards_per_image"] == 16, "the prompt's, and one for each code but the last"
    assert 0 < result["bandwidth_fraction"] < 1
    low, high = result["bandwidth_range"]
    assert 0 < low <= result["bandwidth"] <= high
    assert 0 < result["first_rows_share"] < 1
    assert any(line.startswith("the limit: memory is read at") for line in lines)


def test_what_a_step_reads() -> None:
    backbone = fresh_painter("tiny", CPU, torch.bfloat16)
    model = backbone.model
    # keys and values of 64 numbers each, in 2 blocks, of 2 bytes
    assert token_bytes(backbone) == 2 * 64 * 2 * 2
    blocks = sum(p.numel() for p in backbone.blocks.parameters())
    head = backbone.head.weight.numel()
    requests = requests_of(backbone, (4, 4), 3, Sampling(cfg=2.0))
    weights, cache = step_bytes(backbone, requests)
    assert weights == 2 * (blocks + head), "no table of codes or classes is read whole"
    assert cache == 3 * 2 * (1 + 16 / 2) * token_bytes(backbone)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    unguided = requests_of(backbone, (4, 4), 3, Sampling(cfg=1.0))
    assert step_bytes(backbone, unguided)[1] == cache / 2


def test_a_weight_counts_as_it_is_kept() -> None:
    assert stored(nn.Parameter(torch.zeros(3, 5, dtype=torch.bfloat16))) == 30


def test_transformers_paints_as_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from arra.bench import generate_arms

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    shape = generate_arms.TEXT.to_dict() | small | {"num_attention_heads": 2, "head_dim": 16}
    shape["num_key_value_heads"] = 2
    monkeypatch.setattr(generate_arms, "TEXT", type(generate_arms.TEXT)(**shape))
    backbone = fresh_painter("text", CPU, torch.float32)
    requests = requests_of(backbone, (2, 3), 2, Sampling(cfg=2.0))
    arm = by_transformers(backbone, requests)
    assert arm().shape == (2, len(requests[0].prefix) + 1 + 6)  # <begin> and 6 codes
    assert arm.forwards_each == 6


def test_memory_has_a_speed() -> None:
    assert 1e8 < read_bandwidth(10**6, CPU, repeats=2) < 1e13


@pytest.mark.parametrize(
    "wrong", [["--rounds", "0"], ["--images", "0"], ["--llamagen", "x", "--size", "text"]]
)
def test_wrong_use(wrong: list[str], capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "generate", *wrong])
    assert wrong[0] in capsys.readouterr().err


def test_what_is_not_there(tmp_path, capsys) -> None:
    for wrong, told in (
        (["--gpu-arms"], "--gpu-arms needs a GPU"),
        (["--llamagen", str(tmp_path)], "no checkout"),
        (["--transformers"], "has no generate()"),
    ):
        small = [] if "--llamagen" in wrong else ["--size", "tiny"]
        assert main(["bench", "generate", "--device", "cpu", "--quick", *small, *wrong]) == 1
        assert told in capsys.readouterr().err


def test_quick_and_auto_are_settled() -> None:
    settled = BenchGenerateConfig(quick=True, device="cpu").settled()
    assert settled.rounds == 2
    assert settled.dtype in ("float32", "bfloat16")
    assert BenchGenerateConfig(model="x", device="cpu").settled().dtype == "auto"


def test_the_arms_of_a_gpu_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their course alone: on a CPU, not compiled, with memory for four rows."""
    from arra.bench import generate_gpu

    class Small(Engine):
        def __init__(self, backbone: Backbone, slots: int, *, compiled: bool) -> None:
            assert compiled
            super().__init__(backbone, min(slots, 4))

    monkeypatch.setattr(generate_gpu, "SIZES", ("tiny",))
    monkeypatch.setattr(generate_gpu, "Engine", Small)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    found = generate_gpu.gpu_arms(CPU, cfg=2.0, rounds=2, llamagen=None)
    assert list(found) == ["tiny, one picture", "tiny, 1 pictures", "tiny, 2 pictures"]
    assert 0 < found["tiny, one picture"]["bandwidth_fraction"] < 1
