"""Text towers give the numbers of transformers' whole models, and of open_clip's own classes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from arra.encoders import load_encoder
from arra.encoders.clip_text import load_clip_text
from arra.files import read_json

sys.path.insert(0, str(Path(__file__).parents[2] / "golden"))
import tiny_clips as tiny

GOLDEN = read_json(Path(__file__).parents[2] / "golden" / "open_clip_text.json")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_equals_get_text_features_of_the_whole_model(kind, tmp_path):
    build = tiny.clip_folder if kind == "clip" else tiny.siglip_folder
    whole = build(tmp_path / "m")
    ids = tiny.clip_tokenizer()(
        tiny.CAPTIONS,
        return_tensors="pt",
        padding="max_length",
        truncation=True,
        max_length=tiny.LENGTH,
    )
    given = {"input_ids": ids["input_ids"]}
    if kind == "clip":
        given["attention_mask"] = ids["attention_mask"]
    with torch.no_grad():
        expected = whole.get_text_features(**given)
    expected_ND = getattr(expected, "pooler_output", expected)
    text = load_clip_text(tmp_path / "m")
    assert expected_ND.std(dim=0).mean() > 0.01
    torch.testing.assert_close(text(tiny.CAPTIONS), expected_ND, rtol=1e-5, atol=1e-5)
    assert text.too_long(tiny.CAPTIONS) == [False, True, True, False]
    images = load_encoder(tmp_path / "m", "projected")
    assert text(tiny.CAPTIONS).shape == (4, images.dim)


def test_a_caption_does_not_depend_on_those_beside_it(tmp_path):
    tiny.clip_folder(tmp_path / "m")
    text = load_clip_text(tmp_path / "m")
    alone_D = text(["a view"])[0]
    torch.testing.assert_close(text(tiny.CAPTIONS)[3], alone_D, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("pooler", "recorded"),
    [
        ("cls_last_hidden_state_pooler", "bert_cls_last_hidden_state_pooler"),
        ("mean_pooler", "bert_mean_pooler"),
        ("cls_pooler", "bert_cls_pooler"),
        (None, "bert_None"),
        ("left out", "bert_mean_pooler"),
    ],
)
def test_equals_open_clips_bert(pooler, recorded, tmp_path):
    shapes = tiny.bert_shapes() | (tiny.POOLING_LAYER if pooler == "cls_pooler" else {})
    config = dict(tiny.BERT_CFG, hf_pooler_type=pooler)
    if pooler == "left out":
        del config["hf_pooler_type"]
    text = load_clip_text(tiny.open_clip_folder(tmp_path / "m", shapes, config))
    found_ND = text(tiny.CAPTIONS)
    torch.testing.assert_close(found_ND, torch.tensor(GOLDEN[recorded]), rtol=1e-5, atol=1e-5)
    assert load_encoder(tmp_path / "m", "projected").dim == found_ND.shape[1]


@pytest.mark.parametrize("quick", [False, True])
def test_equals_open_clips_own(quick, tmp_path):
    folder = tiny.open_clip_folder(tmp_path / "m", tiny.own_shapes(), tiny.OWN_CFG)
    written = read_json(folder / "open_clip_config.json")
    written["model_cfg"]["quick_gelu"] = quick
    (folder / "open_clip_config.json").write_text(json.dumps(written))
    found_ND = load_clip_text(folder)(tiny.CAPTIONS)
    name, other = ("own_quick", "own") if quick else ("own", "own_quick")
    torch.testing.assert_close(found_ND, torch.tensor(GOLDEN[name]), rtol=1e-5, atol=1e-5)
    assert (found_ND - torch.tensor(GOLDEN[other])).abs().max() > 1e-3


def test_captions_are_cleaned_as_open_clip_does(tmp_path):
    text = load_clip_text(tiny.open_clip_folder(tmp_path / "m", tiny.bert_shapes(), tiny.BERT_CFG))
    plain, odd = text(["no square & view", " no  square &amp;amp;\n view "])
    torch.testing.assert_close(plain, odd, rtol=1e-5, atol=1e-5)


# ---- what cannot be read -------------------------------------------------------------------------


def _no_tokenizer(folder):
    tiny.clip_folder(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()


def _not_berts(folder):
    tiny.open_clip_folder(folder, tiny.bert_shapes(), tiny.BERT_CFG)
    tiny.clip_tokenizer().save_pretrained(folder)


def _letters(folder):
    tiny.clip_folder(folder)
    unknown = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=unknown, unk_token="?").save_pretrained(folder)


def _another_pooler(folder):
    config = dict(tiny.BERT_CFG, hf_pooler_type="max_pooler")
    tiny.open_clip_folder(folder, tiny.bert_shapes(), config)


def _another_projection(folder):
    config = dict(tiny.BERT_CFG, hf_proj_type="linear")
    tiny.open_clip_folder(folder, tiny.bert_shapes(), config)


def _another_tower(folder):
    tiny.open_clip_folder(folder, tiny.own_shapes() | {"cls_emb": (tiny.TEXT,)}, tiny.OWN_CFG)


def _unknown_setting(folder):
    tiny.open_clip_folder(folder, tiny.own_shapes(), tiny.OWN_CFG | {"pool_type": "last"})


def _no_text(folder):
    tiny.open_clip_folder(folder, {}, tiny.OWN_CFG)


def _vision_only(folder):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "dinov2"}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_tokenizer, "has no usable tokenizer"),
        (_letters, "has no usable tokenizer"),
        (_not_berts, "its tokenizer is not BERT's"),
        (_another_pooler, "hf_pooler_type 'max_pooler' is not supported"),
        (_another_projection, "hf_proj_type 'linear' with the tensors text.proj.0"),
        (_another_tower, "1 tensors that CLIP's has not, cls_emb"),
        (_unknown_setting, "sets pool_type for its text tower"),
        (_no_text, "it has no such text tower"),
        (_vision_only, "'dinov2': a CLIP-score needs a text tower"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bad_folders_are_refused_in_one_sentence(spoil, message, tmp_path):
    spoil(tmp_path / "m")
    with pytest.raises(ValueError, match=message):
        load_clip_text(tmp_path / "m")


def test_a_folder_that_is_no_model_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_clip_text(tmp_path)
