"""A whole study on drawn scenes with parts that know nothing: what it writes, skips and refuses."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from arra import cli
from arra.data.images import load_rgb
from arra.files import read_json
from arra.image_tokenizers.vq import VQConfig, VQModel
from arra.study import arms, questions
from arra.study.arms import StudyConfig, checkpoint_steps, make_arms, run_study, train_flags
from arra.study.prompts import Prompts, prompts_of
from arra.study.worker import WorkerJob, answer
from arra.train.throughput import MEASURED

SETTINGS = (
    *("steps=4", "batch-size=4", "dtype=float32", "log.every=1", "align.layer=1", "model.layers=2"),
    *("model.hidden-size=16", "model.heads=2", "model.mlp-size=16", "model.text-vocabulary=300"),
)


def in_this_process(jobs, *, parallel, threads, say):
    """Stands in for `run_jobs`: starting Python six times would take most of a minute."""
    for job in jobs:
        module, *arguments = job.argv[2:]
        if module == "arra.cli":
            assert cli.main(arguments) == 0
        else:
            assert module == "arra.study.worker"
            answer(WorkerJob.read(Path(arguments[0])))
        say(job.progress())


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    tokenizer = VQConfig(
        image_size=64,
        base_channels=4,
        channel_multipliers=(1, 1, 1, 1),
        res_blocks=1,
        middle_attention=False,
        norm_groups=2,
        z_channels=4,
        codebook_size=16,
        codebook_dim=3,
    )
    VQModel(tokenizer).save_pretrained(folder / "vq")
    encoder = ViTConfig(
        hidden_size=6,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=16,
        patch_size=8,
    )
    ViTModel(encoder).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    return folder


@pytest.fixture(scope="module")
def config(parts, tmp_path_factory):
    return StudyConfig(
        data="builtin:scenes",
        out=str(tmp_path_factory.mktemp("study") / "out"),
        settings=SETTINGS,
        image_tokenizer=str(parts / "vq"),
        encoder=(f"teacher={parts / 'vit'}",),
        limit=12,
        judge=str(parts / "vit"),
        seeds=(0, 1),
        prompts=6,
        unseen=3,
        more_splits=("compositional",),
        points=2,
        point_prompts=2,
        guidances=(1.0, 3.0),
        guidance_prompts=2,
        validation_images=6,
        threads=1,
        slots=4,
        device="cpu",
    )


@pytest.fixture(scope="module")
def study(config):
    """The finished study; what it said on the way is in said.json."""
    patch = pytest.MonkeyPatch()
    patch.setattr(arms, "run_jobs", in_this_process)
    patch.setattr(questions, "run_jobs", in_this_process)
    said: list[str] = []
    report = run_study(config, data_label="tiny scenes", say=said.append)
    patch.undo()
    (Path(config.out) / "said.json").write_text(json.dumps(said))
    return report


def test_report_and_results_are_written(study, config):
    page = study.read_text(encoding="utf-8")
    for prompt in prompts_of(study.parent / "data", "test").texts[:6]:
        assert prompt in page
    assert "From run to run" in page
    assert "never trained on" in page
    results = read_json(study.parent / "results.json")
    assert [pair["seed"] for pair in results["pairs"]] == [0, 1]
    pair = results["pairs"][0]
    assert set(pair["differences"]) == {"test", "unseen", "compositional", "val loss"}
    assert pair["differences"]["unseen"]["all_right"]["n"] == 3
    assert results["groups"]["unseen"] == "3 unseen captions (test)"
    for name in ("all_right", "colour", "fragments", "fd@vit", "kid@vit"):
        assert name in pair["differences"]["test"]
        assert name in results["ceiling"]["test"]
    assert pair["differences"]["val loss"]["val_loss_ar"]["n"] == 6
    for arm in pair["arms"].values():
        assert [point["images_seen"] for point in arm["points"]] == [8, 16]
        assert arm["guidance"] in (1.0, 3.0)
        assert arm["log"][-1]["step"] == 4
    assert "loss_gva" in pair["arms"]["aligned"]["log"][-1]
    assert "loss_gva" not in pair["arms"]["plain"]["log"][-1]


def test_arms_differ_in_nothing_but_the_weight(study, config):
    first = [read_json(study.parent / arm / "config.json") for arm in ("plain", "aligned")]
    assert first[0]["align"].pop("weight") == 0
    assert first[1]["align"].pop("weight") == 1
    for written in first:
        del written["out"]
    assert first[0] == first[1]


def test_per_image_losses_agree_with_the_log(study, config):
    for arm in ("plain", "aligned"):
        losses = read_json(study.parent / "painted" / arm / "losses.json")
        logged = read_json(study.parent / "results.json")["pairs"][0]["arms"][arm]["log"][-1]
        assert np.mean(losses) == pytest.approx(logged["val_loss_ar"], rel=1e-5)


def test_both_arms_paint_the_same_prompts_from_the_same_seeds(study):
    listings = [
        (study.parent / "painted" / arm / "test" / "images.jsonl").read_text()
        for arm in ("plain", "aligned")
    ]
    assert listings[0] == listings[1]
    rows = [json.loads(line) for line in listings[0].splitlines()]
    assert [row["seed"] for row in rows] == list(range(6))
    image = load_rgb(study.parent / "painted" / "plain" / "test" / rows[0]["file"])
    assert image.size == (64, 64)


def test_the_same_command_again_does_nothing(study, config):
    said = []
    before = (study.parent / "results.json").stat().st_mtime_ns
    run_study(config, data_label="tiny scenes", say=said.append)
    stages = ("prepare", "train", "choose guidance", "paint", "measure")
    assert [line.split(":")[0] for line in said[:5]] == [f"== {name}" for name in stages]
    assert all("done before" in line for line in said[:5])
    assert (study.parent / "results.json").stat().st_mtime_ns == before


def test_another_study_is_not_mixed_in(study, config):
    with pytest.raises(ValueError, match=r"--prompts: 6 -> 9"):
        run_study(replace(config, prompts=9))


def test_what_makes_no_pair_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match=r"--align\.weight 0"):
        make_arms(replace(config, settings=(*SETTINGS, "align.weight=0")), tmp_path)
    with pytest.raises(SystemExit):
        make_arms(replace(config, settings=("no-such-option=1",)), tmp_path)
    with pytest.raises(ValueError, match="must differ"):
        replace(config, seeds=(1, 1))
    with pytest.raises(ValueError, match="no prepared dataset"):
        run_study(replace(config, out=str(tmp_path / "x"), image_tokenizer=None))


def test_settings_become_flags():
    given = ("steps=4", "align.layer=1 3", "model.rep=true", "loss.text=false")
    assert train_flags(given) == [
        *("--steps", "4", "--align.layer", "1", "3", "--model.rep", "--loss.no-text")
    ]
    assert train_flags(("data.text='a b=c'",)) == ["--data.text", "a b=c"]
    for wrong in ("steps", "--steps=4"):
        with pytest.raises(ValueError, match="NAME=VALUE"):
            train_flags((wrong,))


def test_points_end_with_the_run(config, tmp_path):
    train = make_arms(config, tmp_path)[0].config
    assert checkpoint_steps(config, train) == [2, 4]
    assert checkpoint_steps(replace(config, points=3), replace(train, steps=10)) == [4, 8, 10]


@pytest.mark.long
def test_in_real_processes_with_a_kill_in_between(study, config, tmp_path):
    """The same study over the command line, stopped while training, ends with the same numbers."""
    out = tmp_path / "out"
    alone = replace(config, out=str(out), seeds=(0,))
    flags = ["study", alone.data, "--out", str(out), "--set", *alone.settings, "--limit", "12"]
    flags += ["--image-tokenizer", str(alone.image_tokenizer), "--encoder", alone.encoder[0]]
    flags += ["--judge", str(alone.judge), "--prompts", "6", "--more-splits", "compositional"]
    flags += ["--points", "2", "--point-prompts", "2", "--guidances", "1", "3"]
    flags += ["--guidance-prompts", "2", "--validation-images", "6", "--threads", "1"]
    flags += ["--slots", "4", "--device", "cpu"]
    command = [sys.executable, "-m", "arra.cli", *flags]
    first = subprocess.Popen(command)
    while not list(out.glob("*/checkpoints/step-*")) and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    first.wait(300)
    assert not (out / "report.html").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "== prepare: done before" in done.stdout
    assert (out / "report.html").is_file()
    whole = study.parent
    for arm in ("plain", "aligned"):
        mine, theirs = (
            [{k: v for k, v in line.items() if k not in MEASURED} for line in pair["log"]]
            for pair in (
                read_json(folder / "results.json")["pairs"][0]["arms"][arm]
                for folder in (out, whole)
            )
        )
        assert mine == theirs


def test_unseen_captions_are_those_that_no_training_image_has_each_once(study):
    data = study.parent / "data"
    train, test = prompts_of(data, "train"), prompts_of(data, "test")
    shown = {test.texts[0], test.texts[3]}
    twice = Prompts([*test.texts, *test.texts], [*test.rows, *test.rows], [*test.ids, *test.ids])
    chosen = twice.without(shown).once_each()
    assert chosen.texts == list(dict.fromkeys(t for t in test.texts if t not in shown))
    assert chosen.ids == [test.ids[test.rows.index(row)] for row in chosen.rows]
    assert not set(test.without(train.texts).texts) & set(train.texts)


def test_an_arm_whose_last_line_is_missing_is_not_finished(study, config):
    """As a stop in the last validation leaves it: the same command then writes the line."""
    arm = make_arms(config, study.parent / "data")[0]
    assert arm.finished
    log = arm.run / "log.jsonl"
    whole = log.read_text(encoding="utf-8")
    try:
        log.write_text("".join(whole.splitlines(keepends=True)[:-1]), encoding="utf-8")
        assert not arm.finished
    finally:
        log.write_text(whole, encoding="utf-8")
