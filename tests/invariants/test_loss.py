"""Through a whole model in float64: what must not change the loss does not change it."""

import pytest
import torch
from torch import Tensor

from arra.batch import Sample
from arra.config import ModelConfig
from arra.data.loader import MicroBatch
from arra.layout import Image, Text
from arra.models.base import Backbone
from arra.models.loading import load_for_training
from arra.objective import Feature, Objective, Target, Terms
from arra.train.setup import Step

CODES, DIM = 16, 5
CAPTIONS = ["a circle", "a much longer caption with many words in it", "", "two squares"]
STYLES = ["grid", "chameleon", "lumina"]


def backbone(style: str) -> Backbone:
    config = ModelConfig(layers=2, hidden_size=16, heads=2, mlp_size=16, layout=style)
    made = load_for_training(
        None, config, codebook_KC=torch.zeros(CODES, 2), captions=CAPTIONS, seed=0
    )
    made.model.double()
    return made


def sample(model: Backbone, caption: str, seed: int, max_length: int | None = None) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    codes = tuple(torch.randint(0, CODES, (8,), generator=generator).tolist())
    prompt = Text(tuple(model.condition(caption, (2, 2))))
    return model.layout.sample([prompt, Image(codes, 2, 4)], max_length=max_length)


def terms_of(model: Backbone, samples: list[Sample], images: list[int], pad: int = 0) -> Terms:
    objective = Objective(16, [Target("clip", DIM, layers=(1,))], z_loss=1e-4).double()
    values = torch.randn(9, DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    feature = Feature(values[images], torch.zeros(DIM), torch.ones(DIM))
    batch = model.layout.collate(samples, pad_to=pad)
    return Step(model, objective)(MicroBatch(batch, {"clip": feature}), 1.0)


def sums(terms: Terms) -> Tensor:
    return torch.stack([terms.sums[name] for name in ("ar", "z", "gva/clip")])


@pytest.mark.parametrize("style", STYLES)
def test_padding_and_batch_neighbours_change_no_loss(style: str) -> None:
    model = backbone(style)
    each = [sample(model, caption, i) for i, caption in enumerate(CAPTIONS)]
    alone = [sums(terms_of(model, [one], [i])) for i, one in enumerate(each)]
    padded = [sums(terms_of(model, [one], [i], pad=70)) for i, one in enumerate(each)]
    together = sums(terms_of(model, each, [0, 1, 2, 3]))
    torch.testing.assert_close(torch.stack(padded), torch.stack(alone), rtol=1e-12, atol=0)
    torch.testing.assert_close(together, torch.stack(alone).sum(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("style", STYLES)
def test_truncation_is_a_shorter_caption_and_nothing_else(style: str) -> None:
    model = backbone(style)
    whole = sample(model, CAPTIONS[1], 1)
    cut = sample(model, CAPTIONS[1], 1, max_length=len(whole.ids) - 6)
    ids = model.condition(CAPTIONS[1], (2, 2))[:-6]
    image = Image(tuple(model.layout.ids_to_codes(codes_of(model, whole)).tolist()), 2, 4)
    shorter = model.layout.sample([Text(tuple(ids)), image])
    assert cut.ids == shorter.ids
    torch.testing.assert_close(
        sums(terms_of(model, [cut], [0])), sums(terms_of(model, [shorter], [0])), rtol=0, atol=0
    )


def codes_of(model: Backbone, one: Sample) -> Tensor:
    known = set(model.layout.code_ids)
    return torch.tensor([i for i in one.ids if i in known])


@pytest.mark.parametrize("style", STYLES)
def test_the_alignment_reaches_no_block_above_its_layer(style: str) -> None:
    model = backbone(style)
    terms = terms_of(model, [sample(model, CAPTIONS[0], 0)], [0])
    terms.sums["gva/clip"].backward()
    first, second = model.blocks
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in first.parameters())
    assert all(p.grad is None for p in second.parameters())
    assert all(p.grad is None for p in model.head.parameters())
