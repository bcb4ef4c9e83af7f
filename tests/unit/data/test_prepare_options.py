"""prepare with framings, views, filters and templates: no row is lost or in another place."""

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from arra.config import ModelConfig
from arra.data import job as module
from arra.data.loader import Loader
from arra.data.manifest import read_manifest
from arra.data.prepare import prepare
from arra.data.prepare_config import PrepareConfig
from arra.data.selection import reading_of
from arra.data.shards import open_dataset
from arra.models.loading import load_for_training

SIZE, FACTOR = 32, 8


class RedTokenizer:
    """Every code is the red level of its cell's first pixel."""

    codebook_size, factor, fingerprint = 256, FACTOR, "red-tokenizer"

    def encode(self, pixels_NCHW):
        return pixels_NCHW[:, 0, ::FACTOR, ::FACTOR].long()


class CornerEncoder:
    """Features: red of the first and of the last pixel of the first row, and 1."""

    spec = name = "corner"
    pooling, dim, fingerprint = "class", 3, "fp-corner"
    dtype, gives_grids = "float32", False

    def pixels(self, images):
        return torch.stack(
            [torch.from_numpy(np.asarray(i)[[0, 0], [0, -1], 0].copy()) for i in images]
        )

    def pool(self, pixels_N2):
        return torch.cat([pixels_N2.float() / 256, torch.ones(len(pixels_N2), 1)], dim=1)


@pytest.fixture(autouse=True)
def _encoder(monkeypatch):
    monkeypatch.setattr(module, "load_encoder", lambda spec, **_: CornerEncoder())


