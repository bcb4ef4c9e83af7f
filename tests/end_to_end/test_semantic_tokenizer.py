"""A semantic tokenizer from its fit to an exported painter, by the commands alone."""

import shutil
from pathlib import Path

from arra.cli import main
from arra.files import read_json
from arra.image_tokenizers import load_image_tokenizer

TEACHER = "builtin:scenes-clip"


def test_fit_prepare_train_generate_export(tmp_path: Path) -> None:
    fitted, data, run = tmp_path / "tokenizer", tmp_path / "data", tmp_path / "run"
    export, pictures = tmp_path / "export", tmp_path / "pictures"
    scenes = ["builtin:scenes:1-2", "--limit", "12"]
    sizes = ["--size", "64", "--codebook-size", "16", "--base-channels", "8", "--norm-groups", "4"]
    fit = [*scenes, *sizes, "--steps", "3", "--batch-size", "4", "--out", str(fitted)]
    taught = ["--kind", "semantic", "--teacher", TEACHER, "--device", "cpu"]
    assert main(["tokenizer", "train", *fit, *taught]) == 0

    prepare = ["--image-tokenizer", str(fitted), "--encoder", f"clip={TEACHER}", "--size", "64"]
    assert main(["prepare", *scenes, *prepare, "--device", "cpu", "--out", str(data)]) == 0
    expected = load_image_tokenizer(fitted).fingerprint
    assert read_json(data / "manifest.json")["tokenizer"]["fingerprint"] == expected

    steps = ["--steps", "2", "--batch-size", "4", "--device", "cpu"]
    small = ["--model.layers", "2", "--model.hidden-size", "32", "--model.heads", "2"]
    small += ["--model.mlp-size", "32", "--align.layer", "1"]
    train = ["--data", str(data), "--out", str(run), *steps, *small]
    assert main(["train", "scenes", *train]) == 0
    assert main(["export", str(run), "--out", str(export)]) == 0
    for path in (fitted, data, run):  # nothing points outside the export
        shutil.rmtree(path)
    assert load_image_tokenizer(export / "image_tokenizer").fingerprint == expected

    paint = [str(export), "a red circle", "--num", "1", "--slots", "2", "--out", str(pictures)]
    assert main(["generate", *paint]) == 0
    assert (pictures / "00000-0.png").exists()
