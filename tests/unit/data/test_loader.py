"""The loader: an order that depends on (seed, step) only, and rows that belong together."""

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from arra.batch import Batch
from arra.config import ModelConfig
from arra.data.ahead import Ahead
from arra.data.loader import Loader
from arra.data.manifest import FeatureInfo, Manifest, SplitInfo, TokenizerInfo
from arra.data.one_image import OneImage
from arra.data.sequences import Sequences
from arra.data.shards import Dataset
from arra.layout import Image, Layout, Text
from arra.models.base import Backbone
from arra.models.loading import load_for_training

N, CODES = 10, 16
ORDER = [[8, 0, 7], [1, 3, 6], [2, 4, 5], [9, 8, 2], [4, 1, 3]]
DROPPED = [[d == "1" for d in step] for step in ("000", "011", "110", "001", "111")]
"""Of seed 7, 10 images, batches of 3 and half of the prompts, as version 0.1 drew them."""
TEXTS = [f"a picture of number {i}" for i in range(N)]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    config = ModelConfig(layers=1, hidden_size=16, heads=2, mlp_size=16, max_length=64)
    return load_for_training(
        None, config, codebook_KC=torch.zeros(CODES, 2), captions=TEXTS, seed=0
    )


def dataset(samples: list[str] | None = None, texts: list[str] = TEXTS) -> Dataset:
    """N images of 2 x 2 random codes; the feature's values of row i are 4 i, 4 i + 1, ..."""
    generator = np.random.default_rng(0)
    count = len(texts)
    codes = generator.integers(0, CODES, (count, 4), dtype=np.int32)
    info = FeatureInfo(4, "", "", "class", [0.5] * 4, [1.0, 0, 0, 0], [0, 1.0, 0, 0])
    manifest = Manifest(
        splits={"train": SplitInfo(count, [])},
        tokenizer=TokenizerInfo("", "", CODES, 1),
        features={"clip": info},
        size=2,
        crop="none",
    )
    sides = pa.array([2] * count, pa.int16())
    table = pa.table(
        {
            "id": [str(i) for i in range(count)],
            "sample": samples or [str(i) for i in range(count)],
            "text": texts,
            "image_index": pa.array([0] * count, pa.int16()),
            "grid_height": sides,
            "grid_width": sides,
            "image_ids": pa.array(codes.tolist(), pa.list_(pa.int32())),
        }
    )
    made = Dataset(Path("."), "train", manifest, table)
    made.features = {"clip": np.arange(count * 4, dtype=np.float16).reshape(count, 4)}
    return made


def loader(backbone: Backbone, data: Dataset, **settings: object) -> Loader:
    fields = {"batch_size": 4, "seed": 7} | settings
    return Loader(data, backbone, **fields)


def test_a_feature_row_and_its_codes_come_from_the_same_image(backbone: Backbone) -> None:
    data = dataset()
    micro = loader(backbone, data).step(0)[0]
    first = backbone.layout.code_ids[0]
    positions = micro.batch.positions["hybnext"]
    ids = micro.batch.labels_BT.flatten()[positions.flat_N]
    for image, value in enumerate(micro.features["clip"].values):
        row = int(value[0]) // 4
        codes = (ids[positions.image_N == image] - first).tolist()
        assert codes == data.image_ids[row].tolist()


def order(a: Loader, steps: int) -> list[int]:
    return [
        int(v[0]) // 4
        for step in range(steps)
        for micro in a.step(step)
        for v in micro.features["clip"].values
    ]


def test_every_epoch_holds_every_row_once_in_another_order(backbone: Backbone) -> None:
    seen = order(loader(backbone, dataset()), 5)
    assert sorted(seen[:10]) == list(range(10)) == sorted(seen[10:])
    assert seen[:10] != seen[10:]


def test_the_order_does_not_depend_on_micro_batches_or_on_history(backbone: Backbone) -> None:
    data = dataset()
    whole = order(loader(backbone, data), 4)
    assert order(loader(backbone, data, accumulate=2), 4) == whole
    late = loader(backbone, data)
    assert torch.equal(late.step(3)[0].batch.ids_BT, loader(backbone, data).step(3)[0].batch.ids_BT)
    assert order(loader(backbone, data, seed=8), 4) != whole


