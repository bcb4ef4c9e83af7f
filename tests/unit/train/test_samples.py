"""What the sample grids of a run are painted from."""

from types import SimpleNamespace

from arra.train.samples import _prompts


def test_words_end_where_the_image_begins_as_in_training():
    texts = ["a lung <image> shows no effusion", "a heart", "not asked for"]
    rows = SimpleNamespace(first=SimpleNamespace(texts=texts))
    assert _prompts(SimpleNamespace(dataset=rows, captions=None), 2) == ["a lung ", "a heart"]
    assert _prompts(SimpleNamespace(dataset=rows, captions=object()), 2) == texts[:2]
