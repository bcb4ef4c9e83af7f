"""Decoding in other processes: the same bytes, and an image that ends one costs one row."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import red_models as red
import torch
from PIL import Image
from red_models import CRASHES, FAILS, HANGS, KILLED, killed_pixels, red_pixels
from transformers import CLIPImageProcessorPil

from arra.data import engine_local, job
from arra.data.decode import Decoded, Decoder
from arra.data.decode_processes import DecodeProcesses, why_not
from arra.data.framing import Framing
from arra.data.prepare import prepare
from arra.data.sources import Record, Reject
from arra.encoders.preprocessing import open_preprocessing


def record(level, row=0):
    return Record(f"id{row}", Image.new("RGB", (20, 20), (level, 0, 0)), "red", row=row)


def decoder(pixels=red_pixels):
    return Decoder(Framing(16), {"eye": pixels})


def equal(one, other):
    if isinstance(one, Reject):
        return one == other
    assert isinstance(one, Decoded)
    pixels = torch.equal(one.pixels_CHW, other.pixels_CHW)
    return pixels and all(torch.equal(one.seen[name], other.seen[name]) for name in one.seen)


def test_equal_to_decoding_here(tmp_path):
    CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24).save_pretrained(tmp_path)
    clip = open_preprocessing(tmp_path, "CLIPImageProcessor").pixels
    framing = Framing(16, views="flip")
    here = Decoder(framing, {"clip": clip, "red": red_pixels})
    noise = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    rows = [Record("a", Image.fromarray(noise), "noise", {"label": 3}, 0)]
    rows += [Reject(1, "b", "no caption"), Record("c", b"no image", "c", row=2)]
    rows += [Record("d", Path("nowhere.png"), "x" * 200_000, row=3)]
    expected = here(rows)
    with DecodeProcesses({"train": here}, 1) as there:
        found = there("train", rows)
    assert all(equal(one, other) for one, other in zip(expected, found, strict=True))
    assert (found[0].extra, found[0].text) == ({"label": 3}, "noise")
    assert torch.equal(found[0].views[0].pixels_CHW, expected[0].views[0].pixels_CHW)
    assert [type(item) for item in found] == [Decoded, Reject, Reject, Reject]


def test_an_image_that_ends_its_process_costs_its_row():
    rows = [record(level, row) for row, level in enumerate([1, CRASHES, 2, HANGS, 3])]
    with DecodeProcesses({"train": decoder()}, 1, seconds=1) as there:
        found = there("train", rows)
        assert [found[i].pixels_CHW[0, 0, 0].item() for i in (0, 2, 4)] == [1, 2, 3]
        assert found[1] == Reject(1, "id1", "the image crashes the decoder (SIGSEGV)")
        assert found[3] == Reject(3, "id3", "the image takes too long to decode")
        with pytest.raises(ValueError, match="these pixels cannot be made"):
            there("train", [record(FAILS)])
        with pytest.raises(ChildProcessError, match=r"killed \(SIGKILL\).*--workers 0"):
            there("train", [record(KILLED)])
        assert isinstance(there("train", [record(4)])[0], Decoded)  # and goes on


def test_nothing_is_left_behind():
    there = DecodeProcesses({"train": decoder()}, 2)
    with there:
        there("train", [record(1)])
        pids = [each._process.pid for each in there._all if each._process is not None]
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_pixels_that_cannot_be_sent(tmp_path, monkeypatch, capsys):
    assert why_not(decoder()) is None
    monkeypatch.setattr(engine_local, "ROWS_FOR_PROCESSES", 1)
    encoder = red.RedEncoder()
    pixels = encoder.pixels
    encoder.pixels = lambda images: pixels(images)
    monkeypatch.setattr(job, "load_encoder", lambda *_, **__: encoder)
    source = red.make_source(tmp_path / "in", 6)
    with pytest.raises(ValueError, match=r"--workers 1: .*'red' cannot be sent .*--workers 0"):
        prepare(red.config(source, tmp_path / "out", workers=1), red.RedTokenizer())
    prepare(red.config(source, tmp_path / "out", workers="auto"), red.RedTokenizer())
    assert "decoding in this process, for the pixels of encoder 'red'" in capsys.readouterr().err


def test_workers_change_no_byte_and_one_that_is_killed_is_named(tmp_path, monkeypatch):
    encoder = red.RedEncoder()
    monkeypatch.setattr(job, "load_encoder", lambda *_, **__: encoder)
    source = red.make_source(tmp_path / "in", 25)
    prepare(red.config(source, tmp_path / "here", workers=0), red.RedTokenizer())
    encoder.pixels = killed_pixels
    with pytest.raises(ChildProcessError, match="run the same command again"):
        prepare(red.config(source, tmp_path / "out", workers=2), red.RedTokenizer())
    encoder.pixels = red.RedEncoder().pixels
    prepare(red.config(source, tmp_path / "out", workers=2), red.RedTokenizer())
    assert red.content(tmp_path / "out") == red.content(tmp_path / "here")
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
