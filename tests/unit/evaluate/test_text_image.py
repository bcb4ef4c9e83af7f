"""CLIP-score: torchmetrics' number on the same embeddings, and through `arra evaluate`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.multimodal import clip_score as torchmetrics_clip_score
from transformers import AutoTokenizer, CLIPModel

from arra.data.builtin import caption, draw, scene_at
from arra.data.images import to_uint8
from arra.encoders import load_encoder
from arra.evaluate.protocol import evaluate
from arra.evaluate.report import told
from arra.evaluate.settings import EvaluateConfig
from arra.evaluate.text_image import ClipJudge, clip_score
from arra.resolve import resolve_folder

COUNT = 24
SCENES = [scene_at("test", index) for index in range(COUNT)]


def painted_folder(folder, shift=0):
    """Scenes as `arra generate` writes them; with a shift, under the prompts of others."""
    folder.mkdir()
    rows = []
    for index, scene in enumerate(SCENES):
        Image.fromarray(draw(scene)).save(folder / f"{index}.png")
        prompt = caption(SCENES[(index + shift) % COUNT])
        rows.append({"file": f"{index}.png", "prompt": prompt, "seed": index})
    (folder / "images.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return str(folder)


def config(generated, **given):
    return EvaluateConfig(
        generated=generated, device="cpu", kid_subsets=5, kid_subset_size=10, **given
    )


def test_equals_torchmetrics():
    """torchmetrics 1.9 is given the whole model, as its own argument allows."""
    folder = resolve_folder("builtin:scenes-clip", "encoder")
    whole = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = load_encoder(folder, "projected")

    class Model:
        config = whole.config

        def to(self, device):
            return self

        def get_image_features(self, pixels_NCHW):
            found = whole.get_image_features(pixels_NCHW)
            return getattr(found, "pooler_output", found)

        def get_text_features(self, ids_NT, mask_NT):
            found = whole.get_text_features(ids_NT, attention_mask=mask_NT)
            return getattr(found, "pooler_output", found)

    def processor(text=None, images=None, return_tensors="pt", padding=True):
        if text is not None:
            return tokenizer(text, return_tensors="pt", padding=True)
        pils = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        return {"pixel_values": encoder.preprocess(pils)}

    texts = [caption(scene) for scene in SCENES[1:9]]
    images = [Image.fromarray(draw(scene)) for scene in SCENES[:8]]
    with torch.no_grad():
        expected = torchmetrics_clip_score(
            list(to_uint8(images)), texts, model_name_or_path=lambda: (Model(), processor)
        )
    judge = ClipJudge("builtin:scenes-clip")
    cosine_N = (judge.images(images).astype(np.float64) * judge.captions(texts)).sum(axis=1)
    found = clip_score(cosine_N)
    assert 1 < float(expected) < 60  # other scenes' captions
    assert 100 * found.value == pytest.approx(float(expected), rel=1e-4)
    assert found.details["torchmetrics"] == pytest.approx(max(float(expected), 0), rel=1e-4)
    assert found.details["hessel"] == pytest.approx(2.5 * np.maximum(cosine_N, 0).mean())


def test_conventions_by_formula():
    found = clip_score(np.array([0.5, -0.1]), cut=1, length=77)
    assert found.value == pytest.approx(0.2)
    assert found.details["torchmetrics"] == pytest.approx(20)
    assert found.details["hessel"] == pytest.approx(2.5 * 0.25)
    assert "1 of 2 captions are longer than 77 tokens" in found.reason
    assert found.low <= found.value <= found.high


def test_through_evaluate_whatever_the_batches_and_the_order(tmp_path):
    folder, turned = painted_folder(tmp_path / "painted"), painted_folder(tmp_path / "turned")
    listing = Path(turned) / "images.jsonl"
    listing.write_text("".join(reversed(listing.read_text("utf-8").splitlines(True))), "utf-8")
    reports = [
        evaluate(
            config(images, metrics="clip_score", clip=("builtin:scenes-clip",), batch_size=batch)
        )
        for images, batch in ((folder, 5), (turned, 64))
    ]
    key = "clip_score@scenes-clip"
    first, second = reports
    assert first["metrics"] == pytest.approx(second["metrics"], rel=1e-4)
    for limit in ("low", "high"):
        assert first["intervals"][key][limit] == pytest.approx(
            second["intervals"][key][limit], rel=1e-4
        )
    assert first["metrics"][key] > 0.8  # it was trained on such scenes
    details = first["details"][key]
    assert details["chance"] < 0.3
    assert details["cut_captions"] == 0
    judge = first["judges"][key]
    assert judge["fingerprint"] == load_encoder("builtin:scenes-clip", "projected").fingerprint
    assert judge["text_length"] == 40
    assert key in told(first)


def test_chance_is_the_mean_over_other_captions(tmp_path):
    judge = ClipJudge("builtin:scenes-clip")
    images = judge.images([Image.fromarray(draw(scene)) for scene in SCENES])
    texts = judge.captions([caption(scene) for scene in SCENES])
    cosine_NN = images.astype(np.float64) @ texts.T.astype(np.float64)
    report = evaluate(
        config(painted_folder(tmp_path / "p"), metrics="clip_score", clip=("builtin:scenes-clip",))
    )
    details = report["details"]["clip_score@scenes-clip"]
    others = (cosine_NN.sum() - np.trace(cosine_NN)) / (COUNT * (COUNT - 1))
    assert details["chance"] == pytest.approx(others, rel=1e-4)


def test_swapped_prompts_lower_what_reads_them_and_nothing_else(tmp_path):
    """The planted defect: each picture under the prompt of the next one."""
    sound, swapped = (
        evaluate(
            config(
                painted_folder(tmp_path / str(shift), shift),
                real="builtin:scenes",
                split="val",
                limit=COUNT,
                metrics="fd,kid,cmmd,prdc,vendi,clip_score,scenes",
                extractor=("builtin:scenes-judge",),
                clip=("builtin:scenes-clip",),
            )
        )
        for shift in (0, 1)
    )
    key = "clip_score@scenes-clip"
    assert swapped["metrics"][key] < sound["intervals"][key]["low"] - 0.4
    assert swapped["metrics"]["scenes"] < 0.2 < 0.9 < sound["metrics"]["scenes"]
    of_sets = [name for name in sound["metrics"] if "@scenes-judge" in name]
    assert len(of_sets) == 8
    for name in of_sets:
        assert swapped["metrics"][name] == pytest.approx(sound["metrics"][name], rel=1e-8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metrics": "clip_score"}, "need each other"),
        ({"metrics": "scenes", "clip": ("builtin:scenes-clip",)}, "need each other"),
    ],
)
def test_the_metric_and_its_network_need_each_other(given, message):
    with pytest.raises(ValueError, match=message):
        config("x", **given)


def test_pictures_without_captions_and_doubled_names_are_refused(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no prompts, which the metric 'clip_score' reads"):
        evaluate(config(str(tmp_path), metrics="clip_score", clip=("builtin:scenes-clip",)))
    twice = ("builtin:scenes-clip", "builtin:scenes-clip@projected")
    with pytest.raises(ValueError, match="two of --clip have one name"):
        evaluate(config(painted_folder(tmp_path / "p"), metrics="clip_score", clip=twice))
    with pytest.raises(ValueError, match="leave out @class"):
        ClipJudge("builtin:scenes-clip@class")
