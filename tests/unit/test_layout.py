"""Layout: ids, labels, masks and legal codes, exact for each format."""

import pytest
import torch

from arra.batch import IGNORE
from arra.layout import Image, Layout, Text

CODES = tuple(range(100, 116))
LAYOUTS = {
    "grid": Layout("grid", CODES, pad=0),
    "chameleon": Layout("chameleon", CODES, pad=0, begin=1, end=2),
    "lumina": Layout(
        "lumina", CODES, pad=0, begin=1, end=2, row_end=3, first_size=50, num_sizes=9, size_unit=2
    ),
    "closing": Layout(
        *("lumina", CODES, 0, 1, 2, 3, 50, 9),
        closing=6,
        wording="{width} by {height}: ",
    ),
    "rep": Layout("chameleon", CODES, pad=0, begin=1, end=2, rep=9),
    "written": Layout(
        *("written", CODES, 0, 1, 2, 3),
        digits=tuple(range(20, 30)),
        times=40,
        grid_begin=41,
        grid_end=42,
    ),
}
GRIDS = [(1, 1), (2, 2), (2, 4), (4, 2), (8, 6)]


def image(height: int, width: int, offset: int = 0) -> Image:
    return Image(tuple((offset + i) % 16 for i in range(height * width)), height, width)


def naive_hybnext(ids: list[int], layout: Layout) -> list[int]:
    return [t for t in range(len(ids) - 1) if ids[t + 1] in layout.code_ids]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_image_has_exactly_hw_aligned_positions(name: str, grid: tuple[int, int]) -> None:
    layout, (height, width) = LAYOUTS[name], grid
    if name == "lumina" and (height % 2 or width % 2):
        with pytest.raises(ValueError, match="no size token"):
            layout.sample([Text((7,)), image(height, width)])
        return
    batch = layout.collate([layout.sample([Text((7, 8)), image(height, width)])], pad_to=90)
    ids = batch.ids_BT[0].tolist()
    for kind in ("hybnext", "holding"):
        assert len(batch.positions[kind].flat_N) == height * width
    positions = batch.positions["hybnext"]
    assert positions.flat_N.tolist() == naive_hybnext(ids, layout)
    assert positions.cell_N.tolist() == list(range(height * width))
    codes = [ids[t + 1] - 100 for t in positions.flat_N.tolist()]
    assert codes == list(image(height, width).codes)


def test_lumina_sequence_is_the_released_format() -> None:
    layout = LAYOUTS["lumina"]
    sample = layout.sample([Text((7,)), image(2, 4)])
    expected = [7, 1, 51, 52, 100, 101, 102, 103, 3, 104, 105, 106, 107, 3, 2]
    assert sample.ids == expected
    assert sample.trained == [False] + [True] * (len(expected) - 1)
    aligned = [t for t, (i, _) in enumerate(sample.sets["hybnext"]) if i >= 0]
    # The second size token predicts the first code, a row end the first of the next row, and no
    # position whose next token is a row end or the end is aligned.
    assert aligned == [3, 4, 5, 6, 8, 9, 10, 11]


def test_written_sizes_are_digits_of_text() -> None:
    layout = LAYOUTS["written"]
    sample = layout.sample([Text((7,)), image(2, 12)])
    rows = [[*range(100, 112), 3], [*range(112, 116), *range(100, 108), 3]]
    assert sample.ids == [7, 1, 22, 40, 21, 22, 41, *rows[0], *rows[1], 42, 2]
    assert sample.trained == [False] + [True] * (len(sample.ids) - 1)
    aligned = [t for t, (i, _) in enumerate(sample.sets["hybnext"]) if i >= 0]
    assert aligned == [*range(6, 18), *range(19, 31)]
    assert {20, 29, 40, 41, 42, 3} < set(layout.image_vocabulary())


def test_labels_are_the_next_ids_from_begin_to_end_only() -> None:
    layout = LAYOUTS["chameleon"]
    batch = layout.collate([layout.sample([Text((7, 8)), image(2, 2), Text((9,))])], pad_to=12)
    ids, labels = batch.ids_BT[0], batch.labels_BT[0]
    assert ids.tolist() == [7, 8, 1, 100, 101, 102, 103, 2, 9, 0, 0, 0]
    assert labels.tolist() == [IGNORE, 1, 100, 101, 102, 103, 2, *[IGNORE] * 5]
    assert batch.trained_N.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.attention_BT[0].tolist() == [True] * 9 + [False] * 3
    with_text = layout.collate([layout.sample([Text((7, 8)), image(2, 2)], train_text=True)])
    assert with_text.labels_BT[0].tolist() == [8, 1, 100, 101, 102, 103, 2, IGNORE]


def test_several_images_are_numbered_through_the_batch() -> None:
    layout = LAYOUTS["chameleon"]
    two = layout.sample([Text((7,)), image(2, 2), Text((8,)), image(1, 2)])
    one = layout.sample([Text((7, 7, 7)), image(2, 1)])
    batch = layout.collate([two, one])
    assert batch.num_images == 3
    positions = batch.positions["hybnext"]
    assert positions.image_N.tolist() == [0] * 4 + [1] * 2 + [2] * 2
    assert positions.cell_N.tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    held = batch.ids_BT.flatten()[batch.positions["holding"].flat_N]
    predicted = batch.labels_BT.flatten()[positions.flat_N]
    assert torch.equal(held, predicted)


