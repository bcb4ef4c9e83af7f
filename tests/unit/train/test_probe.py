"""The alignment probe: its measures, and what it says of models that were trained a little."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import in_ranks
from small_runs import small_config, small_dataset, small_run

from arra.config import AlignConfig, LogConfig
from arra.train.probe import Probe, check_probe, drawn, linear_cka, mutual_neighbours, probe
from arra.train.step import optimizer_step
from arra.train.tally import Tally
from arra.train.world import World, open_world

ALONE = World(torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data"))


def made_up(images: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(images, width, generator=torch.Generator().manual_seed(seed))


def test_a_representation_is_like_itself_whatever_its_rotation_and_scale() -> None:
    one_ED = made_up(40, 12)
    turned_ED = 3.5 * one_ED @ torch.linalg.qr(made_up(12, 12, 1)).Q
    for other_ED in (one_ED, turned_ED):
        assert linear_cka(one_ED, other_ED) == pytest.approx(1.0, abs=1e-6)
        assert mutual_neighbours(one_ED, other_ED) == pytest.approx(1.0)
    assert linear_cka(one_ED + 7.0, turned_ED) == pytest.approx(1.0, abs=1e-5)  # it centres


@pytest.mark.parametrize("width", [4, 400])  # plain CKA of few images and many values is near 1
def test_unrelated_representations_score_nothing(width: int) -> None:
    one_ED, other_ED = made_up(64, width), made_up(64, width, 1)
    assert abs(linear_cka(one_ED, other_ED)) < 0.1
    chance = Probe({}, 64).chance
    assert chance == pytest.approx(10 / 63)
    assert abs(mutual_neighbours(one_ED, other_ED) - chance) < 0.08


def test_cka_is_that_of_its_definition() -> None:
    """Unbiased HSIC as a mean over all quadruples of different images (Song et al.)."""
    one, other = (made_up(6, 3, seed).double().numpy() for seed in (0, 1))
    k, m = one @ one.T, other @ other.T

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        quads = [
            a[i, j] * (b[i, j] + b[q, r] - 2 * b[i, q])
            for i, j, q, r in np.ndindex(6, 6, 6, 6)
            if len({i, j, q, r}) == 4
        ]
        return float(np.mean(quads))

    expected = hsic(k, m) / (hsic(k, k) * hsic(m, m)) ** 0.5
    found = linear_cka(torch.tensor(one), torch.tensor(other))
    assert found == pytest.approx(expected, abs=1e-9)


def test_images_that_are_all_alike_score_zero() -> None:
    assert linear_cka(torch.ones(10, 3), made_up(10, 3)) == 0.0


def trained(data: Path, weight: float, steps: int = 60, **changes) -> Probe:
    config = small_config(data, align=AlignConfig(weight=weight), **changes)
    run = dataclasses.replace(small_run(config, ALONE), validation=None)
    for step in range(steps):
        optimizer_step(run, step, Tally(ALONE))
    return probe(run)


def test_an_aligned_layer_holds_more_of_its_target(data: Path) -> None:
    fresh, plain, aligned = trained(data, 4.0, 0), trained(data, 0.0), trained(data, 4.0)
    assert aligned.images == 20
    first = {name: found.scores["clip"]["cka"][0] for name, found in
             {"fresh": fresh, "plain": plain, "aligned": aligned}.items()}  # fmt: skip
    assert first["aligned"] > max(first["fresh"], first["plain"]) + 0.2, first
    near = [found.scores["clip"]["knn"][0] for found in (plain, aligned)]
    assert near[1] > near[0]


def test_processes_find_what_one_finds(data: Path) -> None:
    config = small_config(data)

    def found() -> dict[str, float]:
        with open_world("cpu") as world:
            run = dataclasses.replace(small_run(config, world), validation=None)
            return probe(run).fields()

    alone = probe(dataclasses.replace(small_run(config, ALONE), validation=None)).fields()
    for fields in in_ranks(3, found):
        assert fields.keys() == alone.keys()
        assert all(fields[name] == pytest.approx(alone[name], abs=1e-5) for name in alone)


def test_several_targets_are_named_and_drawn() -> None:
    scores = {"cka": [0.1, 0.2], "knn": [0.3, 0.4]}
    assert Probe({"clip": scores}, 64).fields()["probe/cka/layer_02"] == 0.2
    both = Probe({"clip": scores, "dino": scores}, 64)
    assert both.fields()["probe/knn/layer_01/dino"] == 0.3
    picture = drawn(both, [1], "a run, step 1,000: 64 images compared")
    assert picture.width > 600
    assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 20


def test_too_few_images_are_refused_before_training(data: Path) -> None:
    run = small_run(small_config(data, log=LogConfig(probe_every=1)), ALONE)
    with pytest.raises(ValueError, match=r"5 are too few, it takes 8 \(--log.validate-images"):
        check_probe(run)
