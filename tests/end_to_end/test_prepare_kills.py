"""`arra prepare`, killed by SIGKILL: the same command goes on, and ends at the same bytes."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import killed_commands
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from arra.data.shards import open_dataset

ROWS, SHARD, BATCH = 60, 4, 2


@pytest.fixture(scope="module")
def given(tmp_path_factory, tiny_tokenizer):
    """Pictures and models, as the command's arguments."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 12, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    ViTModel(ViTConfig(**sizes), add_pooling_layer=False).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    source = folder / "pictures"
    source.mkdir()
    for i in range(ROWS):
        Image.effect_noise((40, 40), 80).save(source / f"{i:02}.png")
        (source / f"{i:02}.txt").write_text(f"noise {i}")
    (source / "33.png").write_bytes(b"")
    options = ["--image-tokenizer", str(tiny_tokenizer.folder), "--encoder", f"eye={folder}/vit"]
    options += ["--size", "16", "--shard-rows", str(SHARD), "--batch-size", str(BATCH)]
    return ["prepare", str(source), *options, "--threads", "1"]


def line(given, out, point="never", when=0, whom="main", *more):
    return "\t".join([point, str(when), whom, str(out), *given, "--out", str(out), *more])


def run(lines):
    done = subprocess.run(
        [sys.executable, killed_commands.__file__],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return [json.loads(each.removeprefix("run ")) for each in lines if each.startswith("run ")]


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_three_kills_and_the_same_bytes(tmp_path, given):
    # Two flushes write the plan, then each shard takes two and its note two. So: with the second
    # shard not yet renamed, between two batches with processes at work, and with a shard there but
    # not its note.
    kills = [("sync", 7, "main"), ("batch", 11, "main", "--workers", "2"), ("sync", 3, "all")]
    runs = run(
        [
            line(given, tmp_path / "whole"),
            *(line(given, tmp_path / "killed", *kill) for kill in kills),
            line(given, tmp_path / "killed"),
        ]
    )
    assert [each["exit"] for each in runs] == [0, -9, -9, -9, 0]
    assert all(each["gone"] for each in runs)
    assert all(each["begun"] for each in runs)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    rows = [len(open_dataset(tmp_path / "killed", split)) for split in ("train", "val")]
    assert sum(rows) == ROWS - 1


@pytest.mark.long
def test_twenty_kills_and_the_same_bytes(tmp_path, given):
    chance = random.Random(0)
    flushes = 2 + 4 * (-(-ROWS // SHARD) + 1)  # of the plan, and of each shard and its note
    moments = [("sync", chance.randint(3, flushes)) for _ in range(9)]
    moments += [("batch", chance.randint(3, ROWS // BATCH)) for _ in range(6)]
    moments += [("sync", 1), *(("after", chance.uniform(0, 0.8)) for _ in range(4))]
    kills = [
        (*moment, "all" if i % 2 else "main", "--workers", "0" if i % 4 else "2")
        for i, moment in enumerate(moments)
    ]
    lines = [line(given, tmp_path / "whole")]
    for i, kill in enumerate(kills):
        lines += [line(given, tmp_path / str(i), *kill), line(given, tmp_path / str(i))]
    whole, *runs = run(lines)
    killed, resumed = runs[::2], runs[1::2]
    assert whole["exit"] == 0
    assert all(each["exit"] == 0 for each in resumed)
    assert all(each["gone"] for each in runs)
    stopped = [each for each in killed if each["exit"] == -9 and not each["done"]]
    assert len(stopped) >= 15
    assert sum(each["begun"] for each in stopped) >= 15
    assert sum(each["in_a_file"] for each in stopped) >= 4
    for i in range(len(kills)):
        assert content(tmp_path / str(i)) == content(tmp_path / "whole"), kills[i]
