"""The benchmark of the distances runs and ends with a JSON line."""

import json

import pytest

from arra.bench.evaluate import BenchEvaluateConfig, bench_evaluate, told


def test_every_measure_has_its_time_and_its_limit() -> None:
    config = BenchEvaluateConfig(images=1000, width=8, paired=100, pictures=6, rounds=1)
    result = json.loads(told(bench_evaluate(config)).splitlines()[-1])
    assert list(result["seconds"]) == ["moments", "fd", "kid", "prdc", "cmmd"]
    assert result["seconds"].keys() == result["least_seconds"].keys()
    assert min(result["seconds"].values()) > 0
    assert result["least_seconds"]["kid"] * result["float64_gflops"] == pytest.approx(
        100 * 2000**2 * 8 / 1e9
    )
    assert result["images_per_s"] > 0


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="--images must be at least 1000"):
        BenchEvaluateConfig(images=999)
