"""Patch grids as targets, from a prepared dataset and online: prepare, train, resume, export."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from saved_runs import tensors_of

from arra.config import (
    AlignConfig,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from arra.data.manifest import read_manifest
from arra.data.online import OnlineTarget
from arra.data.originals import Originals
from arra.data.prepare import prepare
from arra.data.prepare_config import PrepareConfig
from arra.data.shards import open_dataset
from arra.encoders import load_encoder
from arra.export import ExportConfig, export
from arra.train.loop import train
from arra.train.throughput import MEASURED

STEPS = 20
CLIP = "builtin:scenes-clip"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 drawn scenes with patches and class tokens of the bundled CLIP."""
    out = tmp_path_factory.mktemp("scenes") / "data"
    encoders = (f"patches={CLIP}@patch", f"clip={CLIP}")
    options = {"size": 64, "limit": 48, "splits": ("train", "val"), "shard_rows": 20}
    return prepare(PrepareConfig("builtin:scenes", "builtin:scenes", out, encoders, **options))


@pytest.fixture
def config(scenes: Path, tmp_path: Path) -> TrainConfig:
    sizes = {"layers": 2, "hidden_size": 32, "heads": 2, "mlp_size": 48, "max_length": 128}
    return TrainConfig(
        data_folder=str(scenes),
        out=str(tmp_path / "run"),
        steps=STEPS,
        batch_size=8,
        threads=1,
        model=ModelConfig(**sizes, text_vocabulary=280),
        align=AlignConfig(layer=(1,), targets=("patches",), centred=True),
        data=DataConfig(prompt_dropout=0.1),
        optim=OptimConfig(lr=5e-3, warmup=0.1),
        checkpoint=CheckpointConfig(every=10, keep=0),
        log=LogConfig(every=2, validate_images=8),
    )


def log_of(run: str | Path) -> list[dict]:
    lines = (Path(run) / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in MEASURED} for x in lines]


