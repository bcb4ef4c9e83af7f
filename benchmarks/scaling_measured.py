"""Measures what docs/scaling.md says was measured; a JSON line last.

    python benchmarks/scaling_measured.py [--quick]

    bytes of an image in a shard of 1,024 rows, as `arra prepare` writes them: random codes and
        features, which no real ones compress worse than
    bytes and seconds of a shard in a manifest of many
    seconds of gloo's all_reduce of six numbers, of 2 and 4 processes of this machine

`--quick` takes a small manifest and few sums.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from arra.data.manifest import (
    FILE,
    FeatureInfo,
    Manifest,
    ShardInfo,
    SplitInfo,
    TokenizerInfo,
    read_manifest,
    write_manifest,
)
from arra.data.shard_file import Row, write_shard

ROWS, WIDTH = 1024, 768
SUM = """
import statistics, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
numbers, times = torch.zeros(6, dtype=torch.int64), []
for _ in range(int(sys.argv[1])):
    start = time.perf_counter()
    dist.all_reduce(numbers)
    times.append(time.perf_counter() - start)
if dist.get_rank() == 0:
    print(statistics.median(times))
dist.destroy_process_group()
"""


def image_bytes(folder: Path, side: int, codes: int, words: int) -> float:
    """Of one row: side x side codes, a feature of 768, a label or a caption of `words` words."""
    random = np.random.default_rng(0)
    vocabulary = [f"word{i}" for i in range(5000)]
    rows = [
        Row(
            id=f"n{random.integers(10**8):08d}_{i}",
            sample=f"n{i}",
            image_index=0,
            text=" ".join(random.choice(vocabulary, words)),
            codes_hw=random.integers(0, codes, (side, side)),
            features={"clip": random.standard_normal(WIDTH).astype(np.float16)},
            extra={} if words else {"label": i % 1000},
        )
        for i in range(ROWS)
    ]
    file = folder / "train-00000.parquet"
    write_shard(file, rows, {"clip": WIDTH}, {} if words else {"label": int})
    return file.stat().st_size / ROWS


def manifest(folder: Path, shards: int) -> tuple[float, float]:
    """(bytes, seconds to read and verify) of each shard in a manifest of `shards`."""
    infos = [ShardInfo(f"train-{i:05d}.parquet", ROWS, os.urandom(32).hex()) for i in range(shards)]
    mean = [0.1] * WIDTH
    feature = FeatureInfo(WIDTH, "e" * 64, "clip", "class", mean, mean, mean)
    tokenizer = TokenizerInfo("t", "f" * 64, 16_384, 16)
    split = {"train": SplitInfo(shards * ROWS, infos)}
    write_manifest(folder, Manifest(split, tokenizer, {"clip": feature}, 256, "centre"))
    start = time.perf_counter()
    read_manifest(folder)
    return (folder / FILE).stat().st_size / shards, (time.perf_counter() - start) / shards


def gloo_sum(folder: Path, processes: int, times: int) -> float:
    """Median seconds of a small all_reduce."""
    script = folder / "gloo_sum.py"
    script.write_text(SUM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(script), str(times)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {
            "image bytes": image_bytes(folder, 16, 16_384, 0),
            "large image bytes": image_bytes(folder, 32, 8192, 40),
        }
        shards = 10_000 if quick else 976_563
        found["manifest bytes"], found["manifest seconds"] = manifest(folder, shards)
        for processes in (2, 4):
            times = [gloo_sum(folder, processes, 50 if quick else 500) for _ in range(3)]
            found[f"sum of {processes}"] = statistics.median(times)
    for what, value in found.items():
        print(f"{what:20} {value:.4g}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
