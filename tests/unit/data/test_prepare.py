"""prepare: rows that belong together, the same bytes whatever happened, and clear refusals."""

import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from red_models import SIZE, RedEncoder, RedTokenizer, config, content, make_source

from arra.data import job as module
from arra.data.manifest import read_manifest
from arra.data.prepare import prepare
from arra.data.prepare_config import named_encoders
from arra.data.shards import open_dataset


@pytest.fixture
def encoder(monkeypatch):
    made = RedEncoder()
    monkeypatch.setattr(module, "load_encoder", lambda spec, device, grids, dtype: made)
    return made


def test_codes_features_and_texts_of_a_row_come_from_one_image(tmp_path, encoder):
    source = make_source(tmp_path / "in", 34)
    (source / "5.png").write_bytes(b"")
    (source / "17.png").unlink()
    out = prepare(config(source, tmp_path / "out"), RedTokenizer())
    seen = []
    for split in ("train", "val"):
        dataset = open_dataset(out, split)
        for row, id_ in enumerate(dataset.ids):
            level = int(id_.removeprefix("id"))
            assert dataset.texts[row] == f"red {level}"
            assert dataset.image_ids[row].tolist() == [level] * 4
            assert dataset.features["red"][row, 0] == np.float16(level / 256)
            assert dataset.grids[row].tolist() == [2, 2]
            assert dataset.column("label")[row] == level % 2
            seen.append(level)
    assert sorted(seen) == [i for i in range(34) if i not in (5, 17)]
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert {(r["row"], r["id"]) for r in rejects} == {(5, "id5"), (17, "id17")}
    assert {r["reason"].split(" ")[0] for r in rejects} == {"the", "missing"}
    assert read_manifest(out).rejects == 2


def test_one_crop_feeds_tokenizer_and_encoder(tmp_path, encoder):
    source = tmp_path / "in"
    source.mkdir()
    generator = np.random.default_rng(0)
    for i in range(5):
        pixels = generator.integers(0, 256, (30 + i, 25, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(source / f"{i}.png")
        (source / f"{i}.txt").write_text("noise")
    tokenizer = RedTokenizer()
    prepare(config(source, tmp_path / "out", workers=0, val_fraction=0), tokenizer)
    coded = torch.cat(tokenizer.batches).permute(0, 2, 3, 1).numpy()
    assert coded.shape == (5, SIZE, SIZE, 3)
    blank, *seen = encoder.seen
    assert not blank.any()
    assert np.array_equal(coded, np.stack(seen))
    assert [len(batch) for batch in tokenizer.batches] == [4, 1]


def test_batches_do_not_cross_shards(tmp_path, encoder):
    source = make_source(tmp_path / "in", 25)
    tokenizer = RedTokenizer()
    prepare(config(source, tmp_path / "out", val_fraction=0), tokenizer)
    assert [len(batch) for batch in tokenizer.batches] == [4, 4, 2, 4, 4, 2, 4, 1]


def test_stopped_anywhere_it_ends_at_the_same_bytes(tmp_path, encoder, monkeypatch):
    source = make_source(tmp_path / "in", 34)
    prepare(config(source, tmp_path / "whole"), RedTokenizer())
    expected = content(tmp_path / "whole")
    real = module.write_sealed
    for stop in range(1, 6):

        def failing(path, value, *, left=[stop]):  # noqa: B006 - counts down
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            real(path, value)

        out = tmp_path / f"stopped-{stop}"
        monkeypatch.setattr(module, "write_sealed", failing)
        with pytest.raises(KeyboardInterrupt):
            prepare(config(source, out), RedTokenizer())
        monkeypatch.setattr(module, "write_sealed", real)
        assert not (out / "manifest.json").exists()
        tokenizer = RedTokenizer()
        prepare(config(source, out), tokenizer)
        assert content(out) == expected
        assert len(torch.cat(tokenizer.batches)) <= 34 - 10 * min(3, stop - 1)


def test_a_finished_dataset_is_left_alone_and_a_damaged_one_repaired(tmp_path, encoder):
    source = make_source(tmp_path / "in", 34)
    out = prepare(config(source, tmp_path / "out"), RedTokenizer())
    expected = content(out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    tokenizer = RedTokenizer()
    prepare(config(source, out), tokenizer)
    assert tokenizer.batches == []
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times

    shard = out / "train-00001.parquet"
    damaged = bytearray(shard.read_bytes())
    damaged[40] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(ValueError, match="arra prepare"):
        open_dataset(out)
    prepare(config(source, out), tokenizer)
    assert len(torch.cat(tokenizer.batches)) == 10
    assert content(out) == expected

    for name in ("manifest.json", "rejects.jsonl", ".progress/train-00000.json"):
        (out / name).write_text("{")
        prepare(config(source, out), RedTokenizer())
        assert content(out) == expected
    (out / "train-00002.parquet").unlink()
    prepare(config(source, out), RedTokenizer())
    assert content(out) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 24}, "--size was 16, now 24"),
        ({"batch_size": 8}, "--batch-size was 4, now 8"),
        ({"limit": 9}, "--limit was None, now 9"),
        ({"seed": 1}, "--seed was 0, now 1"),
        ({"threads": 2}, "--threads was 1, now 2"),
        ({"encoder": ()}, "the encoder of feature 'red' is another"),
        ({"encoder": ("blue=x",)}, "the encoder of feature 'blue' is another"),
    ],
)
def test_changed_settings_are_refused(tmp_path, encoder, changes, message):
    source = make_source(tmp_path / "in", 12)
    out = prepare(config(source, tmp_path / "out"), RedTokenizer())
    before = content(out)
    with pytest.raises(ValueError, match=message):
        prepare(config(source, out, **changes), RedTokenizer())
    assert content(out) == before


