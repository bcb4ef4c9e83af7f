"""The loader: an order that depends on (seed, step) only, and rows that belong together."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from arra.config import ModelConfig
from arra.data.loader import Loader
from arra.models.base import Backbone
from arra.models.loading import load_for_training

N, CODES = 10, 16
TEXTS = [f"a picture of number {i}" for i in range(N)]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    config = ModelConfig(layers=1, hidden_size=16, heads=2, mlp_size=16, max_length=64)
    return load_for_training(
        None, config, codebook_KC=torch.zeros(CODES, 2), captions=TEXTS, seed=0
    )


def dataset(samples: list[str] | None = None, texts: list[str] = TEXTS) -> SimpleNamespace:
    generator = np.random.default_rng(0)
    info = SimpleNamespace(
        dim=4, mean=[0.5] * 4, unit_mean=[1.0, 0, 0, 0], centred_unit_mean=[0, 1.0, 0, 0]
    )
    return SimpleNamespace(
        split="train",
        ids=[str(i) for i in range(N)],
        view_of=[None] * N,
        samples=samples or [str(i) for i in range(N)],
        texts=texts,
        image_ids=[generator.integers(0, CODES, 4, dtype=np.int32) for _ in range(N)],
        grids=np.full((N, 2), 2, np.int16),
        features={"clip": np.arange(N * 4, dtype=np.float16).reshape(N, 4)},
        patch_features={},
        manifest=SimpleNamespace(features={"clip": info}),
    )


def loader(backbone: Backbone, data: SimpleNamespace, **settings: object) -> Loader:
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
    assert len(loader(backbone, together).samples) == N - 1
    monkeypatch.setattr(backbone, "wrapping", lambda grid: ([1], [2]))
    assert len(loader(backbone, dataset()).samples) == N
    with pytest.raises(ValueError, match="samples of several images, but the prompts of CausalLM"):
        loader(backbone, together)
