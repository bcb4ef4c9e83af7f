"""The language models that people have, each from its own folder to a painter and out again.

Tiny random models of the real architectures, saved in their official format: opened, grown, probed,
trained with alignment, painted with guidance, saved, and opened by plain transformers.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from arra.config import ModelConfig
from arra.generate.engine import Engine
from arra.generate.request import Request
from arra.generate.settings import Sampling
from arra.layout import Image, Text
from arra.models.base import Backbone
from arra.models.loading import fit_text_tokenizer, load_for_training
from arra.objective import Feature, Objective, Target

CODES, GRID, DIM = 12, (2, 3), 6
CAPTIONS = ["a red circle", "two blue squares", "a line"]
ARCHITECTURES = {
    "llama": {"tie_word_embeddings": False},  # also SmolLM and SmolLM2
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "smollm3": {},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 5.0, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "gpt2": {},
}


def saved(architecture: str, folder: Path) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=300,  # more rows than the tokenizer has tokens, as in Qwen
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **ARCHITECTURES[architecture],
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    fit_text_tokenizer(CAPTIONS * 3, 280).save_pretrained(folder)
    return folder


def train(backbone: Backbone, steps: int) -> dict[str, torch.Tensor]:
    """A few aligned steps; the parameters as they were before."""
    before = {name: p.detach().clone() for name, p in backbone.model.named_parameters()}
    layout = backbone.layout
    rows = [
        layout.sample(
            [
                Text(tuple(backbone.condition(caption, GRID))),
                Image(tuple((i + k) % CODES for k in range(6)), *GRID),
            ]
        )
        for i, caption in enumerate(CAPTIONS)
    ]
    batch = layout.collate(rows)
    objective = Objective(backbone.hidden_size, [Target("clip", DIM, layers=(2,))])
    values = torch.randn(3, DIM, generator=torch.Generator().manual_seed(1))
    feature = Feature(values, torch.zeros(DIM), torch.full((DIM,), 0.1))
    optimizer = torch.optim.AdamW([*backbone.model.parameters(), *objective.parameters()], 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        with backbone.tap(objective.layers) as taps:
            last_BTD = backbone.last_hidden(batch.ids_BT)
        objective(taps, last_BTD, backbone.head, batch, {"clip": feature}).total().backward()
        optimizer.step()
    return before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_language_model_learns_to_paint_and_stays_one(architecture: str, tmp_path: Path) -> None:
    source = saved(architecture, tmp_path / "lm")
    backbone = load_for_training(
        source, ModelConfig(), codebook_KC=torch.randn(CODES, 4), captions=[], seed=0
    )
    before = train(backbone, 20)
    after = dict(backbone.model.named_parameters())
    assert [name for name in before if torch.equal(before[name], after[name])] == []

    backbone.model.eval()
    prefix = tuple(backbone.condition(CAPTIONS[0], GRID))
    (codes_hw,) = Engine(backbone, slots=2).paint([Request(prefix, 3, GRID, Sampling(cfg=2.0))])
    assert codes_hw.shape == GRID
    assert 0 <= int(codes_hw.min()) <= int(codes_hw.max()) < CODES

    backbone.save(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").eval()
    assert type(plain).__name__ == type(backbone.model).__name__
    ids = torch.tensor([prefix])
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, backbone.model(ids).logits)


def test_an_attention_that_a_model_lacks_is_named(tmp_path: Path, monkeypatch) -> None:
    # As Gemma 2 in transformers 5.23.
    monkeypatch.setattr(LlamaForCausalLM, "_supports_sdpa", False)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no attention 'sdpa'"):
        load_for_training(
            saved("llama", tmp_path),
            ModelConfig(attention="sdpa"),
            codebook_KC=torch.randn(CODES, 4),
            captions=[],
            seed=0,
        )
