"""A run that streams: stopped and resumed, from an object store, with a cache that is too small."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from bucket_store import BucketStore, fill
from safetensors.torch import load_file

from arra.cli import main
from arra.config import TrainConfig
from arra.data.prepare import prepare
from arra.data.prepare_config import PrepareConfig
from arra.files import read_json
from arra.recipes.scenes import scenes
from arra.train.loop import train
from arra.train.throughput import MEASURED


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "data"
    prepare(
        PrepareConfig(
            source="builtin:scenes",
            image_tokenizer="builtin:scenes",
            encoder=("builtin:scenes-clip",),
            size=64,
            out=out,
            limit=60,
            shard_rows=6,
        )
    )
    return out


def config(data: Path | str, out: Path, **stream: object) -> TrainConfig:
    whole = scenes(str(data), str(out))
    small = dataclasses.replace(whole.model, layers=2, hidden_size=32, heads=2, mlp_size=32)
    return dataclasses.replace(
        whole,
        steps=12,
        batch_size=4,
        threads=1,
        device="cpu",
        model=small,
        align=dataclasses.replace(whole.align, layer=(1,)),
        data=dataclasses.replace(whole.data, **({"stream": 2, "lanes": 2} | stream)),
        checkpoint=dataclasses.replace(whole.checkpoint, every=5),
        log=dataclasses.replace(whole.log, every=1, validate_images=8),
    )


def losses(run: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "checkpoints" / "step-00000012").rglob("*.safetensors"))
    return {f"{f.name} {k}": v for f in files for k, v in load_file(f).items()}


def test_a_stopped_stream_goes_on_exactly(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("upath")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config(data, whole))
    BucketStore.objects.clear()
    url = fill("store/data", data)
    largest = max(len(b) for k, b in BucketStore.objects.items() if k.endswith(".parquet"))
    train(config(url, parts, cache_gb=3 * largest / 1e9), stop_after=7)
    assert list((parts / "cache").glob("*.parquet"))
    train(config(url, parts, cache=str(tmp_path / "c")))
    assert losses(parts) == losses(whole)
    assert len(losses(whole)) == 12
    assert losses(whole)[-1]["val_loss_ar"] > 0
    one, other = weights(whole), weights(parts)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_json(whole / "config.json")["data"]["lanes"] == 2
    assert (
        main(["generate", str(parts), "a red circle", "--out", str(tmp_path / "p"), "--num", "1"])
        == 0
    )


def test_what_cannot_be_streamed_is_said(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--batch-size 4 is no multiple of --data\.lanes 3"):
        config(data, tmp_path, lanes=3)
    plain = config(data, tmp_path)
    online = dataclasses.replace(plain.align, online=("x=builtin:scenes-clip",))
    with pytest.raises(ValueError, match=r"--align\.online .* leave out --data\.stream"):
        dataclasses.replace(plain, align=online)
    train(config(data, tmp_path / "y"), stop_after=1)
    with pytest.raises(ValueError, match="lanes: 2 -> 4"):
        train(config(data, tmp_path / "y", lanes=4))