def test_changed_parts_are_refused(tmp_path, encoder):
    source = make_source(tmp_path / "in", 12)
    out = prepare(config(source, tmp_path / "out"), RedTokenizer())
    other = RedTokenizer()
    other.fingerprint = "another"
    with pytest.raises(ValueError, match="the image tokenizer is another"):
        prepare(config(source, out), other)
    encoder.fingerprint = "another"
    with pytest.raises(ValueError, match="encoder of feature 'red' is another"):
        prepare(config(source, out), RedTokenizer())
    encoder.fingerprint = "fp-red"
    make_source(source, 13)
    with pytest.raises(ValueError, match="source's content is another"):
        prepare(config(source, out), RedTokenizer())


def test_a_folder_with_other_things_is_refused(tmp_path, encoder):
    source = make_source(tmp_path / "in", 3)
    with pytest.raises(ValueError, match="not empty and no prepared dataset"):
        prepare(config(source, source), RedTokenizer())


def test_full_disk(tmp_path, encoder, monkeypatch):
    source = make_source(tmp_path / "in", 34)
    prepare(config(source, tmp_path / "whole"), RedTokenizer())
    real = module.write_shard

    def full(path, *rest):
        if path.name == "train-00002.parquet":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, *rest)

    monkeypatch.setattr(module, "write_shard", full)
    with pytest.raises(OSError, match="2 of 5 shards are finished and kept") as caught:
        prepare(config(source, tmp_path / "out"), RedTokenizer())
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.setattr(module, "write_shard", real)
    prepare(config(source, tmp_path / "out"), RedTokenizer())
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_features_that_cannot_be_aligned_to_are_left_out(tmp_path, encoder):
    encoder.odd = {2: float("nan"), 3: 1e6, 5: 0.0}
    out = prepare(config(make_source(tmp_path / "in", 8), tmp_path / "out"), RedTokenizer())
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert {r["id"]: r["reason"] for r in rejects} == {
        "id2": "feature 'red' is NaN or infinite in float16",
        "id3": "feature 'red' is NaN or infinite in float16",
        "id5": "feature 'red' is zero everywhere in float16",
    }
    assert len(open_dataset(out)) == 5


