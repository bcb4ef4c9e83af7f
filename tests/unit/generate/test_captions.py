"""Painting from a text encoder's features: what is predicted, row by row, and whose encoder it is.

Legend: N images, P cells, K codes, n tokens of a caption, F width of its features.
"""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from painted_logits import logits_of
from tiny_t5 import WIDTH, save_tiny_t5
from torch import Tensor

from arra.encoders.text import TextEncoder, load_text_encoder
from arra.generate.captions import EncodedPrompts, TextEncoderRecord, encoded_prompts
from arra.generate.pipeline import Pipeline
from arra.generate.request import Request
from arra.generate.settings import Sampling
from arra.image_tokenizers.vq import VQModel
from arra.models import Backbone
from arra.models.llamagen import LlamaGen
from arra.models.llamagen_layers import LlamaGenConfig
from arra.models.llamagen_model import LlamaGenForImageGeneration
from arra.models.loading import save_skeleton
from arra.text_features import TextFeatures

GRID, SLOTS, CODES = (2, 4), 6, 16


@pytest.fixture(scope="module")
def painter() -> Backbone:
    torch.manual_seed(0)
    config = LlamaGenConfig(
        vocab_size=CODES,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        grid_height=GRID[0],
        grid_width=GRID[1],
        condition="text",
        text_slots=SLOTS,
        caption_dim=WIDTH,
    )
    model = LlamaGenForImageGeneration(config).eval()
    torch.nn.init.normal_(model.output.weight, std=0.5)
    torch.nn.init.normal_(model.cls_embedding.cap_proj.fc2.weight, std=0.5)
    return LlamaGen._of(model)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    save_tiny_t5(folder)
    return folder


def captions(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, WIDTH, generator=generator).half() for n in lengths]


def request(painter: Backbone, caption_nF: Tensor | None, seed: int, cfg: float) -> Request:
    prefix = tuple(painter.condition("words", GRID))
    return Request(prefix, seed, GRID, Sampling(cfg=cfg), caption_nF)


