"""Runs, exports and painted folders say what a painter was aligned to; a judge that is one of its
teachers is told."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from arra.config import AlignConfig, ModelConfig, TrainConfig
from arra.data.prepare import prepare
from arra.data.prepare_config import PrepareConfig
from arra.encoders import load_encoder
from arra.evaluate.features import describe_encoder
from arra.evaluate.protocol import evaluate
from arra.evaluate.report import told
from arra.evaluate.settings import EvaluateConfig
from arra.export import ExportConfig, export
from arra.files import read_json, write_json
from arra.generate.pictures import generate
from arra.generate.settings import GenerateConfig
from arra.teachers import Painter, Teacher, painter_in, painter_of, recorded, same_encoder, told_by
from arra.train.loop import train

CLIP, OTHER = "builtin:scenes-clip", "builtin:scenes-judge"


def described(spec):
    return describe_encoder(load_encoder(spec))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A real run, aligned to the class token of the bundled CLIP, and its export."""
    folder = tmp_path_factory.mktemp("aligned")
    data = prepare(
        PrepareConfig(
            source="builtin:scenes",
            image_tokenizer="builtin:scenes",
            out=folder / "data",
            encoder=(f"clip={CLIP}", f"other={OTHER}"),
            size=64,
            limit=8,
            threads=1,
        )
    )
    config = TrainConfig(
        data_folder=str(data),
        out=str(folder / "run"),
        steps=1,
        batch_size=2,
        threads=1,
        device="cpu",
        model=ModelConfig(layers=1, hidden_size=24, heads=2, mlp_size=32, text_vocabulary=280),
        align=AlignConfig(targets=("clip",)),
    )
    train(config)
    out = export(ExportConfig(config.out, str(folder / "export")))
    return Path(config.out), out


def test_a_run_and_its_export_name_their_teachers(trained):
    run, exported = trained
    fingerprint = load_encoder(CLIP, "class").fingerprint
    expected = Painter(True, (Teacher("clip", fingerprint, "class"),))
    assert painter_of(str(run)) == painter_of(str(exported)) == expected
    written = read_json(exported / "pipeline.json")["origin"]["teachers"]
    assert written == recorded(run) == [asdict(expected.teachers[0])]
    assert painter_in({"painter": told_by(expected)}) == expected


def test_the_teacher_as_a_judge_is_told(trained, tmp_path, capsys):
    """Pooled otherwise too: a CLIP-score is a teacher's word on what its class token taught."""
    _, exported = trained
    painted = generate(
        GenerateConfig(str(exported), str(tmp_path / "p"), ("a red circle",), num=2, device="cpu")
    )
    exported.rename(exported.with_name("moved"))  # the folder itself says who taught its painter
    try:
        report = evaluate(
            EvaluateConfig(
                real="builtin:scenes",
                split="val",
                limit=4,
                generated=str(painted),
                metrics="fd,clip_score",
                extractor=(OTHER, f"{CLIP}@mean"),
                clip=(CLIP,),
                device="cpu",
            )
        )
    finally:
        exported.with_name("moved").rename(exported)
    circular = [text for text in report["warnings"] if "aligned to" in text]
    assert len(circular) == 1
    assert circular[0].startswith("scenes-clip is the encoder that the painter was aligned to")
    assert f"warning: {circular[0]}" in told(report)


def test_judged_straight_from_the_painter(trained):
    run, exported = trained
    for model in (run, exported):
        report = evaluate(
            EvaluateConfig(
                real="builtin:scenes",
                split="val",
                limit=2,
                model=str(model),
                metrics="fd",
                extractor=(CLIP,),
                device="cpu",
            )
        )
        assert any("scenes-clip is the encoder" in text for text in report["warnings"])


def test_what_was_aligned_before_counts(trained, tmp_path):
    """A plain run that began with an aligned painter; an aligned one adds its teacher."""
    run, exported = trained
    later = tmp_path / "later"
    later.mkdir()
    config = read_json(run / "config.json")
    config["model_path"], config["align"]["weight"] = str(exported), 0.0
    write_json(later / "config.json", config)
    write_json(later / "run_card.json", read_json(run / "run_card.json"))
    assert painter_of(str(later)) == painter_of(str(exported))
    config["align"] |= {"weight": 1.0, "targets": ["other"]}
    write_json(later / "config.json", config)
    found = painter_of(str(later))
    assert found is not None
    assert [teacher.name for teacher in found.teachers] == ["clip", "other"]


def test_baselines_strangers_and_others_are_not_suspected(trained, tmp_path):
    run, _ = trained
    clip = described(CLIP)
    plain = tmp_path / "plain"
    plain.mkdir()
    config = read_json(run / "config.json")
    config["align"]["weight"] = 0.0
    write_json(plain / "config.json", config)
    write_json(plain / "run_card.json", read_json(run / "run_card.json"))
    assert painter_of(str(plain)) == Painter(False, ())
    assert same_encoder(clip, painter_of(str(plain))) is None
    assert same_encoder(clip, None) is None
    assert same_encoder(described(OTHER), painter_of(str(run))) is None
    assert same_encoder({"name": "inception", "fingerprint": "x"}, painter_of(str(run))) is None
    (tmp_path / "model.pt").write_bytes(b"")
    assert painter_of(str(tmp_path / "model.pt")) is None
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert painter_of(str(tmp_path)) is None


def test_a_painter_that_hides_its_teachers_is_doubted(tmp_path):
    origin = {"alignment": {"weight": 1.0}}
    (tmp_path / "pipeline.json").write_text(json.dumps({"origin": origin}))
    doubt = same_encoder(described(CLIP), painter_of(str(tmp_path)))
    assert doubt is not None
    assert "aligned to an encoder that it does not name" in doubt


def test_the_bundled_painter_names_its_teacher():
    assert same_encoder(described(CLIP), painter_of("builtin:scenes")) is not None
    assert same_encoder(described(OTHER), painter_of("builtin:scenes")) is None