def test_grid_images_back_to_back_belong_to_the_image_they_predict() -> None:
    layout = LAYOUTS["grid"]
    batch = layout.collate([layout.sample([Text((7,)), image(1, 2), image(1, 2, offset=5)])])
    assert batch.positions["hybnext"].flat_N.tolist() == [0, 1, 2, 3]
    assert batch.positions["hybnext"].image_N.tolist() == [0, 0, 1, 1]
    assert batch.positions["holding"].image_N.tolist() == [0, 0, 1, 1]
    assert batch.positions["holding"].flat_N.tolist() == [1, 2, 3, 4]


def test_the_other_position_sets() -> None:
    layout = LAYOUTS["rep"]
    batch = layout.collate([layout.sample([Text((7,)), image(2, 2)])])
    assert batch.ids_BT[0].tolist() == [7, 9, 1, 100, 101, 102, 103, 2]
    assert batch.positions["rep"].flat_N.tolist() == [1]
    assert batch.positions["last"].flat_N.tolist() == [6]
    assert batch.positions["last"].cell_N.tolist() == [3]
    assert batch.positions["all"].flat_N.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch.labels_BT[0, 0] == IGNORE, "the rep token is part of the prompt"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_long_caption_is_cut_and_an_image_never(name: str) -> None:
    layout = LAYOUTS[name]
    length = layout.image_length(2, 2)
    sample = layout.sample([Text(tuple(range(10, 40))), image(2, 2)], max_length=length + 5)
    assert sample.ids[:5] == [10, 11, 12, 13, 14]
    assert len(sample.ids) == length + 5
    assert sum(i >= 0 for i, _ in sample.sets["hybnext"]) == 4
    with pytest.raises(ValueError, match="images alone need"):
        layout.sample([Text((1,)), image(2, 2)], max_length=length - 1)


def test_what_closes_a_prompt_is_never_cut() -> None:
    layout = LAYOUTS["chameleon"]
    prompt, answer = Text((*range(10, 20), 5, 6), ending=2), Text((20,) * 4)
    sample = layout.sample([prompt, image(1, 1), answer], max_length=11)
    assert sample.ids == [10, 11, 12, 5, 6, 1, 100, 2, 20, 20, 20]
    sample = layout.sample([prompt, image(1, 1), answer], max_length=5)
    assert sample.ids == [5, 6, 1, 100, 2]
    with pytest.raises(ValueError, match="images alone need 5"):
        layout.sample([prompt, image(1, 1)], max_length=4)


def test_the_longest_text_is_cut_first() -> None:
    layout = LAYOUTS["chameleon"]
    sample = layout.sample(
        [Text((10,) * 9), image(1, 1), Text((20,) * 4), image(1, 1)], max_length=12
    )
    assert [sample.ids.count(t) for t in (10, 20)] == [3, 3]
    assert len(sample.ids) == 12


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_plan_of_painting_is_the_training_sequence(name: str) -> None:
    layout, picture = LAYOUTS[name], image(2, 4)
    sample = layout.sample([Text((7,)), picture])
    plan = layout.plan(2, 4)
    emitted = [
        f if f >= 0 else layout.code_ids[picture.codes[c]]
        for f, c in zip(plan.forced_S.tolist(), plan.cell_S.tolist(), strict=True)
    ]
    assert [7, *emitted] == sample.ids
    for step, token in enumerate(emitted):
        legal = layout.legal_ids(step, plan)
        assert token in legal
        assert legal == [token] or legal == list(layout.code_ids)


def test_codes_of_another_tokenizer_are_refused() -> None:
    with pytest.raises(ValueError, match="outside the codebook of 16"):
        LAYOUTS["grid"].sample([Text((7,)), Image((99,), 1, 1)])
    with pytest.raises(ValueError, match="cannot have 3 codes"):
        Image((1, 2, 3), 2, 2)
    with pytest.raises(ValueError, match="no image code"):
        LAYOUTS["grid"].ids_to_codes(torch.tensor([100, 7]))


@pytest.mark.parametrize("name", LAYOUTS)
def test_json_round_trip(name: str) -> None:
    assert Layout.from_json(LAYOUTS[name].to_json()) == LAYOUTS[name]
    permuted = Layout("grid", (5, 3, 4), pad=0)
    assert Layout.from_json(permuted.to_json()) == permuted
    ids = torch.tensor([[5, 4], [3, 3]])
    assert permuted.ids_to_codes(ids).tolist() == [[0, 2], [1, 1]]


def test_the_image_vocabulary_covers_every_label() -> None:
    for layout in LAYOUTS.values():
        batch = layout.collate([layout.sample([Text((7,)), image(2, 4)])])
        assert set(batch.labels_N.tolist()) <= set(layout.image_vocabulary())
