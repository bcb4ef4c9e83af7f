"""Perplexity against the naive computation, before and after growing by image codes."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from arra.evaluate.perplexity import read_documents, text_perplexity
from arra.models.causal_lm import grow
from arra.models.loading import fit_text_tokenizer

TEXTS = ["the lungs are clear", "a much longer passage about two red circles and a square", "a"]


def backbone(codes):
    tokenizer = fit_text_tokenizer(TEXTS, 300)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config).double()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # far from uniform
    return grow(model, tokenizer, codes), len(tokenizer)


def naive(grown, texts):
    nll, tokens = 0.0, 0
    image = grown.layout.image_vocabulary()
    for text in texts:
        ids = [*grown.opening(), *grown.text_ids(text)]
        with torch.no_grad():
            logits = grown.model(torch.tensor([ids])).logits[0].float()
        logits[:, image] = -torch.inf
        logprobs = logits.log_softmax(-1)
        nll -= sum(float(logprobs[t - 1, ids[t]]) for t in range(1, len(ids)))
        tokens += len(ids) - 1
    return nll, tokens


def test_equals_the_naive_computation():
    grown, _ = backbone(16)
    result = text_perplexity(grown, TEXTS, batch_size=2)
    nll, tokens = naive(grown, TEXTS)
    assert result.tokens == tokens
    assert result.nll == pytest.approx(nll, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(
        nll / math.log(2) / sum(len(t.encode()) for t in TEXTS)
    )


def test_growing_by_codes_changes_nothing():
    few, many = backbone(1)[0], backbone(300)[0]
    assert text_perplexity(few, TEXTS).nll == pytest.approx(
        text_perplexity(many, TEXTS).nll, rel=1e-6
    )


def test_windows_score_each_token_once():
    grown, _ = backbone(16)
    document = " ".join(TEXTS * 20)
    whole = len(grown.text_ids(document))
    assert whole > 64
    for window in (2, 9, 10_000):
        assert text_perplexity(grown, [document], window=window).tokens == whole


def test_documents(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one\ntwo\nthree\n", encoding="utf-8")
    assert read_documents(path) == ["one", "two", "three"]
    path.write_text("one\ntwo\n\n\n\nthree\n", encoding="utf-8")
    assert read_documents(path) == ["one\ntwo", "three"]
    path.write_bytes(b"\xff\xfe broken")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_documents(path)
    path.write_text(" \n", encoding="utf-8")
    with pytest.raises(ValueError, match="no text"):
        read_documents(path)
