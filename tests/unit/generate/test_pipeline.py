"""Opening a painter, calling it, and what it refuses.

Legend: N images, h and w codes per side.
"""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import arra
from arra.files import read_json, write_json
from arra.generate.engine import Engine
from arra.generate.pipeline import Pipeline
from arra.generate.settings import Sampling
from arra.image_tokenizers.vq import VQModel
from arra.models.base import Backbone
from arra.models.loading import PIPELINE

GRID = (2, 4)


@pytest.fixture(scope="module")
def pipe(exported: Path) -> Pipeline:
    return Pipeline.from_pretrained(exported)


def test_an_export_opens_with_its_own_defaults(pipe: Pipeline, exported: Path) -> None:
    assert arra.Pipeline is Pipeline
    assert pipe.grid == GRID
    assert pipe.sampling == Sampling(**read_json(exported / PIPELINE)["sampling"])
    assert pipe.sampling.cfg == 3.0


def test_pictures_codes_and_batches_agree(pipe: Pipeline, backbone: Backbone) -> None:
    prompts, seeds = ["a red circle", "a line of many words and more", "a red circle"], [7, 8, 9]
    codes_Nhw = pipe.codes(prompts, seeds, cfg=2.0, top_k=5, slots=2)
    sampling = Sampling(cfg=2.0, top_k=5)
    again = Engine(backbone, 2).paint(pipe.requests(prompts, seeds, sampling))
    assert torch.equal(codes_Nhw, torch.stack(again))
    images = pipe(prompts, seeds, cfg=2.0, top_k=5, slots=2)
    assert [image.size for image in images] == [(8, 4)] * 3
    assert all(image.mode == "RGB" for image in images)
    pixels = pipe.decode(codes_Nhw)
    for image, expected in zip(images, pixels, strict=True):
        assert list(image.tobytes()) == expected.permute(1, 2, 0).flatten().tolist()


def test_half_precision_is_not_computed_in_on_a_cpu(
    backbone: Backbone, exported: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "half"
    shutil.copytree(exported, folder)
    half = copy.deepcopy(backbone.model).half()
    half.save_pretrained(folder / "model")
    opened = Pipeline.from_pretrained(folder).backbone.model
    assert opened.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in opened.parameters())
    bfloat = Pipeline.from_pretrained(folder, dtype="bfloat16").backbone.model
    assert bfloat.dtype == torch.bfloat16


def test_one_prompt_and_default_seeds(pipe: Pipeline) -> None:
    """Image j of every prompt has seed j, wherever in the list it stands."""
    found_Nhw = pipe.codes(["a line", "a dot", "a line"])
    expected_Nhw = pipe.codes(["a line", "a line", "a dot"], [0, 1, 0])
    assert torch.equal(found_Nhw, expected_Nhw[[0, 2, 1]])
    assert torch.equal(pipe.codes("a dot"), expected_Nhw[2:])
    assert len(pipe("a dot")) == 1
    assert pipe([]) == []
    assert pipe.codes([]).shape == (0, *GRID)


def test_a_picture_is_the_same_alone_and_among_others(pipe: Pipeline) -> None:
    prompts = ["a red circle", "two blue squares", "", "a large green triangle left of a line"]
    together = pipe(prompts, seeds=[1, 2, 3, 4], slots=4)
    for index, prompt in enumerate(prompts):
        alone = pipe([prompt], seeds=[index + 1], slots=4)
        assert alone[0].tobytes() == together[index].tobytes()


def test_a_picture_comes_row_by_row(pipe: Pipeline) -> None:
    """Parts of the picture that a call gives: their codes are final, their pixels nearly."""
    prompts, seeds = ["a red circle", "two blue squares"], [1, 2]
    whole = pipe(prompts, seeds)
    codes_Nhw = pipe.codes(prompts, seeds)
    told = list(pipe.stream(prompts, seeds))
    heights = [image.size[1] for number, image, _ in told if number == 0]
    assert heights == [2, 4], "one part per row of codes, the last of them the picture"
    for number, image, finished in told:
        if finished:
            assert image.tobytes() == whole[number].tobytes()
        else:
            first = pipe.decode(codes_Nhw[number : number + 1, :1])[0]
            assert list(image.tobytes()) == first.permute(1, 2, 0).flatten().tolist()
    assert sum(finished for *_, finished in told) == 2


def test_who_stops_listening_stops_the_painting(pipe: Pipeline) -> None:
    told = pipe.stream(["a red circle"] * 3)
    next(told)
    engine = pipe.engine()
    told.close()
    assert not pipe.engine().busy
    assert engine is not None
    assert len(pipe("a line")) == 1


def test_the_engine_and_its_memory_are_kept(pipe: Pipeline) -> None:
    pipe("a line")
    engine = pipe.engine()
    pipe("a dot")
    assert pipe.engine() is engine
    assert pipe.engine(8) is not engine


def test_bad_calls_are_refused(pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match="2 prompts need as many seeds, got 1"):
        pipe(["a", "b"], seeds=[1])
    with pytest.raises(ValueError, match="--top-p must be in"):
        pipe(["a"], top_p=0.0)
    with pytest.raises(ValueError, match="--slots must be at least 1, got 0"):
        pipe(["a"], slots=0)
    with pytest.raises(ValueError, match="--seed must be in"):
        pipe(["a"], seeds=[-1])


def test_another_image_tokenizer_is_refused(
    exported: Path,
    backbone: Backbone,
    other_tokenizer: Callable[[int], VQModel],
    tmp_path: Path,
) -> None:
    other_tokenizer(16).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other is not the image tokenizer that .*fingerprint"):
        Pipeline.from_pretrained(exported, image_tokenizer=tmp_path / "other")
    with pytest.raises(ValueError, match="paints with 16 codes, the image tokenizer has 9"):
        Pipeline(backbone, other_tokenizer(9), GRID)


def test_the_image_tokenizer_is_found_where_it_was_recorded(
    exported: Path, image_tokenizer: VQModel, tmp_path: Path
) -> None:
    """A run folder holds none: its pipeline.json names it."""
    run = shutil.copytree(exported, tmp_path / "run")
    moved = shutil.move(run / "image_tokenizer", tmp_path / "vq")
    described = read_json(run / PIPELINE)
    described["image_tokenizer"]["spec"] = str(moved)
    write_json(run / PIPELINE, described)
    pipe = Pipeline.from_pretrained(run)
    assert pipe.image_tokenizer.fingerprint == image_tokenizer.fingerprint
    gone = shutil.move(moved, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="vq"):
        Pipeline.from_pretrained(run)
    assert Pipeline.from_pretrained(run, image_tokenizer=gone).grid == GRID


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format_version": 2}, "has format 2, this version reads 1"),
        ({"sampling": {"cfg": 3.0, "beams": 4}}, "no field 'beams'"),
        ({"sampling": {"top_p": 2.0}}, "--top-p must be in"),
    ],
)
def test_a_foreign_description_is_refused(
    change: dict[str, object], complaint: str, exported: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(exported, tmp_path / "export")
    write_json(folder / PIPELINE, read_json(folder / PIPELINE) | change)
    with pytest.raises(ValueError, match=complaint):
        Pipeline.from_pretrained(folder)


def test_public_names_are_lazy_and_complete() -> None:
    assert set(arra.__all__) <= set(dir(arra))
    assert all(getattr(arra, name) is not None for name in arra.__all__)
    with pytest.raises(AttributeError, match="no attribute 'paint_me'"):
        arra.paint_me  # noqa: B018
