"""Every recipe is a whole config; a size by its name is LlamaGen's."""

import dataclasses

import pytest

from arra.cli import main
from arra.config import SIZES, ModelConfig, TrainConfig
from arra.config_json import from_json, to_json
from arra.recipes import RECIPES, START_FROM_A_MODEL


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_written_and_read(name: str) -> None:
    config = RECIPES[name]("data", "out")
    assert (config.recipe, config.data_folder, config.out) == (name, "data", "out")
    assert from_json(TrainConfig, to_json(config)) == config
    assert len((RECIPES[name].__doc__ or "").splitlines()[0]) <= 100


@pytest.mark.parametrize("size", SIZES)
def test_a_size_sets_the_shape(size: str) -> None:
    start = RECIPES["base"]("data", "out").model
    model = dataclasses.replace(start, size=size)
    assert (model.layers, model.hidden_size, model.heads, model.mlp_size) == SIZES[size]
    assert from_json(ModelConfig, to_json(model)) == model
    assert dataclasses.replace(start, size=size, layers=1) == model
    if size == "B":
        assert dataclasses.replace(model, size="custom") == start


def test_epochs_of_the_published_protocols() -> None:
    full, subset = (RECIPES[name]("data", "out") for name in ("imagenet", "imagenet-subset"))
    assert full.steps == 300 * 5004
    assert subset.steps == 300 * 1015
    assert full.batch_size == subset.batch_size == 256


@pytest.mark.parametrize("name", START_FROM_A_MODEL)
def test_a_recipe_for_weights_that_exist_asks_for_them(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", name, "--data", "data", "--out", "out"]) == 2
    assert "name it with --model" in capsys.readouterr().err
