"""The loader's benchmark runs and ends with a JSON line."""

import json

from arra.bench.loader import BenchLoaderConfig, bench_loader, told


def test_rates_of_every_kind_and_what_training_takes() -> None:
    config = BenchLoaderConfig(
        images=64, batch_size=8, seconds=0.05, shard_rows=16, window=2, rounds=1
    )
    result = json.loads(told(bench_loader(config)).splitlines()[-1])
    for kind in ("classes", "captions"):
        assert min(result[kind].values()) > 0
    assert 2000 < result["gpu_on_paper_images_per_s"] < 3500, "445 TFLOP/s over 6 x 111M x 256"
    assert result["times_scenes_recipe"] > 0
