"""Which rows belong together: images of one sample, and views of one picture."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from arra.data.views import choices_by_sample, common_grid, rows_by_sample

IDS = ["a", "a#flip", "b", "b#flip", "c", "d", "d#flip"]
SAMPLES = ["s", "s#flip", "s", "s#flip", "t", "t", "t#flip"]
VIEW_OF = [None, "a", None, "b", None, None, "d"]


def test_rows_of_a_sample_are_its_own_and_a_view_counts_if_all_of_them_have_it():
    assert rows_by_sample(SAMPLES, VIEW_OF) == [[0, 2], [4, 5]]
    # c of sample t has no mirrored view (its caption says left), so t has none.
    assert choices_by_sample(IDS, SAMPLES, VIEW_OF) == [[[0, 2], [1, 3]], [[4, 5]]]


def test_an_id_with_a_hash_of_its_own():
    ids, view_of = ["x#flip", "x#flip#flip", "x"], [None, "x#flip", None]
    assert choices_by_sample(ids, ids, view_of) == [[[0], [1]], [[2]]]


@given(st.lists(st.sets(st.sampled_from(["flip", "centre", "top"])), min_size=1, max_size=20))
def test_without_samples_every_view_is_a_choice(views):
    ids, view_of = [], []
    for number, names in enumerate(views):
        ids += [f"{number}", *(f"{number}#{name}" for name in sorted(names))]
        view_of += [None, *(f"{number}" for _ in names)]
    choices = choices_by_sample(ids, ids, view_of)
    assert [len(each) for each in choices] == [1 + len(names) for names in views]
    assert sorted(row for each in choices for (row,) in each) == list(range(len(ids)))


def test_the_grid_that_most_images_have():
    assert common_grid(np.array([[4, 4], [2, 6], [2, 6], [6, 2]], np.int16)) == (2, 6)
    assert common_grid(np.array([[4, 4], [2, 6]], np.int16)) == (2, 6)
