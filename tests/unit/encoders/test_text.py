"""Captions as a T5's features: cleaned as the original does, the model's own numbers, one spelling
of what it is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_t5 import WIDTH, save_tiny_t5
from transformers import AutoTokenizer

from arra.encoders.caption_cleaning import clean_caption
from arra.encoders.text import TextEncoder, load_text_encoder

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "captions.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    save_tiny_t5(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return load_text_encoder(folder)


@pytest.mark.parametrize(("caption", "cleaned"), GOLDEN["cases"])
def test_captions_are_cleaned_as_the_original_does(caption: str, cleaned: str) -> None:
    assert clean_caption(caption) == cleaned


def test_features_are_those_of_the_whole_model(tmp_path: Path) -> None:
    """A caption's own tokens, whatever it is padded with."""
    model = save_tiny_t5(tmp_path)
    encoder = load_text_encoder(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    captions = ["A red circle", "Two small (green) triangles left of the LINE.", ""]
    padded = tokenizer(
        [clean_caption(c) for c in captions], padding="max_length", max_length=120
    ).convert_to_tensors("pt")
    with torch.no_grad():
        hidden = model.encoder(**padded).last_hidden_state
    for caption, features, mask, expected in zip(
        captions, encoder(captions), padded["attention_mask"], hidden, strict=True
    ):
        count = int(mask.sum())
        assert features.dtype == torch.float16
        assert features.shape == (count, WIDTH)
        torch.testing.assert_close(features.float(), expected[:count], rtol=1e-3, atol=1e-5)
        (alone,) = encoder([caption])
        torch.testing.assert_close(alone, features, rtol=1e-3, atol=1e-5)
    assert len(encoder([""])[0]) == 1, "the end token alone"
    assert encoder([]) == []


def test_a_long_caption_is_cut_before_its_end_token(folder: Path) -> None:
    short = load_text_encoder(folder, length=5)
    ids = short.token_ids("a photo of a small red circle")
    assert len(ids) == 5
    assert ids[-1] == 1
    assert len(short(["a photo of a small red circle"])[0]) == 5


def test_the_encoder_is_frozen(encoder: TextEncoder) -> None:
    assert not encoder.model.training
    assert not any(p.requires_grad for p in encoder.model.parameters())
    assert (encoder.dim, encoder.length) == (WIDTH, 120)


def test_the_fingerprint_says_what_features_depend_on(folder: Path, tmp_path: Path) -> None:
    known = load_text_encoder(folder).fingerprint
    assert load_text_encoder(folder).fingerprint == known
    assert load_text_encoder(folder, length=60).fingerprint != known
    save_tiny_t5(tmp_path / "other", seed=1)
    assert load_text_encoder(tmp_path / "other").fingerprint != known
    save_tiny_t5(tmp_path / "words")
    file = tmp_path / "words" / "tokenizer.json"
    file.write_text(file.read_text().replace("▁photo", "▁phota"))
    assert load_text_encoder(tmp_path / "words").fingerprint != known
    # The decoder's half is not read.
    save_tiny_t5(tmp_path / "half")
    weights = load_file(tmp_path / "half" / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith(("decoder", "lm_head"))}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    assert load_text_encoder(tmp_path / "half").fingerprint == known


def test_what_is_no_text_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_text_encoder(tmp_path)
    with pytest.raises(ValueError, match="neither an existing folder nor a hub id"):
        load_text_encoder(tmp_path / "nothing")
    with pytest.raises(ValueError, match="at least 1 token"):
        load_text_encoder(tmp_path, length=0)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="of type 'clip'; supported is t5"):
        load_text_encoder(tmp_path)
    save_tiny_t5(tmp_path / "t5")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "t5" / file).unlink()
        with pytest.raises(ValueError, match="no usable tokenizer"):
            load_text_encoder(tmp_path / "t5")
    save_tiny_t5(tmp_path / "t5")
    (tmp_path / "t5" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no readable safetensors weights"):
        load_text_encoder(tmp_path / "t5")
