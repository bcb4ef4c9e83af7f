"""Captions and conditions: what a user asks of a source, and that no row is lost by it."""

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arra.data.captions import CaptionColumns
from arra.data.selection import Condition, Reading, Selected, Template, describe, reading_of
from arra.data.sources import Record, Reject, open_source


class Made:
    """A source from a list of rows in memory."""

    name, split, splits, fingerprint = "made", "train", ("train",), "fp"
    class_names = ("cat", "dog")
    columns = {  # noqa: RUF012
        "aesthetic": float,
        "view": str,
        "label": int,
        "good": bool,
        "LANGUAGE": str,
    }

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    groups = None

    def read(self, start, stop):
        for number, row in enumerate(self.rows[start:stop], start):
            if isinstance(row, str):
                yield Reject(number, f"r{number}", row)
            else:
                extra = {name: row.get(name) for name in self.columns}
                yield Record(f"r{number}", b"", row.get("text", "a caption"), extra, number)


def only(row, **options):
    source = Selected(
        Made([row]),
        options.get("template"),
        options.get("where", ()),
        options.get("language"),
    )
    (item,) = source.read(0, 1)
    return item.reason if isinstance(item, Reject) else item.text


@pytest.mark.parametrize(
    ("row", "condition", "reason"),
    [
        ({"aesthetic": 4.2}, "aesthetic >= 5", "filtered: aesthetic 4.2 is not >= 5"),
        ({"aesthetic": 5.0}, "aesthetic>=5", None),
        ({"aesthetic": 5.0}, "aesthetic > 5.0", "filtered: aesthetic 5 is not > 5.0"),
        ({"aesthetic": -1.0}, "aesthetic < -0.5", None),
        ({"aesthetic": 0.4}, "aesthetic <= 4e-1", None),
        ({}, "aesthetic >= 5", "filtered: aesthetic is missing"),
        ({}, "view != AP", "filtered: view is missing"),
        ({"view": "AP"}, "view in AP,PA", None),
        ({"view": "LL"}, "view in AP, PA", "filtered: view LL is not in AP, PA"),
        ({"view": "PA"}, "view == 'PA'", None),
        ({"view": "in x"}, 'view == "in x"', None),
        ({"view": "17"}, "view >= 16.5", None),
        ({"view": "17"}, "view < 17", "filtered: view 17 is not < 17"),
        ({"view": "old"}, "view > 3", "filtered: view is no number (old)"),
        ({"LANGUAGE": "de"}, "LANGUAGE==en", "filtered: LANGUAGE de is not == en"),
        ({"label": 3}, "label == 3", None),
        ({"label": 3}, "label >= 2.5", None),
        ({"label": 3}, "label in 1,2", "filtered: label 3 is not in 1,2"),
        ({"good": True}, "good == true", None),
        ({"good": False}, "good != False", "filtered: good false is not != False"),
        ({"text": "a dog"}, "text != a cat", None),
        ({"text": "a dog"}, "text in a cat,b", "filtered: the caption is not in a cat,b"),
    ],
)
def test_conditions(row, condition, reason):
    assert only(row, where=(condition,)) == (reason or row.get("text", "a caption"))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("beauty >= 5", r"no column 'beauty'; there are text, aesthetic, view, label, good"),
        ("aesthetic", "write COLUMN OP VALUE, OP one of >=, <=, >, <, ==, !=, in"),
        ("aesthetic >=", "write COLUMN OP VALUE"),
        ("aesthetic >= high", "'high' is no number"),
        ("view >= AP", "'AP' is no number"),
        ("good >= 1", "good is true or false: use == or !="),
        ("good == yes", "'yes' is neither true nor false"),
    ],
)
def test_conditions_that_are_none(condition, message):
    with pytest.raises(ValueError, match=message):
        Condition.parse(condition, Made([]))


def test_templates():
    row = {"view": "AP", "aesthetic": 5.5, "label": 1, "good": True, "text": "no acute process"}
    told = "{view} view chest x-ray image, {text}"
    assert only(row, template=told) == "AP view chest x-ray image, no acute process"
    assert only(row, template="a {label}, {aesthetic}, {good} {{x}}") == "a dog, 5.5, true {x}"
    assert only({**row, "label": 7}, template="a {label}") == "a 7"  # a number without a name
    for view in (None, ""):
        reason = only({**row, "view": view}, template=told)
        assert reason == "the caption template needs view, which is missing"
    with pytest.raises(ValueError, match=r"no column 'vew'; there are text, aesthetic, view"):
        Template("{vew} view", Made([]))
    for text in ("{text", "text}", "{{text}", "{}"):
        with pytest.raises(ValueError, match="--caption-template"):
            Template(text, Made([]))
    # What a caption says is never a field itself.
    assert only({"text": "{view} {"}, template="x {text}") == "x {view} {"


def test_language():
    pytest.importorskip("py3langid")
    german = "ein roter Kreis links von einem blauen Quadrat"
    reason = only({"text": german}, language="en")
    assert reason == "filtered: the caption's language is de, not en"
    assert only({"text": german}, language="de") == german
    for text in ("a dog", "AP view", "a red circle left of a blue square"):
        assert only({"text": text}, language="en") == text
    assert only({"text": "un perro en la playa"}, language="en").startswith("filtered: ")
    # The source's own words are judged, not the template around them.
    assert "de, not en" in only({"text": german}, language="en", template="a picture of {text}")
    with pytest.raises(ValueError, match="'english' is not one of"):
        Selected(Made([]), None, (), "english")


