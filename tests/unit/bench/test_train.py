"""`arra bench train`: ratios with intervals, memory by account, one JSON line at the end."""

import json

import numpy as np
import pytest
import torch

from arra.bench.paired import Ratio, take_turns
from arra.bench.train import BenchTrainConfig
from arra.bench.train_memory import saved_tensors
from arra.cli import main


def test_the_arms_and_the_line(capsys) -> None:
    tiny = ["--size", "tiny", "--quick", "--dtype", "float32", "--device", "cpu"]
    assert main(["bench", "train", *tiny]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["aligned_over_plain_time"] > 0
    assert result["tokens_per_s"] > 0
    low, high = result["aligned_over_plain_time_interval"]
    assert low <= result["aligned_over_plain_time"] <= high
    plain, aligned = result["memory"]["plain"], result["memory"]["aligned"]
    assert result["aligned_over_plain_memory"] == pytest.approx(
        aligned["total"] / plain["total"], rel=1e-3
    )
    # Linear(64, 512) - Linear(512, 512), with biases, in float32; AdamW keeps two numbers of each.
    projector = 4 * (64 * 512 + 512 + 512 * 512 + 512)
    assert aligned["weights"] - plain["weights"] == projector
    assert aligned["gradients"] - plain["gradients"] == projector
    assert aligned["optimizer"] - plain["optimizer"] >= 2 * projector
    assert set(result["step_seconds"]) == set(result["data_wait"]) == {"plain", "aligned"}
    assert any(line.startswith("time of an aligned step over a plain one") for line in lines)


def test_what_slows_a_whole_round_cancels_out() -> None:
    slow = np.random.default_rng(0).uniform(1, 5, 20)
    ratio = Ratio.of(list(3 * slow), list(2 * slow))
    assert ratio.median == pytest.approx(1.5)
    assert ratio.low == pytest.approx(1.5)
    noisy = Ratio.of(list(3 * slow), list(2 * slow * np.linspace(0.9, 1.1, 20)))
    assert noisy.low < noisy.median < noisy.high


def test_arms_take_turns() -> None:
    order: list[str] = []
    arms = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = take_turns(arms, rounds=3, warmup=1, device=torch.device("cpu"))
    assert [len(each) for each in seconds.values()] == [3, 3, 3]
    rounds = [order[i : i + 3] for i in range(0, 12, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len({each[0] for each in rounds}) == 3


def test_saved_tensors_count_storages_once_and_only_while_they_are_held() -> None:
    weight, x = torch.randn(8, 8, requires_grad=True), torch.randn(16, 8)

    def twice() -> None:
        for _ in range(2):
            hidden = x @ weight  # keeps x
            (hidden.view(8, 16) * hidden.view(8, 16)).sum().backward()  # hidden twice, one storage

    assert saved_tensors(twice, [weight]) == (16 * 8 + 16 * 8) * 4
    assert saved_tensors(twice, []) == (16 * 8 + 16 * 8) * 4  # the weight's gradient needs only x


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--llamagen", "x", "--size", "L"]])
def test_wrong_use(wrong: list[str], capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "train", *wrong])
    assert wrong[0] in capsys.readouterr().err


def test_what_is_not_there(tmp_path, capsys) -> None:
    for wrong, told in (
        (["--gpu-arms"], "--gpu-arms needs a GPU"),
        (["--llamagen", str(tmp_path), "--quick", "--batch-size", "1"], "no checkout"),
    ):
        assert main(["bench", "train", "--device", "cpu", *wrong]) == 1
        assert told in capsys.readouterr().err


def test_quick_and_auto_are_settled() -> None:
    settled = BenchTrainConfig(quick=True, device="cpu").settled()
    assert settled.batch_size == 2
    assert settled.dtype in ("float32", "bfloat16")
