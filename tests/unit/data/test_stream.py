"""Streaming: the order computed, whatever the ranks; a cache that keeps its limit; bad stores."""

import os
import threading
from pathlib import Path

import bucket_store
import numpy as np
import pytest
import torch
from bucket_store import BucketStore, ConnectionAbortedByPeer, fill

from arra.config import ModelConfig
from arra.data import cache as module
from arra.data.cache import ShardCache, Stopped
from arra.data.loader import Loader
from arra.data.manifest import FeatureInfo, Manifest, SplitInfo, TokenizerInfo, write_manifest
from arra.data.shard_file import Row, shard_name, write_shard
from arra.data.shards import open_dataset
from arra.data.stream import Stream, open_beginning
from arra.models.base import Backbone
from arra.models.loading import load_for_training

CODES, SHARDS, ROWS = 16, 12, 9


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITS", (0.0,) * 5)
    BucketStore.objects.clear()
    BucketStore.fetched.clear()


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    config = ModelConfig(layers=1, hidden_size=16, heads=2, mlp_size=16, max_length=64)
    return load_for_training(
        None, config, codebook_KC=torch.zeros(CODES, 2), captions=["a red circle"] * 9, seed=0
    )


def row(number: int, random: np.random.Generator, **fields: object) -> Row:
    codes = random.integers(0, CODES, (2, 2))
    values = np.full(4, number + 1, np.float16)
    name = f"{number:04}"
    given = {"id": name, "sample": name, "image_index": 0} | fields
    return Row(text=f"number {number}", codes_hw=codes, features={"clip": values}, **given)


def written(folder: Path, shards: list[list[Row]], views: bool = False) -> Path:
    """A dataset of these shards, train and val alike."""
    infos = {
        split: [
            write_shard(folder / shard_name(split, i), rows, {"clip": 4}, {}, None, views)
            for i, rows in enumerate(shards)
        ]
        for split in ("train", "val")
    }
    info = FeatureInfo(4, "", "", "class", [0.5] * 4, [1.0, 0, 0, 0], [0, 1.0, 0, 0])
    manifest = Manifest(
        {name: SplitInfo(sum(s.rows for s in each), each) for name, each in infos.items()},
        TokenizerInfo("none", "none", CODES, 2),
        features={"clip": info},
        size=4,
        crop="none",
    )
    write_manifest(folder, manifest)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    rows = [row(i, random) for i in range(SHARDS * ROWS - 4)]
    shards = [rows[i * ROWS : (i + 1) * ROWS] for i in range(SHARDS)]
    return written(tmp_path_factory.mktemp("data"), shards)


@pytest.fixture
def bucket(data: Path) -> str:
    pytest.importorskip("upath")
    return fill("store/data", data)


def stream(folder: Path | str, cache: ShardCache | None = None, **settings: int) -> Stream:
    fields = {"window": 2, "lanes": 4} | settings
    return Stream(folder, "train", ["clip"], cache=cache or ShardCache(Path("none"), 1), **fields)


def loader(dataset: Stream, backbone: Backbone, **settings: object) -> Loader:
    return Loader(dataset, backbone, **({"batch_size": 8, "seed": 5} | settings))


def seen(drawn: Loader, steps: range) -> list[tuple[list[str], list[list[int]], list[float]]]:
    """Ids, tokens and features of each step; a stream's step is made and then asked for its ids."""
    found = []
    for step in steps:
        micros = drawn.step(step)
        ids = [drawn.dataset.ids[row] for micro in micros for row in micro.rows]
        assert ids == drawn.ids(step)
        features = [float(v[0]) for micro in micros for v in micro.features["clip"].values]
        assert features == [float(int(id_) + 1) for id_ in ids], "of the same image"
        found.append((ids, [r for m in micros for r in m.batch.labels_BT.tolist()], features))
    return found


def test_a_stream_gives_the_rows_of_the_order(data: Path, backbone: Backbone) -> None:
    drawn, whole = loader(stream(data), backbone), open_dataset(data)
    steps = seen(drawn, range(30))
    ids = [id_ for each, _, _ in steps for id_ in each]
    for lane in range(4):  # 26 samples each, 2 a step: an epoch is 13 steps
        epochs = [
            {id_ for each, _, _ in steps[e : e + 13] for id_ in each[2 * lane : 2 * lane + 2]}
            for e in (0, 13)
        ]
        assert [len(epoch) for epoch in epochs] == [26, 26]
    assert sorted(ids[: 8 * 13]) == sorted(ids[8 * 13 : 16 * 13]) == whole.ids
    micro = drawn.step(3)[0]
    plain = Loader(whole, backbone, batch_size=8, seed=5)
    alike = plain.collate([plain.sample(row) for row in micro.rows]).batch
    assert torch.equal(micro.batch.ids_BT, alike.ids_BT)
    assert len(drawn.dataset) == len(whole)
    assert drawn.dataset.first.ids == whole.ids[:ROWS]
    assert [drawn.sample(50).rows, drawn.num_samples] == [[50], len(whole)]


