"""Several machines, and several commands at once, on one dataset."""

import errno
import itertools
import os
import threading
from pathlib import Path

import pytest
import red_models as red

from arra.data import job
from arra.data.batch_size import ON_CPU
from arra.data.plan import FILE as PLAN
from arra.data.prepare import prepare
from arra.data.prepare_config import shard_of
from arra.files import _host, read_sealed


@pytest.fixture(autouse=True)
def encoder(monkeypatch):
    made = red.RedEncoder()
    monkeypatch.setattr(job, "load_encoder", lambda spec, device, grids, dtype: made)
    return made


@pytest.fixture
def source(tmp_path):
    folder = red.make_source(tmp_path / "in", 34)
    (folder / "7.png").write_bytes(b"")
    return folder


@pytest.fixture
def whole(tmp_path, source):
    return red.content(prepare(red.config(source, tmp_path / "whole"), red.RedTokenizer()))


def at_once(*jobs):
    """Runs functions in threads; returns what they raised."""
    raised: list[BaseException | None] = [None] * len(jobs)
    barrier = threading.Barrier(len(jobs))

    def run(place):
        barrier.wait()
        try:
            jobs[place]()
        except (ValueError, OSError) as error:
            raised[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[::2])
def test_machines_share_the_shards_and_the_last_completes(tmp_path, source, whole, order, capsys):
    tokenizer, out = red.RedTokenizer(), tmp_path / "out"
    for place, number in enumerate(order):
        assert not (out / "manifest.json").exists()
        prepare(red.config(source, out, shard=f"{number}/3"), tokenizer)
        told = capsys.readouterr().err
        assert ("Whoever is last completes the dataset" in told) == (place < 2)
    assert red.content(out) == whole
    assert sum(len(batch) for batch in tokenizer.batches) == 33  # no picture twice


def test_machines_at_the_same_time(tmp_path, source, whole):
    out = tmp_path / "out"
    configs = [red.config(source, out, shard=f"{number}/3") for number in range(3)]
    raised = at_once(*(lambda c=c: prepare(c, red.RedTokenizer()) for c in configs))
    assert raised == [None] * 3
    prepare(red.config(source, out), red.RedTokenizer())
    assert red.content(out) == whole


def test_without_shard_one_finishes_what_a_lost_machine_left(tmp_path, source, whole):
    out = tmp_path / "out"
    prepare(red.config(source, out, shard="1/2"), red.RedTokenizer())
    tokenizer = red.RedTokenizer()
    prepare(red.config(source, out), tokenizer)
    assert red.content(out) == whole
    assert sum(len(batch) for batch in tokenizer.batches) < 33


def test_two_commands_at_once(tmp_path, source, whole):
    out = tmp_path / "same"
    both = [lambda: prepare(red.config(source, out), red.RedTokenizer())] * 2
    assert at_once(*both) == [None, None]
    assert red.content(out) == whole

    out = tmp_path / "different"
    configs = [red.config(source, out, seed=seed) for seed in (0, 1)]
    raised = at_once(*(lambda c=c: prepare(c, red.RedTokenizer()) for c in configs))
    (refused,) = [place for place, error in enumerate(raised) if error is not None]
    assert "was begun with other settings: --seed was" in str(raised[refused])
    alone = prepare(red.config(source, tmp_path / "alone", seed=1 - refused), red.RedTokenizer())
    assert red.content(out) == red.content(alone)


def test_leftovers_of_the_dead_are_removed_and_a_neighbours_are_not(tmp_path, source, whole):
    out = tmp_path / "out"
    prepare(red.config(source, out, shard="0/2"), red.RedTokenizer())
    host = _host()
    live = out / f".train-00001.parquet.{host}-{os.getpid()}-0123abcd.partial"
    away = out / ".train-00001.parquet.elsewhere-1-0123abcd.partial"
    dead = [out / ".progress" / f".a.json.{host}-{2**22 + 1}-0123abcd.partial"]
    dead.append(out / f".train-00001.parquet.{host}-{2**22 + 1}-0123abcd.partial")
    for path in (live, away, *dead):
        path.write_bytes(b"half")
    prepare(red.config(source, out), red.RedTokenizer())
    assert live.exists()
    assert away.exists()
    assert not any(path.exists() for path in dead)
    live.unlink()
    away.unlink()
    assert red.content(out) == whole


def test_what_was_chosen_is_kept(tmp_path, source, monkeypatch):
    out = tmp_path / "out"
    auto = {"batch_size": "auto", "threads": 0}
    prepare(red.config(source, out, **auto, limit=5), red.RedTokenizer())
    plan = read_sealed(out / PLAN)
    assert plan["batch_size"] == ON_CPU
    monkeypatch.setattr("arra.data.batch_size.ON_CPU", ON_CPU + 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: plan["threads"] + 1)
    (out / "train-00000.parquet").unlink()
    tokenizer = red.RedTokenizer()
    prepare(red.config(source, out, **auto, limit=5), tokenizer)
    assert [len(batch) for batch in tokenizer.batches] == [ON_CPU, 5 - ON_CPU]
    asked = {"batch_size": ON_CPU, "threads": plan["threads"]}
    prepare(red.config(source, out, **asked, limit=5), red.RedTokenizer())
    with pytest.raises(ValueError, match=f"--batch-size was {ON_CPU}, now 8"):
        prepare(red.config(source, out, **asked | {"batch_size": 8}, limit=5), red.RedTokenizer())


def test_a_disk_that_is_full_at_any_moment(tmp_path, source, whole, monkeypatch):
    real, out = os.fsync, tmp_path / "out"
    for moment in itertools.count(1):
        left = [moment]

        def full(descriptor, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        try:
            prepare(red.config(source, out), red.RedTokenizer())
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017 - until none is raised any more
        else:
            break
    assert moment > 5
    assert red.content(out) == whole


def test_what_shard_may_say():
    assert [shard_of(text) for text in (None, "0/1", "7/8")] == [(0, 1), (0, 1), (7, 8)]
    with pytest.raises(ValueError, match=r"the last of 8 is 7/8 \(SLURM: --array=0-7\)"):
        shard_of("8/8")
    for wrong in ("1", "1/0", "-1/2", "a/b", "1/2/3", ""):
        with pytest.raises(ValueError, match="--shard"):
            red.config("in", Path("out"), shard=wrong)