def test_prompt_dropout_replaces_the_prompt_by_the_null_condition(backbone: Backbone) -> None:
    data = dataset()
    dropped = loader(backbone, data, prompt_dropout=0.999999).step(0)[0].batch
    null = backbone.null_condition((2, 2))
    begin = backbone.layout.begin
    for ids in dropped.ids_BT.tolist():
        assert ids[: len(null) + 1] == [*null, begin]
    assert dropped.positions["hybnext"].flat_N.numel() == 4 * 4, "dropped rows are aligned too"
    some = [
        ids[1] == begin
        for step in range(50)
        for ids in loader(backbone, data, prompt_dropout=0.3).step(step)[0].batch.ids_BT.tolist()
    ]
    assert 0.2 < np.mean(some) < 0.4


def test_rows_of_one_sample_share_a_sequence(backbone: Backbone) -> None:
    samples = ["a", "b", "a", *map(str, range(3, N))]
    texts = ["before <image> between", "alone", "", *TEXTS[3:]]
    data = dataset(samples, texts)
    micro = next(loader(backbone, data, batch_size=1).in_order(1))
    assert micro.batch.num_images == 2
    assert micro.batch.ids_BT.shape[0] == 1
    assert [int(v[0]) // 4 for v in micro.features["clip"].values] == [0, 2]
    layout = backbone.layout
    begins = [t for t, i in enumerate(micro.batch.ids_BT[0].tolist()) if i == layout.begin]
    between = backbone.text_ids(" between")
    assert begins[1] - begins[0] == layout.image_length(2, 2) + len(between)


def test_text_only_rows_have_labels_and_no_image(backbone: Backbone) -> None:
    mixed = loader(backbone, dataset(), passages=["some prose", "more prose"], text_rows=2)
    batch = mixed.step(0)[0].batch
    assert batch.ids_BT.shape[0] == 6
    assert batch.num_images == 4
    expected = sum(len(backbone.text_ids(text)) for text in ("some prose", "more prose"))
    assert int((batch.labels_BT[4:] >= 0).sum()) == expected


def test_constants_follow_the_manifest(backbone: Backbone) -> None:
    raw = loader(backbone, dataset()).step(0)[0].features["clip"]
    centred = loader(backbone, dataset(), centred=True).step(0)[0].features["clip"]
    assert raw.constant.tolist() == [1, 0, 0, 0]
    assert centred.constant.tolist() == [0, 1, 0, 0]
    assert raw.mean.tolist() == [0.5] * 4


def test_a_family_that_closes_its_prompts_takes_one_image_a_row(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = dataset(["a", "a", *map(str, range(2, N))])
    assert loader(backbone, together).num_samples == N - 1
    monkeypatch.setattr(backbone, "wrapping", lambda grid: ([1], [2]))
    assert loader(backbone, dataset()).num_samples == N
    with pytest.raises(ValueError, match="samples of several images, but the prompts of CausalLM"):
        loader(backbone, together)


# ---- whole arrays, and ahead ---------------------------------------------------------------------


def equal(one: Batch, other: Batch) -> None:
    assert one.num_images == other.num_images
    pairs = [
        (getattr(one, name), getattr(other, name))
        for name in ("ids_BT", "labels_BT", "attention_BT", "trained_N")
    ]
    for name, positions in one.positions.items():
        same = other.positions[name]
        pairs += [
            (getattr(positions, f), getattr(same, f)) for f in ("flat_N", "image_N", "cell_N")
        ]
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


FORMATS = {
    "grid": Layout("grid", tuple(range(100, 116)), pad=0),
    "rep": Layout("chameleon", tuple(range(100, 116)), pad=0, begin=1, end=2, rep=9),
    "closing": Layout("lumina", tuple(range(100, 116)), 0, 1, 2, 3, 50, 9, closing=6),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("train_text", [False, True])
def test_whole_arrays_make_what_one_token_after_the_other_makes(
    name: str, train_text: bool
) -> None:
    layout, random = FORMATS[name], np.random.default_rng(1)
    fast = OneImage(layout, train_text)
    for _ in range(30):
        count = int(random.integers(1, 6))
        grids = [((1, 2), (2, 2), (3, 4))[i] for i in random.integers(0, 3, count)]
        prompts = [random.integers(200, 300, random.integers(1, 9)) for _ in grids]
        if name != "grid":
            prompts[0] = prompts[0][:0]  # nothing before the image
        codes = [random.integers(0, CODES, h * w) for h, w in grids]
        passages = [random.integers(200, 300, random.integers(1, 40)) for _ in range(count % 3)]
        made = fast.batch(prompts, np.concatenate(codes), grids, passages)
        samples = [
            layout.sample(
                [Text(tuple(p.tolist())), Image(tuple(c.tolist()), *g)], train_text=train_text
            )
            for p, c, g in zip(prompts, codes, grids, strict=True)
        ]
        samples += [layout.sample([Text(tuple(p.tolist()))], train_text=True) for p in passages]
        equal(made, layout.collate(samples))


def test_whole_arrays_refuse_codes_of_another_tokenizer() -> None:
    with pytest.raises(ValueError, match="image code 16 is outside the codebook of 16"):
        OneImage(FORMATS["rep"]).batch([np.array([5])], np.array([0, 16]), [(1, 2)])
    with pytest.raises(ValueError, match="image code -1"):
        OneImage(FORMATS["rep"]).batch([np.array([5])], np.array([-1, 3]), [(1, 2)])


def test_rows_of_every_kind_are_as_if_laid_out_one_by_one(backbone: Backbone) -> None:
    words = ["red", "<image>", "circle", "of", "blue"]
    random = np.random.default_rng(2)
    texts = [" ".join(random.choice(words[::2], n)) for n in random.integers(0, 60, N)]
    for captions in (texts, ["", *TEXTS[1:]], [" ".join(random.choice(words, 4)) for _ in texts]):
        data = dataset(None, captions)
        made = Sequences(data, backbone, train_text=True)
        for _ in range(10):
            rows = random.permutation(N)[:5].tolist()
            asked = (
                [[row] for row in rows],
                [bool(random.random() < 0.4) for _ in rows],
                ["prose"],
            )
            equal(made.batch(*asked), made.one_by_one(*asked))


def test_the_order_is_what_it_was(backbone: Backbone) -> None:
    """Runs that were begun earlier go on as they were."""
    drawn = loader(backbone, dataset(), batch_size=3, prompt_dropout=0.5)
    micros = [drawn.step(step)[0] for step in range(5)]
    assert [list(m.rows) for m in micros] == ORDER
    null = len(backbone.null_condition((2, 2)))
    begins = [[row.index(backbone.layout.begin) for row in m.batch.ids_BT.tolist()] for m in micros]
    assert [[first == null for first in each] for each in begins] == DROPPED
    assert drawn.ids(1) == [str(row) for row in ORDER[1]]


def test_what_is_made_ahead_is_the_same(backbone: Backbone) -> None:
    data = dataset()
    settings = {"accumulate": 2, "prompt_dropout": 0.3}
    plain, ahead = (loader(backbone, data, **settings) for _ in range(2))
    with ahead.ahead(6, torch.device("cpu")):
        for step in (0, 1, 2, 5, 3, 4, 5, 6, 7):  # steps left out, gone back to, and beyond the end
            for one, other in zip(plain.step(step), ahead.step(step), strict=True):
                equal(one.batch, other.batch)
                assert one.rows == other.rows
    assert ahead.waited > 0
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_a_mistake_is_raised_at_its_own_step() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise ValueError("shard 2 is damaged")
        return step

    ahead = Ahead(make, end=9)
    assert [ahead.take(0), ahead.take(1)] == [0, 1]
    with pytest.raises(ValueError, match="shard 2"):
        ahead.take(2)
    assert ahead.take(3) == 3
    ahead.close()


def test_no_more_is_made_than_asked_for() -> None:
    made: list[int] = []
    ahead = Ahead(made.append, end=5, depth=2)
    ahead.take(0)
    ahead.close()
    assert set(made) <= {0, 1, 2}


def test_a_thread_that_is_interrupted_ends(backbone: Backbone) -> None:
    drawn = loader(backbone, dataset())

    def interrupted() -> None:
        with drawn.ahead(100, torch.device("cpu")):
            drawn.step(0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]
    assert drawn.step(1)[0].batch.num_images == 4