def test_ranks_together_see_what_one_sees(data: Path, backbone: Backbone) -> None:
    whole = [each[0] for each in seen(loader(stream(data), backbone), range(20))]
    for ranks in (2, 3, 4):
        parts = [
            seen(loader(stream(data), backbone, rank=r, ranks=ranks, accumulate=2), range(20))
            for r in range(ranks)
        ]
        together = [[id_ for part in parts for id_ in part[step][0]] for step in range(20)]
        assert together == whole


def test_any_step_alone_and_ahead(data: Path, backbone: Backbone) -> None:
    whole = seen(loader(stream(data), backbone), range(20))
    for step in (19, 7, 0):
        assert seen(loader(stream(data), backbone), range(step, step + 1)) == [whole[step]]
    drawn = loader(stream(data), backbone)
    with drawn.ahead(20, torch.device("cpu")):
        assert seen(drawn, range(20)) == whole
    assert drawn.dataset._pool is None
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]
    assert seen(drawn, range(1)) == whole[:1], "also afterwards"


def test_a_rank_reads_its_lanes_and_no_more_is_in_memory(bucket: str, tmp_path: Path) -> None:
    opened = stream(bucket, ShardCache(tmp_path, 10**9), window=1)
    order = opened.order(5, 8)
    for step in range(13):  # an epoch
        order.rows_at(step, np.arange(2))
        assert len(opened._parts) <= 3, "one lane: its window, the next one, and a border"
    opened.close()
    names = {key for key, _ in BucketStore.fetched if key.endswith(".parquet")}
    assert len(names) <= SHARDS // 4 + 2 + 2, "a quarter, borders, the first, the next epoch's"