def test_nothing_usable(tmp_path, encoder):
    source = make_source(tmp_path / "in", 3)
    for i in range(3):
        (source / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no row .* can be used, the first because: .*empty"):
        prepare(config(source, tmp_path / "out"), RedTokenizer())
    assert len((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()) == 3


def test_statistics(tmp_path, encoder):
    out = prepare(config(make_source(tmp_path / "in", 34), tmp_path / "out"), RedTokenizer())
    info = read_manifest(out).features["red"]
    value_ND = open_dataset(out).features["red"].astype(np.float64)
    unit_ND = value_ND / np.linalg.norm(value_ND, axis=1, keepdims=True)
    centred_ND = value_ND - value_ND.mean(axis=0)
    centred_ND /= np.linalg.norm(centred_ND, axis=1, keepdims=True)
    np.testing.assert_allclose(info.mean, value_ND.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(info.unit_mean, unit_ND.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(info.centred_unit_mean, centred_ND.mean(axis=0), atol=1e-12)
    assert (info.dim, info.encoder, info.pooling) == (2, "fp-red", "class")


def test_val_is_taken_from_train_only_where_there_is_none(tmp_path, encoder):
    source = make_source(tmp_path / "in", 40)
    taken = {}
    for seed in (0, 1):
        out = prepare(config(source, tmp_path / f"s{seed}", seed=seed), RedTokenizer())
        train, val = open_dataset(out), open_dataset(out, "val")
        assert (len(train), len(val)) == (36, 4)
        assert len({*train.ids, *val.ids}) == 40
        taken[seed] = val.ids
    assert taken[0] != taken[1]
    none = prepare(config(source, tmp_path / "none", val_fraction=0), RedTokenizer())
    assert list(read_manifest(none).splits) == ["train"]
    for split in ("train", "val", "test"):
        make_source(tmp_path / "three" / split, 12)
    out = prepare(config(tmp_path / "three", tmp_path / "o3"), RedTokenizer())
    assert {k: v.rows for k, v in read_manifest(out).splits.items()} == {
        "train": 12,
        "val": 12,
        "test": 12,
    }
    chosen = config(tmp_path / "three", tmp_path / "o1", splits=("test",), limit=5)
    assert list(read_manifest(prepare(chosen, RedTokenizer())).splits) == ["test"]


def test_rows_of_one_sample(tmp_path, encoder):
    source = make_source(tmp_path / "in", 4)
    lines = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line |= {"sample": f"pair{i // 2}", "image_index": i % 2}
    lines[3]["image_index"] = -1
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = prepare(config(source, tmp_path / "out", val_fraction=0), RedTokenizer())
    dataset = open_dataset(out)
    assert dataset.samples == ["pair0", "pair0", "pair1"]
    assert dataset.image_index.tolist() == [0, 1, 0]
    assert dataset.manifest.columns == {"label": "int64"}
    assert "image_index -1" in (out / "rejects.jsonl").read_text()


def test_without_encoders(tmp_path):
    out = prepare(
        config(make_source(tmp_path / "in", 3), tmp_path / "out", encoder=()), RedTokenizer()
    )
    assert open_dataset(out).features == {}


def test_refusals(tmp_path, encoder, monkeypatch):
    source = make_source(tmp_path / "in", 3)
    with pytest.raises(ValueError, match="one code of 8 pixels: choose a multiple"):
        prepare(config(source, tmp_path / "out", size=20), RedTokenizer())
    with pytest.raises(ValueError, match="two encoders are called 'red'"):
        prepare(config(source, tmp_path / "out", encoder=("a", "b")), RedTokenizer())
    with pytest.raises(ValueError, match=r"no column 'caption'.*file_name, text, id, label"):
        prepare(config(source, tmp_path / "out", text_column="caption"), RedTokenizer())
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        prepare(config(source, tmp_path / "out", splits=("test",)), RedTokenizer())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no GPU here"):
        prepare(config(source, tmp_path / "out", device="cuda"), RedTokenizer())
    assert not (tmp_path / "out").exists()
    for wrong in ({"size": 0}, {"limit": 0}, {"val_fraction": 1.0}, {"workers": -1}):
        with pytest.raises(ValueError, match="--" + next(iter(wrong)).replace("_", "-")):
            config(source, tmp_path / "out", **wrong)


def test_encoder_names():
    assert named_encoders(("a=x/y@mean", "p/q=r", "z")) == {"a": ["x/y@mean"], None: ["p/q=r", "z"]}
    with pytest.raises(ValueError, match="given twice"):
        named_encoders(("a=x", "a=y"))
    with pytest.raises(ValueError, match="write NAME=ENCODER"):
        named_encoders(("ä b=x",))


def test_plain_lines_elsewhere_than_on_a_terminal(tmp_path, encoder, capsys, monkeypatch):
    monkeypatch.setattr("arra.data.progress.LINE_EVERY", 0.0)
    source = make_source(tmp_path / "in", 34)
    (source / "3.png").write_bytes(b"")
    prepare(config(source, tmp_path / "out"), RedTokenizer())
    captured = capsys.readouterr()
    assert captured.out == ""
    *lines, left_out, reason = captured.err.splitlines()
    assert left_out.startswith("prepare: 1 row was left out")
    assert reason.split() == [
        "prepare:",
        "1",
        "the",
        "image",
        "file",
        "is",
        "empty",
        "(N",
        "bytes)",
    ]
    assert all(line.startswith("prepare: ") for line in lines)
    assert any("about" in line and "left" in line for line in lines)
    assert lines[-1].startswith("prepare: 34/34 images")
    assert ", 1 left out, device " in lines[-1]
    assert re.search(
        r"device \d+% busy, waiting \d+% for pictures and \d+% for the disk$", lines[-1]
    )


def test_the_manifest_names_paths_that_hold_anywhere(tmp_path, encoder, monkeypatch):
    make_source(tmp_path / "in", 3)
    monkeypatch.chdir(tmp_path)
    out = prepare(config("in", Path("out")), RedTokenizer())
    assert read_manifest(out).source["name"] == str(tmp_path / "in")