def assert_same_run(a: str | Path, b: str | Path) -> None:
    for name in ("model", "objective", "optimizer"):
        first, second = tensors_of(a, name), tensors_of(b, name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert log_of(a) == log_of(b)


def test_patches_are_learned_and_leave_no_trace(
    config: TrainConfig, scenes: Path, tmp_path: Path
) -> None:
    info = read_manifest(scenes).grids["patches"]
    assert (info.grid, info.dim, info.stored) == ([8, 8], 128, "float16")
    train(config)
    logged = log_of(config.out)
    assert logged[-1]["loss_gva"] < logged[0]["loss_gva"] - 0.05
    assert {"retrieval", "gva_constant", "val_loss_gva"} <= set(logged[-1])
    # grids say something about the picture that the best constant does not
    assert 0.2 < logged[-1]["gva_constant"] < 1
    card = json.loads((Path(config.out) / "run_card.json").read_text())
    assert card["hashes"]["encoders"]["patches"] == info.encoder
    folder = export(ExportConfig(config.out, tmp_path / "model"))
    kept = load_file(folder / "model" / "model.safetensors")
    assert kept.keys() <= tensors_of(config.out).keys()
    assert not any("project" in name for name in kept)
    texts = [path.read_text() for path in (folder / "model").glob("*.json")]
    assert not any("patches" in text or "scenes-clip" in text for text in texts)


def test_a_resumed_run_is_the_same_with_both_kinds_of_targets(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, align=replace(config.align, targets=("clip", "patches")))
    train(config)
    last = log_of(config.out)[-1]
    for target in ("clip", "patches"):
        assert {f"loss_gva/{target}", f"retrieval/{target}", f"gva_constant/{target}"} <= set(last)
    again = replace(config, out=str(tmp_path / "again"))
    train(again, stop_after=7)
    train(again)
    assert_same_run(config.out, again.out)


def test_positions_without_a_cell_are_refused(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="positions 'all' have no cell, so a patch target needs"):
        train(replace(config, align=replace(config.align, positions="all")))
    assert not Path(config.out).exists()


def test_buckets_of_several_shapes_train_together(tmp_path: Path, config: TrainConfig) -> None:
    """Wide and tall pictures: half of each is of another colour, and so are the cells there."""
    (tmp_path / "in").mkdir()
    for i in range(8):
        size = [(128, 64), (64, 128)][i % 2]
        picture = Image.new("RGB", size, (250, 240, 20 * i))
        picture.paste((10, 20, 250), (0, 0, size[0] // 2, size[1]))
        picture.save(tmp_path / "in" / f"{i}.png")
        (tmp_path / "in" / f"{i}.txt").write_text(f"halves {i}")
    asked = PrepareConfig(
        str(tmp_path / "in"),
        "builtin:scenes",
        tmp_path / "data",
        (f"patches={CLIP}@patch",),
        size=64,
        framing="buckets",
        val_fraction=0.0,
    )
    dataset = open_dataset(prepare(asked))
    assert len({tuple(grid) for grid in dataset.grids.tolist()}) == 2
    for row, (height, width) in enumerate(dataset.grids.tolist()):
        cells = dataset.patch_features["patches"][row].view(height, width, -1)
        cells = torch.nn.functional.normalize(cells - cells.mean((0, 1)), dim=-1).mean(0)
        left, right = cells[: width // 2 - 1].mean(0), cells[width // 2 + 1 :].mean(0)
        assert torch.dot(left, right) < -0.3
    train(
        replace(
            config,
            data_folder=str(tmp_path / "data"),
            steps=2,
            model=replace(config.model, layout="lumina"),
        )
    )
    assert 0 < log_of(config.out)[-1]["loss_gva"] < 2


# ---- online --------------------------------------------------------------------------------------


def online(config: TrainConfig, *encoders: str, **changes: object) -> TrainConfig:
    return replace(config, align=AlignConfig(layer=(1,), online=encoders, centred=True), **changes)


def test_online_values_are_those_that_are_stored(scenes: Path) -> None:
    dataset = open_dataset(scenes, "val")
    rows = [5, 0, 3]
    originals = Originals(dataset)
    patches = OnlineTarget(load_encoder(CLIP, "patch", grids=True), originals, dataset)
    wanted = torch.stack([dataset.patch_features["patches"][row] for row in rows])
    torch.testing.assert_close(patches.of(rows), wanted, rtol=2e-3, atol=2e-3)
    token = OnlineTarget(load_encoder(CLIP), originals, dataset)
    assert (patches.kind, token.kind) == ("patch", "global")
    stored = torch.from_numpy(dataset.features["clip"][rows]).float()
    torch.testing.assert_close(token.of(rows), stored, rtol=2e-3, atol=2e-3)


def test_online_training_resumes_exactly(config: TrainConfig, tmp_path: Path) -> None:
    config = online(config, f"dino={CLIP}@patch", f"token={CLIP}", steps=8)
    config = replace(config, align=replace(config.align, targets=("dino", "token", "clip")))
    train(config)
    logged = log_of(config.out)
    assert {"loss_gva/dino", "loss_gva/token", "loss_gva/clip"} <= set(logged[-1])
    # the same class token, once stored and once computed
    assert abs(logged[-1]["gva_constant/token"] - logged[-1]["gva_constant/clip"]) < 2e-3
    again = replace(config, out=str(tmp_path / "again"))
    train(again, stop_after=5)
    train(again)
    assert_same_run(config.out, again.out)
    card = json.loads((Path(config.out) / "run_card.json").read_text())
    known = json.loads((Path(config.out) / "online.json").read_text())
    assert card["hashes"]["encoders"]["dino"] == known["dino"]["encoder"]
    known["dino"]["encoder"] = "another"
    (Path(again.out) / "online.json").write_text(json.dumps(known))
    with pytest.raises(ValueError, match=r"dino: .* another encoder than the one that .* begun"):
        train(again)


def pictures(folder: Path, count: int = 6) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (70, 64 + i), (40 * i, 90, 200)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"level {i}")
    (folder / "2.png").write_bytes(b"")
    return folder


def test_val_that_was_taken_from_train_is_found_again(tmp_path: Path) -> None:
    """The scenes have a val of their own, which was not asked for."""
    options = {"size": 64, "limit": 20, "splits": ("train",), "val_fraction": 0.2}
    encoders = (f"clip={CLIP}",)
    asked = PrepareConfig("builtin:scenes", "builtin:scenes", tmp_path, encoders, **options)
    dataset = open_dataset(prepare(asked), "val")
    assert len(dataset) == 4
    token = OnlineTarget(load_encoder(CLIP), Originals(dataset), dataset)
    stored = torch.from_numpy(dataset.features["clip"]).float()
    torch.testing.assert_close(token.of(range(4)), stored, rtol=2e-3, atol=2e-3)


def test_the_dtype_of_encoders_is_recorded_and_does_not_mix(tmp_path: Path) -> None:
    options = {"size": 64, "limit": 6, "splits": ("train",), "val_fraction": 0.0}
    asked = PrepareConfig(
        "builtin:scenes",
        "builtin:scenes",
        tmp_path / "rounded",
        (f"clip={CLIP}", f"patches={CLIP}@patch"),
        encoder_dtype="bfloat16",
        grid_dtype="int8",
        **options,
    )
    rounded = open_dataset(prepare(asked))
    infos = rounded.manifest.aligned()
    assert {info.dtype for info in infos.values()} == {"bfloat16"}
    with pytest.raises(ValueError, match="--encoder-dtype was bfloat16, now float32"):
        prepare(replace(asked, encoder_dtype="float32"))
    exact = prepare(replace(asked, out=tmp_path / "exact", encoder_dtype="float32"))
    dataset = open_dataset(exact)
    for name, info in dataset.manifest.aligned().items():
        assert info.encoder != infos[name].encoder
    first, second = (d.patch_features["patches"][0] for d in (rounded, dataset))
    assert not torch.equal(first, second)
    assert torch.cosine_similarity(first, second).min() > 0.99


@pytest.fixture
def flipped(tmp_path: Path) -> Path:
    source = pictures(tmp_path / "in")
    options = {"size": 64, "views": "flip", "val_fraction": 0.3}
    encoders = (f"patches={CLIP}@patch",)
    out = tmp_path / "data"
    return prepare(PrepareConfig(str(source), "builtin:scenes", out, encoders, **options))


def test_views_and_rejects_keep_pictures_and_rows_together(flipped: Path) -> None:
    for split in ("train", "val"):
        dataset = open_dataset(flipped, split)
        patches = OnlineTarget(load_encoder(CLIP, "patch", grids=True), Originals(dataset), dataset)
        rows = list(range(len(dataset)))[::-1]
        wanted = torch.stack([dataset.patch_features["patches"][row] for row in rows])
        torch.testing.assert_close(patches.of(rows), wanted, rtol=2e-3, atol=2e-3)
    assert any(open_dataset(flipped).view_of)


def test_a_source_that_is_gone_or_changed_is_named(
    flipped: Path, tmp_path: Path, config: TrainConfig
) -> None:
    config = online(config, f"dino={CLIP}@patch", data_folder=str(flipped), batch_size=2, steps=2)
    config = replace(config, align=replace(config.align, targets=("dino",)))
    dataset = open_dataset(flipped)
    originals = Originals(dataset)
    row = dataset.view_of.index(None)
    broken = tmp_path / "in" / f"{dataset.texts[row].removeprefix('level ')}.png"
    size = broken.stat().st_size
    broken.write_bytes(b"x" * size)
    with pytest.raises(ValueError, match=r"no longer what it was \(not an image.*restore"):
        originals.frames([row])
    (tmp_path / "in" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"online needs the pictures of .* is another now"):
        train(config)
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"online needs the pictures of .*cannot be opened"):
        train(config)
    assert not Path(config.out).exists()


def test_wrong_use_is_refused(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match=r"write NAME=ENCODER\[@POOLING\]"):
        AlignConfig(online=(CLIP,))
    with pytest.raises(ValueError, match="gives a name twice"):
        AlignConfig(online=(f"a={CLIP}", f"a={CLIP}@patch"))
    with pytest.raises(ValueError, match="clip: the dataset holds a feature of that name"):
        train(online(config, f"clip={CLIP}"))
    align = AlignConfig(online=(f"dino={CLIP}",), targets=("sam",))
    with pytest.raises(ValueError, match=r"no feature 'sam' \(it has: clip, patches, dino\)"):
        train(replace(config, align=align))