def shards_on_disk(folder: Path) -> int:
    """Bytes, those on their way with their full length."""
    files: dict[int, int] = {}  # by inode: one may be renamed while this looks
    for path in folder.glob("*"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if path.is_file():
            files[status.st_ino] = status.st_size
    return sum(files.values())


def test_a_small_cache_keeps_its_limit(
    bucket: str,
    data: Path,
    backbone: Backbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = 3 * max(path.stat().st_size for path in data.glob("*.parquet"))
    most, free = [0], ShardCache._free

    def watched(self: ShardCache, size: int) -> bool:
        """Nothing is added but here, one at a time."""
        made = free(self, size)
        if made:
            most[0] = max(most[0], shards_on_disk(self.folder) + size)
        return made

    monkeypatch.setattr(ShardCache, "_free", watched)
    few = {"window": 1, "lanes": 2}  # six shards are in memory at most
    expected = seen(loader(stream(data, **few), backbone), range(26))
    drawn = loader(stream(bucket, ShardCache(tmp_path / "c", limit), **few), backbone)
    with drawn.ahead(26, torch.device("cpu")):
        assert seen(drawn, range(26)) == expected
    assert limit // 2 < most[0] <= limit
    fetched = [key for key, _ in BucketStore.fetched if key.endswith(".parquet")]
    assert len(fetched) > SHARDS + 4, "what was deleted came again in the second epoch"


def test_two_who_share_a_cache_fetch_a_shard_once(bucket: str, tmp_path: Path) -> None:
    first = stream(bucket, ShardCache(tmp_path, 10**9))
    shards = first._shards
    BucketStore.fetched.clear()

    def hold_all() -> None:
        own = ShardCache(tmp_path, 10**9)
        for shard in shards:
            own.hold(first.folder / shard.file, shard).close()

    threads = [threading.Thread(target=hold_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fetched = [key for key, length in BucketStore.fetched if length and key.endswith(".parquet")]
    assert len(fetched) == len(set(fetched)) == SHARDS - 1, "all but the first, which was there"


def test_what_is_held_stays_and_what_is_abandoned_goes(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROOM_WAIT", 0.2)
    opened = stream(bucket, ShardCache(tmp_path, 10**9))
    one, two, three = opened._shards[:3]
    size = max(len(BucketStore.objects[f"store/data/{s.file}"]) for s in (one, two, three))
    small = ShardCache(tmp_path / "small", 2 * size)
    held = [small.hold(opened.folder / shard.file, shard) for shard in (one, two)]
    with pytest.raises(ValueError, match="full of shards that are in use"):
        small.hold(opened.folder / three.file, three)
    held[0].close()
    small.hold(opened.folder / three.file, three).close()
    assert held[1].path.exists()
    assert not held[0].path.exists()
    left = tmp_path / "small" / ".x.parquet.nowhere-1-00000000.partial"
    left.write_bytes(b"0" * size)
    os.utime(left, (0, 0))
    held[1].close()
    small.hold(opened.folder / one.file, one).close()
    assert not left.exists()
    with pytest.raises(ValueError, match="is less than one shard"):
        ShardCache(tmp_path / "tiny", size // 2).hold(opened.folder / one.file, one)


def test_a_store_that_fails_now_and_then(
    bucket: str, data: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, fetch = [0], bucket_store.BucketFile._fetch_range

    def sometimes(self: bucket_store.BucketFile, start: int, end: int) -> bytes:
        asked[0] += 1
        if asked[0] % 3:
            raise ConnectionAbortedByPeer("try again")
        return fetch(self, start, end)

    opened = stream(bucket, ShardCache(tmp_path, 10**9))
    monkeypatch.setattr(bucket_store.BucketFile, "_fetch_range", sometimes)
    drawn = loader(opened, backbone)
    assert seen(drawn, range(8)) == seen(loader(stream(data), backbone), range(8))
    assert asked[0] > 10


def test_a_store_that_is_gone_is_named_once(
    bucket: str, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = loader(stream(bucket, ShardCache(tmp_path, 10**9)), backbone)
    monkeypatch.setattr(BucketStore, "answers", False)
    with (
        drawn.ahead(9, torch.device("cpu")),
        pytest.raises(OSError, match=r"shard bucket://.* cannot be fetched .*asked 6 times"),
    ):
        drawn.step(0)
    monkeypatch.setattr(BucketStore, "answers", True)
    assert seen(drawn, range(1)), "it is asked again"
    shard = drawn.dataset._shards[5]
    with pytest.raises(FileNotFoundError):
        ShardCache(tmp_path / "b", 10**9).hold(drawn.dataset.folder / "missing.parquet", shard)


def test_damage_is_fetched_once_more(bucket: str, tmp_path: Path) -> None:
    opened = stream(bucket, ShardCache(tmp_path / "a", 10**9))
    shard, key = opened._shards[3], "store/data/train-00003.parquet"
    good = BucketStore.objects[key]
    cache, source = ShardCache(tmp_path / "b", 10**9), opened.folder / shard.file
    BucketStore.objects[key] = good[:-1] + b"?"
    with pytest.raises(ValueError, match=r"train-00003\.parquet is damaged .*twice"):
        cache.hold(source, shard)
    assert shards_on_disk(tmp_path / "b") == 0
    BucketStore.objects[key] = good
    held = cache.hold(source, shard)
    held.close()
    held.path.write_bytes(good[:-1] + b"?")  # on the disk, before another process begins
    again = ShardCache(tmp_path / "b", 10**9).hold(source, shard)
    assert again.path.read_bytes() == good


def test_nobody_waits_for_a_store_at_the_end(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAITS", (60.0,) * 5)
    opened = stream(bucket, ShardCache(tmp_path, 10**9))
    monkeypatch.setattr(BucketStore, "answers", False)
    coming = opened._asked(4)
    opened.close()
    assert coming.cancelled() or isinstance(coming.exception(), Stopped)


def test_views_are_drawn_and_stay_with_their_picture(tmp_path: Path, backbone: Backbone) -> None:
    random = np.random.default_rng(1)

    def pictured(number: int) -> Row:
        name = f"{number:04}"
        flip = row(number, random, id=f"{name}#flip", sample=name, view_of=name)
        return row(number, random, views=(flip,))

    shards = [[pictured(i * 4 + j) for j in range(4)] for i in range(4)]
    folder = written(tmp_path / "d", shards, views=True)
    drawn = loader(stream(folder, lanes=2), backbone, batch_size=4)
    assert (drawn.num_samples, len(drawn.dataset)) == (16, 32)
    ids = [id_ for step in range(40) for id_ in drawn.ids(step)]
    assert len({id_.removesuffix("#flip") for id_ in ids[:16]}) == 16
    assert 50 < sum(id_.endswith("#flip") for id_ in ids) < 110


def test_samples_of_several_images_are_refused(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    shards = [[row(0, random, sample="a"), row(1, random, sample="a", image_index=1)]]
    folder = written(tmp_path / "d", shards)
    with pytest.raises(ValueError, match=r"samples of several images .* leave out --data\.stream"):
        stream(folder, lanes=1)


def test_only_the_beginning_of_a_validation_split_is_read(bucket: str, tmp_path: Path) -> None:
    val = open_beginning(bucket, "val", ["clip"], ShardCache(tmp_path, 10**9), ROWS + 1)
    assert len(val) == 2 * ROWS
    fetched = {key for key, _ in BucketStore.fetched if "val-" in key}
    assert len(fetched) == 2
