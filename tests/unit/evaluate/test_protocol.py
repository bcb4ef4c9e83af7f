"""The report of `arra evaluate`: what it holds, what it refuses, and null with a reason."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from arra.data.builtin import caption, draw, scene_at
from arra.evaluate import protocol, reference
from arra.evaluate.distances import distances_at, frechet
from arra.evaluate.entries import open_entries
from arra.evaluate.image_set import StoredSet
from arra.evaluate.protocol import evaluate, repeated
from arra.evaluate.report import told
from arra.evaluate.settings import EvaluateConfig
from arra.models.loading import fit_text_tokenizer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=6,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=16,
        patch_size=8,
    )
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    """24 scenes drawn as asked, as `arra generate` writes them."""
    folder = tmp_path_factory.mktemp("painted")
    rows = []
    for index in range(24):
        scene = scene_at("test", index)
        Image.fromarray(draw(scene)).save(folder / f"{index}.png")
        rows.append({"file": f"{index}.png", "prompt": caption(scene), "seed": index})
    (folder / "images.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return folder


def config(**given):
    return EvaluateConfig(device="cpu", kid_subsets=5, kid_subset_size=10, **given)


def test_report_names_what_the_numbers_depend_on(encoder, painted, tmp_path):
    report = evaluate(
        config(
            real="builtin:scenes",
            split="val",
            limit=30,
            generated=str(painted),
            metrics="fd,kid,scenes",
            extractor=(str(encoder),),
            out=tmp_path / "report.json",
        )
    )
    name = encoder.name
    about_all = {key for key in report["metrics"] if not key.startswith("scenes/")}
    assert about_all == {f"fd@{name}", f"kid@{name}", "scenes"}
    assert report["metrics"][f"fd@{name}"] > 0
    assert report["metrics"]["scenes"] == report["metrics"]["scenes/colour"] == 1
    assert report["intervals"]["scenes"]["low"] < 1
    assert report["reasons"] == {}
    assert (report["real"]["n"], report["generated"]["n"]) == (24 + 6, 24)
    assert report["extractors"][name]["fingerprint"]
    assert report["extractors"][name]["pooling"] == "class"
    assert report["counts"][f"fd@{name}"] == [30, 24]
    assert report["details"][f"kid@{name}"]["std"] > 0
    assert len(report["real"]["sha256"]) == len(report["generated"]["sha256"]) == 64
    assert report["preprocessing"]["size"] == 64
    assert report["versions"]["torch"] == torch.__version__
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert f"fd@{name}" in told(report)
    assert "scenes/colour" in told(report)


def test_same_images_have_distance_zero(encoder, painted):
    report = evaluate(
        config(real=str(painted), generated=str(painted), metrics="fd", extractor=(str(encoder),))
    )
    assert report["metrics"][f"fd@{encoder.name}"] == pytest.approx(0, abs=1e-9)


def test_too_few_images_give_null_or_a_caution():
    features = np.random.default_rng(0).normal(size=(8, 20))
    values, reasons = distances_at("e", features, features + 1)
    with pytest.warns(UserWarning, match="rank deficient"):
        assert values["fd@e"] == frechet(features, features + 1)
    assert "rank deficient" in reasons["fd@e"]
    values, reasons = distances_at("e", features[:1], features)
    assert values["fd@e"] is None
    assert "at least 2" in reasons["fd@e"]


def test_every_measure_has_a_value_or_a_reason(encoder, painted):
    report = evaluate(
        config(
            real=str(painted),
            generated=str(painted),
            metrics="fd,kid,cmmd,prdc,fd_infinity,vendi,ms_ssim_diversity,ms_ssim_paired",
            extractor=(str(encoder),),
        )
    )
    values, name = report["metrics"], encoder.name
    assert values[f"cmmd@{name}"] == pytest.approx(0, abs=1e-9)
    assert values[f"precision@{name}"] == values[f"coverage@{name}"] == 1
    assert 1 <= values[f"vendi@{name}"] <= 6
    missing = {f"fd_infinity@{name}", "ms_ssim_diversity", "ms_ssim_paired"}
    assert {key for key, value in values.items() if value is None} == missing
    assert "24 images" in report["reasons"][f"fd_infinity@{name}"] or report["reasons"]
    assert "161 pixels" in report["reasons"]["ms_ssim_paired"]
    assert set(report["intervals"]) >= {f"precision@{name}"}


def test_batch_order_and_container_do_not_matter(encoder, painted, tmp_path):
    """Through an extractor: 1e-4 relative (float32 in other batches); the hash is the same."""
    rows = (painted / "images.jsonl").read_text("utf-8").splitlines()
    for number, line in enumerate(reversed(rows)):
        row = json.loads(line)
        image = Image.open(painted / row["file"])
        image.save(tmp_path / f"{number}.bmp")
    first, second = (
        evaluate(
            EvaluateConfig(
                real="builtin:scenes",
                split="val",
                limit=40,
                generated=str(folder),
                metrics="fd,kid,cmmd,prdc",
                extractor=(str(encoder),),
                batch_size=batch,
                workers=workers,
                kid_subsets=5,
                kid_subset_size=10,
                device="cpu",
            )
        )
        for folder, batch, workers in ((painted, 64, 1), (tmp_path, 7, 3))
    )
    assert first["generated"]["sha256"] == second["generated"]["sha256"]
    assert first["metrics"] == pytest.approx(second["metrics"], rel=1e-4, abs=1e-7)


def reversed_folder(folder, new):
    """The same pictures, listed the other way round."""
    shutil.copytree(folder, new)
    lines = (new / "images.jsonl").read_text("utf-8").splitlines(True)
    (new / "images.jsonl").write_text("".join(reversed(lines)), "utf-8")
    return new


def test_intervals_do_not_depend_on_the_order_either(painted, tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for place in ("real", "drawn"):
        (tmp_path / place).mkdir()
        for number in range(9):
            pixels = rng.integers(0, 256, (161, 161, 3), np.uint8) // (number + 1)
            Image.fromarray(pixels).save(tmp_path / place / f"{number}.png")
    rows = [json.dumps({"file": f"{number}.png"}) + "\n" for number in range(9)]
    (tmp_path / "drawn" / "images.jsonl").write_text("".join(rows))
    asked = {
        painted: {"metrics": "scenes"},
        tmp_path / "drawn": {"metrics": "ms_ssim_paired", "real": str(tmp_path / "real")},
    }
    for folder, given in asked.items():
        other = reversed_folder(folder, tmp_path / f"{folder.name}-reversed")
        reports = [evaluate(config(generated=str(place), **given)) for place in (folder, other)]
        assert reports[0]["intervals"]
        for key, interval in reports[0]["intervals"].items():
            expected = [pytest.approx(interval[end], abs=1e-12) for end in ("low", "high")]
            found = reports[1]["intervals"][key]
            assert [found["low"], found["high"]] == expected, key


def test_a_painter_is_judged_without_files(encoder):
    report = evaluate(
        config(
            real="builtin:scenes",
            split="test",
            limit=3,
            model="builtin:scenes",
            cfg=1.0,
            slots=4,
            metrics="fd,scenes",
            extractor=(str(encoder),),
        )
    )
    assert report["generated"]["n"] == report["real"]["n"] == 3
    assert report["generated"]["painted"]["cfg"] == 1.0
    assert report["counts"]["scenes/shape"] == [None, 3]


def test_a_prompt_that_occurs_again_is_another_picture(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue cross\na red circle\n", "utf-8")
    asked = {"model": "builtin:scenes", "prompts": prompts, "cfg": 1.0, "slots": 4}
    report = evaluate(config(**asked, metrics="scenes"))
    assert report["generated"]["distinct"] == 3
    twice = evaluate(config(**asked, metrics="scenes", num=2, by_seed=True, out=tmp_path / "two"))
    assert twice["generated"]["distinct"] == 6
    assert list(twice["by_seed"]) == ["0", "1"]
    lines = (tmp_path / "two" / "scores.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1, 0, 1, 2, 3]


def test_the_same_prompt_and_seed_again_is_the_same_picture(tmp_path):
    """As `arra generate` painted a file of prompts with a line twice."""
    folder = tmp_path / "painted"
    folder.mkdir()
    rows = []
    for number, seed in enumerate((0, 0, 1)):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
        rows.append({"file": f"{number}.png", "prompt": "a red circle", "seed": seed})
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "settings.json").write_text('{"cfg": 2.0, "prompts": ["x"]}')
    said = list(repeated(StoredSet(str(folder), open_entries(str(folder)))))
    assert len(said) == 1
    assert "3 pictures of 2 different prompts and seeds" in said[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing to evaluate"),
        ({"generated": "x", "metrics": "fid"}, "unknown metric 'fid'"),
        ({"generated": "x", "extractor": ("e",)}, "give it"),
        ({"generated": "x", "real": "y"}, "needs --extractor"),
        ({"text": "file.txt"}, "needs --model"),
        ({"generated": "x", "model": "y"}, "give one of them"),
        ({"generated": "x", "metrics": "scenes", "limit": 0}, "--limit must be at least 1"),
        ({"generated": "x", "metrics": " , "}, "nothing to measure"),
        ({"generated": "x", "metrics": "scenes", "seed": -1}, "--seed must be in"),
        ({"model": "x", "metrics": "scenes", "cfg": float("nan")}, "--cfg must be at least 0"),
        ({"generated": "x", "metrics": "scenes", "cfg": 2.0}, "are there already"),
        ({"generated": "x", "metrics": "scenes", "prompts": "p.txt"}, "are there already"),
        ({"generated": "x", "metrics": "scenes", "labels": "l"}, "--labels is of --metrics auroc"),
        ({"generated": "x", "metrics": "scenes", "unmentioned": "negative"}, "--unmentioned is of"),
        ({"generated": "x", "metrics": "scenes", "split": "val"}, "--split is of --real alone"),
        ({"model": "x", "metrics": "scenes", "training_split": "a"}, "--training-split is of"),
        ({"model": "x", "text": "t", "real": "y", "extractor": ("e",)}, "without --text"),
    ],
)
def test_wrong_use_is_told_before_anything_is_loaded(given, message):
    with pytest.raises(ValueError, match=message):
        config(**given)


@pytest.mark.parametrize("given", [{"out": "f/x.json"}, {"out": "d.json"}, {"save": "f/x.npz"}])
def test_what_cannot_be_written_is_told_before_anything_is_loaded(given, tmp_path):
    (tmp_path / "f").write_text("")
    (tmp_path / "d.json").mkdir()
    asked = {"real": "nowhere", "extractor": ("nowhere",), "generated": "nowhere"}
    asked |= {{"save": "save_moments"}.get(name, name): tmp_path / at for name, at in given.items()}
    with pytest.raises(ValueError, match=r"is a file|is a folder"):
        evaluate(config(**asked))


def test_a_prompt_that_is_no_scene_is_told_before_anything_is_painted(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red circle\na photograph of a dog\n", "utf-8")
    monkeypatch.setattr(protocol, "go_through", None)
    asked = {"model": "builtin:scenes", "prompts": tmp_path / "prompts.txt", "metrics": "scenes"}
    with pytest.raises(ValueError, match="'a photograph of a dog' does not describe a scene"):
        evaluate(config(**asked))


def test_a_network_that_is_not_there_is_told_before_images_are_read(painted, monkeypatch):
    monkeypatch.setattr(reference, "open_entries", None)
    with pytest.raises(ValueError, match="nowhere"):
        evaluate(config(real=str(painted), generated=str(painted), extractor=("./nowhere",)))


def test_scenes_need_prompts(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="has no prompts"):
        evaluate(config(generated=str(tmp_path), metrics="scenes"))


def test_unlike_sizes_need_a_size(tmp_path, encoder):
    for side in (32, 64):
        Image.new("RGB", (side, side)).save(tmp_path / f"{side}.png")
    with pytest.raises(ValueError, match="--size"):
        evaluate(config(real=str(tmp_path), generated=str(tmp_path), extractor=(str(encoder),)))


def test_small_pictures_are_told_and_pairs_are_made_first(painted, tmp_path, monkeypatch):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    given = {"generated": str(painted), "real": str(tmp_path), "metrics": "ms_ssim_paired"}
    monkeypatch.setattr(protocol, "go_through", None)  # nothing is looked at before
    with pytest.raises(ValueError, match="have the name of no real image"):
        evaluate(config(**given))
    monkeypatch.undo()
    (told,) = evaluate(config(**given | {"metrics": "scenes"}))["warnings"]
    assert "has pictures of 32 pixels, enlarged to 64" in told


def test_perplexity_of_a_plain_language_model(tmp_path):
    texts = ["one short line", "another line about lungs"]
    tokenizer = fit_text_tokenizer(texts, 270)
    lm = AutoConfig.for_model(
        "gpt2", vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64
    )
    AutoModelForCausalLM.from_config(lm).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    (tmp_path / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    report = evaluate(config(text=tmp_path / "text.txt", model=str(tmp_path / "lm")))
    found = report["details"]["perplexity"]
    assert found["documents"] == 2
    assert found["perplexity"] == pytest.approx(len(tokenizer), rel=0.2)  # it knows nothing
    assert "bits_per_byte" in told(report)