def test_language_without_its_package(monkeypatch):
    from arra.data.language import _identifier

    _identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(ValueError, match=r"arra\[language\].*--where 'LANGUAGE == en'"):
        Selected(Made([]), None, (), "en")


def test_a_reading_is_what_a_manifest_keeps_of_it(tmp_path):
    reading = Reading(limit=3, where=("score >= 2",), caption_template="{text}!", captions="join")
    kept = json.loads(json.dumps({"name": "x", "fingerprints": {}, **describe(reading)}))
    assert reading_of(kept) == reading
    rows = [{"path": f"{i}.png", "text": [f"a{i}", "b"], "score": i} for i in range(9)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = reading.open(str(tmp_path / "d.jsonl"), None)
    items = list(source.read(0, len(source)))
    assert [type(item) for item in items] == [Reject, Reject, Record]  # limit counts source rows
    assert items[2].text == "a2 b!"
    plain = open_source(tmp_path / "d.jsonl", limit=3, captions="join")
    assert source.fingerprint != plain.fingerprint
    assert Reading(limit=3, captions="join").open(str(tmp_path / "d.jsonl"), None).fingerprint == (
        plain.fingerprint
    )


def test_several_caption_columns_in_a_table(tmp_path):
    rows = [
        {"path": "a.png", "long": "long a", "short": "short a"},
        {"path": "b.png", "long": None, "short": "short b"},
        {"path": "c.png", "long": " ", "short": ["one", "", "two"]},
        {"path": "d.png", "long": "", "short": []},
        {"path": "e.png", "long": 7, "short": "x"},
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def texts(columns, captions="first", seed=0):
        source = open_source(
            tmp_path / "d.jsonl", text_column=columns, captions=captions, seed=seed
        )
        return [getattr(item, "text", None) or item.reason for item in source.read(0, 5)]

    last = ["the caption is missing", "the caption is not text but int"]
    assert texts("long,short") == ["long a", "short b", "one", *last]
    assert texts("short, long")[:3] == ["short a", "short b", "one"]
    assert texts("long,short", "join") == ["long a short a", "short b", "one two", *last]
    drawn = {tuple(texts("long,short", "random", seed)) for seed in range(20)}
    assert len(drawn) == 4  # two rows with two captions each
    assert texts("long,short", "random", 3) == texts("long,short", "random", 3)
    with pytest.raises(ValueError, match="no column 'longer'"):
        texts("short,longer")
    with pytest.raises(ValueError, match="--captions last is not one of"):
        texts("short", "last")


def test_a_drawn_caption_depends_on_the_id_and_the_seed_only():
    captions = CaptionColumns(which="random", seed=1)
    drawn = [captions.drawn(f"id{i}", 5) for i in range(500)]
    assert drawn == [captions.drawn(f"id{i}", 5) for i in range(500)]
    assert all(60 < drawn.count(k) < 140 for k in range(5))
    assert drawn != [CaptionColumns(which="random", seed=2).drawn(f"id{i}", 5) for i in range(500)]


def test_a_column_with_a_comma_in_its_name(tmp_path):
    (tmp_path / "d.csv").write_text('path,"Title, English"\na.png,hello\n')
    (record,) = open_source(tmp_path / "d.csv", text_column="Title, English").read(0, 1)
    assert record.text == "hello"


def test_a_source_with_one_caption_a_row_refuses_to_choose(tmp_path):
    entry = {"conversations": [{"from": "human", "value": "x"}], "image": []}
    (tmp_path / "c.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match="one caption a row"):
        open_source(tmp_path / "c.json", captions="join")


ROWS = st.lists(
    st.one_of(
        st.just("a damaged image"),
        st.fixed_dictionaries(
            {
                "text": st.text(min_size=1),
                "aesthetic": st.one_of(st.none(), st.floats(0, 10)),
                "view": st.sampled_from([None, "", "AP", "PA", "LL"]),
                "label": st.one_of(st.none(), st.integers(-2, 3)),
            }
        ),
    ),
    max_size=30,
)


@settings(deadline=None)
@given(
    ROWS,
    st.sets(st.sampled_from(["aesthetic >= 5", "view in AP,PA", "label != 1", "text != a"])),
    st.sampled_from([None, "{view}: {text}", "{label} {aesthetic}"]),
    st.integers(0, 30),
    st.integers(0, 30),
)
def test_every_row_is_a_record_or_a_reject_in_its_place(rows, where, template, start, stop):
    source = Selected(Made(rows), template, sorted(where), None)
    items = list(source.read(0, len(source)))
    assert [item.row for item in items] == list(range(len(rows)))
    assert [item.id for item in items] == [f"r{i}" for i in range(len(rows))]
    assert list(source.read(start, stop)) == items[start:stop]
    for row, item in zip(rows, items, strict=True):
        if isinstance(item, Reject):
            assert item.reason
        elif template is None:
            assert item.text == row["text"]
