"""Caption features from `prepare` to micro-batches: the row's own, read singly, the same bytes."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_t5 import WIDTH, save_tiny_t5

from arra.data import vector_column
from arra.data.loader import Loader
from arra.data.manifest import read_manifest
from arra.data.prepare import prepare
from arra.data.prepare_config import PrepareConfig
from arra.data.shard_file import Row, write_shard
from arra.data.shards import open_dataset
from arra.data.text_column import GROUP_ROWS, TextColumn
from arra.encoders.text import load_text_encoder
from arra.layout import Layout
from arra.text_features import TextFeatures

ROWS, SLOTS = 45, 8


class Grey:
    """An image tokenizer of grey levels."""

    codebook_size, factor, fingerprint = 256, 8, "grey"

    def encode(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        return pixels_NCHW[:, 0, ::8, ::8].long()


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    save_tiny_t5(folder)
    return folder


def caption(i: int) -> str:
    return f"a photo of the small line {'red circle ' * (i % 5)}{i}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    lines = []
    for i in range(ROWS):
        Image.new("RGB", (16, 16), (i, i, i)).save(folder / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "text": caption(i)})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def settings(source: Path, t5: Path, out: Path, **changes: object) -> PrepareConfig:
    options = {"image_tokenizer": "grey", "text_encoder": f"t5={t5}", "size": 16, "batch_size": 4}
    options |= {"shard_rows": 20, "val_fraction": 0.1, "threads": 1}
    return PrepareConfig(source=str(source), out=out, **(options | changes))


@pytest.fixture(scope="module")
def prepared(source: Path, t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    return prepare(settings(source, t5, out), Grey())


def test_every_row_has_the_features_of_its_own_caption(prepared: Path, t5: Path) -> None:
    encoder = load_text_encoder(t5)
    seen = 0
    for split in ("train", "val"):
        dataset = open_dataset(prepared, split)
        column = dataset.text_features["t5"]
        assert len(column) == len(dataset)
        for row, text in enumerate(dataset.texts):
            (expected,) = encoder([text])
            assert column[row].dtype == np.float16
            torch.testing.assert_close(torch.tensor(column[row]), expected, rtol=2e-3, atol=1e-4)
            assert dataset.image_ids[row][0] == int(text.split()[-1])
            seen += 1
    assert seen == ROWS
    info = read_manifest(prepared).text_features["t5"]
    assert (info.dim, info.length, info.encoder) == (WIDTH, 120, encoder.fingerprint)
    assert info.spec == str(t5)


def test_stopped_anywhere_it_ends_at_the_same_bytes(
    prepared: Path, source: Path, t5: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare(settings(source, t5, out, workers=3), Grey())
    (out / "train-00001.parquet").unlink()
    (out / "val-00000.parquet").write_bytes(b"damaged")
    prepare(settings(source, t5, out), Grey())
    for file in (*prepared.glob("*.parquet"), prepared / "manifest.json"):
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def test_another_text_encoder_is_refused(
    prepared: Path, source: Path, t5: Path, tmp_path: Path
) -> None:
    save_tiny_t5(tmp_path, seed=1)
    for changes in ({"text_encoder": f"t5={tmp_path}"}, {"text_length": 9}, {"text_encoder": None}):
        with pytest.raises(
            ValueError, match=r"--text-encoder or --text-length of feature 'text_fe"
        ):
            prepare(settings(source, t5, prepared, **changes), Grey())
    moved = tmp_path / "moved"
    save_tiny_t5(moved)
    assert prepare(settings(source, moved, prepared, text_encoder=f"t5={moved}"), Grey())


def test_captions_are_cut_and_infinite_features_rejected(
    source: Path, t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = prepare(settings(source, t5, tmp_path / "cut", text_length=6, limit=9), Grey())
    assert {len(open_dataset(out).text_features["t5"][row]) for row in range(9)} == {6}

    encoder = load_text_encoder(t5)

    def broken(captions: list[str]) -> list[torch.Tensor]:
        return [
            f * torch.inf if c.endswith(" 3") else f
            for c, f in zip(captions, encoder(captions), strict=True)
        ]

    fake = SimpleNamespace(dim=WIDTH, fingerprint="x", spec="x", length=120, name="x")
    monkeypatch.setattr("arra.data.job.load_text_encoder", lambda *_: CallableEncoder(broken, fake))
    out = prepare(settings(source, t5, tmp_path / "broken", limit=9, val_fraction=0.0), Grey())
    assert len(open_dataset(out)) == 8
    (reject,) = (out / "rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["reason"] == "text feature 't5' is NaN or infinite in float16"


class CallableEncoder(SimpleNamespace):
    def __init__(self, function: object, fields: SimpleNamespace) -> None:
        super().__init__(function=function, **vars(fields))

    def __call__(self, captions: list[str]) -> list[torch.Tensor]:
        return self.function(captions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_encoder": "=x"}, "write NAME=ENCODER"),
        ({"text_encoder": "a b=x"}, "--text-encoder a b=x: write NAME=ENCODER"),
        ({"text_length": 0}, "--text-length must be at least 1"),
    ],
)
def test_wrong_use_is_named(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, tmp_path, tmp_path / "out", **options)


# ---- reading -------------------------------------------------------------------------------------


def written(folder: Path, counts: list[int], dim: int = 3) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    captions = [
        generator.normal(size=(1 + i % 7, dim)).astype(np.float16) for i in range(sum(counts))
    ]
    first = 0
    for number, count in enumerate(counts):
        rows = [
            Row(str(i), str(i), 0, "x", np.zeros((1, 1), int), {}, {}, {"t5": captions[i]})
            for i in range(first, first + count)
        ]
        write_shard(folder / f"train-{number:05d}.parquet", rows, {}, {}, {"t5": dim})
        first += count
    return captions


def column_of(folder: Path, counts: list[int], dim: int = 3) -> TextColumn:
    shards = [
        SimpleNamespace(file=f"train-{i:05d}.parquet", rows=count) for i, count in enumerate(counts)
    ]
    return TextColumn(folder, shards, "t5", dim)


def test_rows_are_read_with_their_group_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = [50, 1, 33]
    captions = written(tmp_path, counts)
    file = pq.ParquetFile(tmp_path / "train-00000.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(4)] == [16, 16, 16, 2]
    assert GROUP_ROWS == 16
    column = column_of(tmp_path, counts)
    read: list[tuple[int, int]] = []
    inner = column._read
    monkeypatch.setattr(
        column, "_read", lambda shard, group: (read.append((shard, group)), inner(shard, group))[1]
    )
    for row in (83, 0, 15, 16, 50, 51, 82, 0):
        assert np.array_equal(column[row], captions[row])
    assert read == [(2, 2), (0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    with pytest.raises(IndexError):
        column[84]


def test_memory_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [80]
    captions = written(tmp_path, counts)
    monkeypatch.setattr(vector_column, "CACHE_BYTES", 2 * 16 * 4 * 3 * 2)  # two groups of 4 x 3
    column = column_of(tmp_path, counts)
    for row in np.random.default_rng(1).integers(0, 80, 200).tolist():
        assert np.array_equal(column[row], captions[row])
        assert len(column._groups) <= 3
    assert column._bytes == sum(f.nbytes for group in column._groups.values() for f in group)


def test_damage_and_other_widths_are_named(tmp_path: Path) -> None:
    written(tmp_path, [20])
    with pytest.raises(ValueError, match="the manifest says 4 float16 a token"):
        column_of(tmp_path, [20], dim=4)[0]
    (tmp_path / "train-00000.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(ValueError, match=r"train-00000\.parquet is damaged"):
        column_of(tmp_path, [20])[0]


# ---- batches -------------------------------------------------------------------------------------


def painter(slots: int = SLOTS, width: int = WIDTH) -> SimpleNamespace:
    """What the loader needs of a backbone that is prompted by features."""
    prefix = list(range(256, 256 + slots))
    return SimpleNamespace(
        layout=Layout("grid", tuple(range(256)), pad=0),
        max_length=slots + 4,
        text_slots=slots,
        text_width=width,
        condition=lambda text, grid: prefix,
        without_prompt=lambda condition, grid: prefix,
        wrapping=lambda grid: ([], []),
        room=lambda grid: slots,
    )


def test_batches_carry_left_padded_captions(prepared: Path) -> None:
    dataset = open_dataset(prepared, features=())
    loader = Loader(dataset, painter(), batch_size=6, accumulate=2, seed=0, prompt_dropout=0.4)
    dropped = 0
    for step in range(4):
        for micro in loader.step(step):
            text = micro.text
            assert text.values_BND.shape == (3, SLOTS, WIDTH)
            assert text.values_BND.dtype == torch.float32
            for row in range(3):
                grey = int(micro.batch.ids_BT[row, SLOTS])
                index = next(i for i, t in enumerate(dataset.texts) if int(t.split()[-1]) == grey)
                stored = torch.tensor(dataset.text_features["t5"][index]).float()[:SLOTS]
                count = len(stored)
                assert text.mask_BN[row].tolist() == [False] * (SLOTS - count) + [True] * count
                assert torch.equal(text.values_BND[row, SLOTS - count :], stored)
                assert not text.values_BND[row, : SLOTS - count].any()
            dropped += int(text.dropped_B.sum())
            assert micro.to(torch.device("cpu")).text is not None
    assert 3 <= dropped <= 17
    again = Loader(dataset, painter(), batch_size=6, seed=0, prompt_dropout=0.4)
    whole, parts = again.step(3)[0].text, [m.text for m in loader.step(3)]
    assert torch.equal(whole.values_BND, torch.cat([p.values_BND for p in parts]))
    assert torch.equal(whole.dropped_B, torch.cat([p.dropped_B for p in parts]))
    assert not next(again.in_order(3)).text.dropped_B.any()


def test_an_empty_caption_is_the_null_caption_under_one_token() -> None:
    text = TextFeatures.of([None, torch.ones(2, 3)], [False, True], 4, 3)
    assert text.mask_BN.tolist() == [[False] * 3 + [True], [False] * 2 + [True] * 2]
    assert text.dropped_B.tolist() == [True, True]


def test_a_row_without_a_caption_is_trained_as_it_is_painted(prepared: Path) -> None:
    dataset = open_dataset(prepared, features=())
    dataset.texts = ["", *dataset.texts[1:]]
    loader = Loader(dataset, painter(), batch_size=2, seed=0)
    text = next(loader.in_order(2)).text
    painted = TextFeatures.of([None], [False], SLOTS, WIDTH)
    assert text.dropped_B.tolist() == [True, False]
    assert torch.equal(text.mask_BN[:1], painted.mask_BN)
    assert torch.equal(text.values_BND[:1], painted.values_BND)


def test_what_does_not_fit_is_named(prepared: Path) -> None:
    dataset = open_dataset(prepared, features=())
    sizes = {"batch_size": 1, "seed": 0}
    with pytest.raises(ValueError, match="16 values a token, the model takes 32"):
        Loader(dataset, painter(width=32), **sizes)
    with pytest.raises(ValueError, match=r"--data\.text"):
        Loader(dataset, painter(), passages=["words"], text_rows=1, **sizes)
    dataset.text_features = {}
    with pytest.raises(ValueError, match=r"the dataset has none: prepare it with --text-encoder"):
        Loader(dataset, painter(), **sizes)


def test_a_sample_of_several_images_is_refused(prepared: Path) -> None:
    dataset = open_dataset(prepared, features=())
    dataset.samples[1] = dataset.samples[0]
    with pytest.raises(ValueError, match="several images"):
        Loader(dataset, painter(), batch_size=1, seed=0)
