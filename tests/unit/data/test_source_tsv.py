"""Tables with tabs: as CSV, with another separator."""

import pytest
from PIL import Image

from arra.data.sources import Reject, open_source


def test_tsv(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = b'file_name\ttext\tage\na.png\tone, "two"\t3\na.png\tthree\t4\nb.png\tx\t5\t6\n'
    (tmp_path / "test.tsv").write_bytes(rows)
    source = open_source(tmp_path / "test.tsv")
    assert (source.split, source.columns) == ("test", {"age": int})
    items = list(source.read(0, len(source)))
    assert items[0].text == 'one, "two"'
    assert items[0].extra == {"age": 3}
    assert [i.reason.split(",")[0] for i in items if isinstance(i, Reject)] == [
        "duplicate id",
        "line 4 has more fields than the header: quote tabs",
    ]


def test_quotes_in_a_tsv_are_quotes_only_around_a_field(tmp_path):
    rows = b'file_name\ttext\na.png\t"a ""b""\tc"\nb.png\tit is 5" long\n'
    (tmp_path / "data.tsv").write_bytes(rows)
    records = list(open_source(tmp_path / "data.tsv").read(0, 2))
    assert [r.text for r in records] == ['a "b"\tc', 'it is 5" long']
    with pytest.raises(ValueError, match="no column 'caption'"):
        open_source(tmp_path / "data.tsv", text_column="caption")