@torch.no_grad()
def full(painter: Backbone, caption_nF: Tensor | None, dropped: bool, codes_P: Tensor) -> Tensor:
    """Logits (P, K) by one forward of the whole sequence, without the engine's padding."""
    text = TextFeatures.of([caption_nF], [dropped], SLOTS, WIDTH)
    ids = torch.cat([torch.tensor(painter.condition("words", GRID)), codes_P])[None]
    return painter.head(painter.last_hidden(ids[:, :-1], text)[0, SLOTS - 1 :])


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_paints_what_the_full_forward_predicts(
    painter: Backbone, cfg: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captions of all lengths, none at all, one too long; the unguided row under the same mask."""
    texts = [*captions(1, 3, SLOTS, SLOTS + 4), None]
    requests = [request(painter, text, seed, cfg) for seed, text in enumerate(texts)]
    codes, drawn = logits_of(painter, requests, 4, monkeypatch)
    for text, codes_hw, drawn_PK in zip(texts, codes, drawn, strict=True):
        guided_PK, unguided_PK = (
            full(painter, text, dropped, codes_hw.flatten()) for dropped in (False, True)
        )
        expected_PK = unguided_PK + cfg * (guided_PK - unguided_PK)
        assert (drawn_PK - expected_PK).abs().max() < 1e-5 * expected_PK.abs().max()


def test_a_picture_does_not_depend_on_its_neighbours(
    painter: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits are the same to the last bit, whatever lengths the others' captions have."""
    texts = [*captions(2, SLOTS, 4, 1), None]
    requests = [request(painter, text, 7 + i, 2.0) for i, text in enumerate(texts)]

    def logits(asked: list[Request]) -> list[Tensor]:
        return logits_of(painter, asked, 6, monkeypatch)[1]

    together = logits(requests)
    for one, expected_PK in zip(requests, together, strict=True):
        assert torch.equal(logits([one])[0], expected_PK)
    backwards = logits(requests[::-1])[::-1]
    assert all(map(torch.equal, backwards, together))
    assert len({float(logits_PK.sum()) for logits_PK in together}) == len(texts)


# ---- the encoder ---------------------------------------------------------------------------------


class Counting(TextEncoder):
    asked: ClassVar[list[list[str]]] = []

    def __call__(self, captions: list[str]) -> list[Tensor]:
        self.asked.append(list(captions))
        return super().__call__(captions)


def record(t5: Path, length: int = SLOTS) -> TextEncoderRecord:
    return TextEncoderRecord(str(t5), length, load_text_encoder(t5, length).fingerprint)


@pytest.fixture
def exported(painter: Backbone, image_tokenizer: VQModel, t5: Path, tmp_path: Path) -> Path:
    known = record(t5)
    save_skeleton(
        painter,
        tmp_path,
        grid=GRID,
        image_tokenizer="image_tokenizer",
        fingerprint=image_tokenizer.fingerprint,
        trained_vocabulary="all",
        text_encoder={"spec": known.spec, "length": SLOTS, "fingerprint": known.fingerprint},
    )
    painter.save(tmp_path)
    image_tokenizer.save_pretrained(tmp_path / "image_tokenizer")
    return tmp_path


def test_each_distinct_prompt_is_encoded_once_and_alone(
    exported: Path, t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def load(spec: str, length: int, device: str) -> TextEncoder:
        opened.append(Path(spec))
        return Counting(spec, Path(spec), length, device)

    monkeypatch.setattr("arra.encoders.text.load_text_encoder", load)
    monkeypatch.setattr(Counting, "asked", [])
    pipe = Pipeline.from_pretrained(exported)
    assert not opened, "opened when a prompt comes"
    prompts = ["a red circle", "", "a red circle", "two squares", ""]
    codes = pipe.codes(prompts)
    assert opened == [t5]
    assert Counting.asked == [["a red circle"], ["two squares"]]
    pipe.release_text_encoder()
    assert torch.equal(pipe.codes(prompts), codes)
    assert len(opened) == 1, "known prompts need no encoder"
    pipe.codes(["a line"])
    assert len(opened) == 2
    assert torch.equal(pipe.codes("two squares")[0], codes[3])
    assert not torch.equal(codes[0], codes[3])


def test_the_painters_own_encoder_is_verified(
    exported: Path, t5: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("other")
    save_tiny_t5(place)
    expected = Pipeline.from_pretrained(exported).codes("a red circle")
    moved = Pipeline.from_pretrained(exported, text_encoder=str(place))
    assert torch.equal(moved.codes("a red circle"), expected)
    save_tiny_t5(place, seed=1)
    other = Pipeline.from_pretrained(exported, text_encoder=str(place))
    with pytest.raises(ValueError, match=r"another\s+fingerprint.*--text-encoder"):
        other.codes("a red circle")
    save_tiny_t5(place, width=24)
    wide = EncodedPrompts(TextEncoderRecord(str(place), SLOTS, None), WIDTH, "cpu")
    with pytest.raises(ValueError, match="gives 24 values a token, the model takes 16"):
        wide(["a"])


def test_a_painter_without_a_record_takes_its_familys_or_the_given_one(
    painter: Backbone, t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = encoded_prompts(painter, {}, "cpu")
    assert known is not None
    assert known.record == TextEncoderRecord("google/flan-t5-xl", SLOTS, None)
    assert known.identity == f"google/flan-t5-xl at {SLOTS} tokens"
    given = encoded_prompts(painter, {}, "cpu", str(t5))
    assert given is not None
    assert given(["a"])[0].shape[1] == WIDTH
    monkeypatch.setattr(painter, "text_encoder", None)
    with pytest.raises(ValueError, match="does not say which: name it with --text-encoder"):
        encoded_prompts(painter, {}, "cpu")


def test_a_painter_that_reads_needs_none(backbone: Backbone) -> None:
    assert encoded_prompts(backbone, {}, "cpu") is None
    with pytest.raises(ValueError, match="leave it out"):
        encoded_prompts(backbone, {}, "cpu", "somewhere")


def test_damaged_encoders_and_missing_ones_are_named(
    painter: Backbone, image_tokenizer: VQModel, t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = Pipeline(painter, image_tokenizer, GRID)
    with pytest.raises(ValueError, match="give the pipeline `prompt_features`"):
        bare.codes("a")
    assert bare.codes("").shape == (1, *GRID)
    encoder = load_text_encoder(t5)
    with torch.no_grad():
        encoder.model.encoder.final_layer_norm.weight.fill_(torch.nan)
    monkeypatch.setattr("arra.encoders.text.load_text_encoder", lambda *_: encoder)
    with pytest.raises(ValueError, match="NaN or infinite features for 'a'"):
        EncodedPrompts(TextEncoderRecord(str(t5), 120, None), WIDTH, "cpu")(["a"])
