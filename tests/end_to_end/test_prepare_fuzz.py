"""Whatever the rows are, none is lost and nothing crashes: rows in = rows out + rejects."""

import json

import pytest
import torch
from fuzzed_rows import write_rows, write_table
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from arra.cli import main
from arra.data.manifest import read_manifest
from arra.data.shards import open_dataset


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 12, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    ViTModel(ViTConfig(**sizes), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return ["--image-tokenizer", str(tiny_tokenizer.folder), "--encoder", f"eye={folder}"]


def prepared(source, out, models, *more):
    command = ["prepare", str(source), "--out", str(out), *models, "--size", "16"]
    assert main([*command, "--shard-rows", "100", "--threads", "1", *more]) == 0
    manifest = read_manifest(out)
    lines = (out / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    rejects = [json.loads(line) for line in lines]
    for reject in rejects:
        assert reject["reason"]
        assert "\n" not in reject["reason"]
    assert len({(each["split"], each["row"]) for each in rejects}) == len(rejects)
    for split in manifest.splits:
        open_dataset(out, split)  # verifies bytes, ids, codes and features
    return sum(info.rows for info in manifest.splits.values()), len(rejects)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}


@pytest.mark.parametrize("seed", [0, 1])
def test_sixty_rows(tmp_path, models, seed):
    write = write_table if seed else write_rows
    source = tmp_path / ("in.parquet" if seed else "in")
    rows = write(source, 60, seed)
    good, rejects = prepared(source, tmp_path / "out", models)
    assert good + rejects == rows
    assert min(good, rejects) > 5


@pytest.mark.long
def test_a_thousand_rows(tmp_path, models):
    rows = write_rows(tmp_path / "in", 1000, 2)
    good, rejects = prepared(tmp_path / "in", tmp_path / "out", models, "--workers", "2")
    assert good + rejects == rows
    assert min(good, rejects) > 200
    prepared(tmp_path / "in", tmp_path / "here", models, "--workers", "0")
    assert content(tmp_path / "out") == content(tmp_path / "here")


@pytest.mark.long
def test_a_thousand_rows_of_parquet(tmp_path, models):
    rows = write_table(tmp_path / "in.parquet", 1000, 3)
    good, rejects = prepared(tmp_path / "in.parquet", tmp_path / "out", models)
    assert good + rejects == rows
    assert min(good, rejects) > 200


def test_a_long_strip_and_a_short_one(tmp_path, models):
    source = tmp_path / "in"
    source.mkdir()
    for name, size in {"wide": (20_000, 9), "thin": (8, 8), "flat": (4000, 7)}.items():
        Image.new("RGB", size, "red").save(source / f"{name}.png")
        (source / f"{name}.txt").write_text(name)
    assert prepared(source, tmp_path / "out", models) == (2, 1)