def picture(red, width, height):
    """Red on the left, 0 on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = red
    return Image.fromarray(pixels)


SIZES = [(32, 32), (64, 32), (32, 64), (48, 32), (90, 30)]


def make_source(folder, count, captions=lambda i: f"red {i}"):
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        picture(100 + i, *SIZES[i % len(SIZES)]).save(folder / f"{i}.png")
        row = {"file_name": f"{i}.png", "text": captions(i), "id": f"id{i}", "score": i / 2}
        lines.append(row | {"view": ["AP", "PA", None][i % 3]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def run(source, out, **changes):
    options = {"image_tokenizer": "red", "encoder": ("corner",), "size": SIZE, "batch_size": 4}
    options |= {"shard_rows": 10, "val_fraction": 0.2, "threads": 1, "workers": 0}
    config = PrepareConfig(source=str(source), out=out, **(options | changes))
    return prepare(config, RedTokenizer())


def rejects_of(out):
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]


def test_views_are_rows_of_train_beside_their_own(tmp_path):
    def caption(i):
        return "a thing on the left" if i == 3 else f"red {i}"

    out = run(make_source(tmp_path / "in", 25, caption), tmp_path / "out", views="flip")
    manifest = read_manifest(out)
    train, val = open_dataset(out, "train"), open_dataset(out, "val")
    assert val.view_of == [None] * len(val)
    whole = [id_ for id_, of in zip(train.ids, train.view_of, strict=True) if of is None]
    assert len(whole) + len(val) == 25
    assert manifest.splits["train"].views == len(train) - len(whole)
    assert manifest.splits["val"].views == 0
    assert manifest.framing["views"] == "flip"
    sided = {"id3"} & set(whole)
    assert len(train) == 2 * len(whole) - len(sided)
    for row, (id_, of) in enumerate(zip(train.ids, train.view_of, strict=True)):
        if of is None:
            assert train.samples[row] == id_
            continue
        assert (id_, train.view_of[row], train.ids[row - 1]) == (f"{of}#flip", of, of)
        assert train.samples[row] == id_
        assert train.texts[row] == train.texts[row - 1]
        codes = train.image_ids[row].reshape(4, 4)
        assert codes[0, 3] >= 100 > codes[0, 0]  # the red is on the right
        assert train.image_ids[row - 1][0] >= 100 > train.image_ids[row - 1][3]
        # The features are those of the very pixels that the codes are of.
        assert train.features["corner"][row, 0] == np.float16(codes[0, 0] / 256)
        assert train.features["corner"][row, 1] > 0.3  # red in the last pixel
        assert train.column("score")[row] == train.column("score")[row - 1]


def test_ten_crops_and_what_cannot_be_begun_anew(tmp_path):
    source = make_source(tmp_path / "in", 6)
    out = run(source, tmp_path / "out", views="ten-crop", val_fraction=0)
    train = open_dataset(out, "train")
    assert len(train) == 6 * 11
    assert read_manifest(out).splits["train"].views == 60
    with pytest.raises(ValueError, match="--views was ten-crop, now flip"):
        run(source, tmp_path / "out", views="flip", val_fraction=0)


def test_training_draws_one_view_of_each_picture_in_an_epoch(tmp_path):
    out = run(make_source(tmp_path / "in", 20), tmp_path / "out", views="flip", val_fraction=0)
    train = open_dataset(out, "train")
    config = ModelConfig(layers=1, hidden_size=16, heads=2, mlp_size=16, max_length=64)
    backbone = load_for_training(
        None, config, codebook_KC=torch.zeros(256, 2), captions=train.texts, seed=0
    )
    loader = Loader(train, backbone, batch_size=5, seed=3)
    assert loader.num_samples == 20
    epochs = [[tuple(loader.at(i).rows) for i in range(start, start + 20)] for start in (0, 20, 40)]
    for epoch in epochs:
        drawn = [train.view_of[row] or train.ids[row] for (row,) in epoch]
        assert sorted(drawn) == sorted(f"id{i}" for i in range(20))  # each picture once
        flips = sum(train.view_of[row] is not None for (row,) in epoch)
        assert 3 < flips < 17
    assert len(set(map(tuple, epochs))) == 3
    again = Loader(train, backbone, batch_size=10, accumulate=2, seed=3)
    assert [tuple(again.at(i).rows) for i in range(20, 40)] == epochs[1]
    shown = [micro.batch.num_images for micro in loader.in_order(100)]
    assert sum(shown) == 20  # validation shows no views


def test_buckets_keep_the_order_and_train_where_the_format_writes_the_size(tmp_path):
    out = run(make_source(tmp_path / "in", 25), tmp_path / "out", framing="buckets", val_fraction=0)
    train = open_dataset(out, "train")
    assert train.ids == [f"id{i}" for i in range(25)]
    grids = {tuple(grid) for grid in train.grids.tolist()}
    assert grids == {(4, 4), (2, 4), (4, 2), (2, 6)}
    for row, id_ in enumerate(train.ids):
        level = 100 + int(id_.removeprefix("id"))
        assert train.image_ids[row][0] == level
        assert train.features["corner"][row, 0] == np.float16(level / 256)
    config = ModelConfig(layers=1, hidden_size=16, heads=2, mlp_size=16, max_length=64)
    arguments = {"codebook_KC": torch.zeros(256, 2), "captions": train.texts, "seed": 0}
    writes = load_for_training(
        None, ModelConfig(**{**vars(config), "layout": "lumina"}), **arguments
    )
    micro = Loader(train, writes, batch_size=25, seed=0).step(0)[0]
    assert micro.batch.num_images == 25
    cells = sum(len(codes) for codes in train.image_ids)
    assert len(micro.batch.positions["hybnext"].flat_N) == cells
    fixed = load_for_training(None, config, **arguments)
    with pytest.raises(ValueError, match=r"4 grids .*paints one grid.*--framing crop or pad"):
        Loader(train, fixed, batch_size=25, seed=0)


def test_llamagen_refuses_buckets_before_the_first_step(tmp_path):
    out = run(make_source(tmp_path / "in", 5), tmp_path / "out", framing="buckets", val_fraction=0)
    train = open_dataset(out, "train")
    config = ModelConfig(architecture="llamagen", layers=1, hidden_size=16, heads=2, mlp_size=16)
    backbone = load_for_training(
        None,
        config,
        codebook_KC=torch.zeros(256, 2),
        captions=train.texts,
        seed=0,
        grid=(4, 4),
        class_names=["a", "b"],
    )
    with pytest.raises(ValueError, match=r"LlamaGen paints one grid"):
        Loader(train, backbone, batch_size=5, seed=0)


def test_a_template_a_condition_and_a_size_decide_which_rows_there_are(tmp_path):
    source = make_source(tmp_path / "in", 25)
    out = run(
        source,
        tmp_path / "out",
        val_fraction=0,
        where=("score >= 2.5", "score < 11"),
        caption_template="{view} view, {text}",
        max_aspect=2.5,
    )
    train = open_dataset(out, "train")
    kept = [i for i in range(5, 22) if i % 3 != 2 and i % 5 != 4]
    assert train.ids == [f"id{i}" for i in kept]
    assert train.texts == [f"{['AP', 'PA'][i % 3]} view, red {i}" for i in kept]
    rejects = rejects_of(out)
    assert sorted([r["row"] for r in rejects] + kept) == list(range(25))
    reasons = {r["row"]: r["reason"] for r in rejects}
    assert reasons[3] == "filtered: score 1.5 is not >= 2.5"
    assert reasons[22] == "filtered: score 11 is not < 11"
    assert reasons[5 + 3] == "the caption template needs view, which is missing"
    assert reasons[9] == "filtered: the aspect ratio is above 2.5 (90:30)"
    # The manifest says how the source was read, so that the same rows can be read again.
    manifest = read_manifest(out)
    part = reading_of(manifest.source).open(manifest.source["name"], "train")
    assert part.fingerprint == manifest.source["fingerprints"]["train"]
    with pytest.raises(ValueError, match="--where was"):
        run(source, tmp_path / "out", val_fraction=0, where=("score > 3",))


ROW = st.fixed_dictionaries(
    {
        "image": st.sampled_from(["good", "wide", "small", "cut", "missing", "outside"]),
        "text": st.sampled_from(["red", "a left one", "", None, "ein roter Kreis"]),
        "score": st.sampled_from([1, 4.5, None]),
        "twice": st.booleans(),
    }
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(ROW, min_size=1, max_size=12),
    framing=st.sampled_from(["crop", "pad", "buckets"]),
    views=st.sampled_from(["none", "flip"]),
    where=st.sampled_from([(), ("score >= 2",), ("text != red", "score in 1,4.5")]),
    template=st.sampled_from([None, "{score}: {text}"]),
    max_aspect=st.sampled_from([None, 2.0]),
)
def test_rows_in_are_rows_out_and_rejects_in_order(
    tmp_path_factory, rows, framing, views, where, template, max_aspect
):
    folder = tmp_path_factory.mktemp("in")
    lines = [{"file_name": "base.png", "text": "base", "score": 4.5, "id": "base"}]
    picture(50, 32, 32).save(folder / "base.png")
    for i, row in enumerate(rows):
        file = f"{i}.png" if row["image"] != "outside" else f"../{i}.png"
        if row["image"] in ("good", "wide", "small", "cut"):
            size = {"wide": (90, 30), "small": (4, 30)}.get(row["image"], (40, 32))
            picture(100 + i, *size).save(folder / f"{i}.png")
            if row["image"] == "cut":
                data = (folder / f"{i}.png").read_bytes()
                (folder / f"{i}.png").write_bytes(data[: len(data) // 2])
        id_ = "id0" if row["twice"] else f"id{i}"
        lines.append({"file_name": file, "text": row["text"], "score": row["score"], "id": id_})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = run(
        folder,
        tmp_path_factory.mktemp("made") / "out",
        framing=framing,
        views=views,
        where=() if where and where[0].startswith("text") and not rows else where,
        caption_template=template,
        max_aspect=max_aspect,
        val_fraction=0,
        shard_rows=5,
    )
    dataset = open_dataset(out, "train")
    own = [i for i, of in zip(dataset.ids, dataset.view_of, strict=True) if of is None]
    left = rejects_of(out)
    assert len(own) + len(left) == len(lines)
    assert [r["row"] for r in left] == sorted(r["row"] for r in left)
    gone = {r["row"] for r in left}
    assert own == [line["id"] for row, line in enumerate(lines) if row not in gone]
    assert all(r["reason"] for r in left)
