"""What belongs together stays together when val is taken from train."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from arra.data.plan import split_off
from arra.data.sources import Rows, open_source


def table(folder, count, **columns):
    rows = []
    for i in range(count):
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "text": "t"} | {k: v(i) for k, v in columns.items()})
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return open_source(folder / "data.jsonl")


def patients(source, column="patient"):
    return {record.extra[column] for record in source.read(0, len(source))}


def test_patients_are_not_divided(tmp_path):
    source = table(tmp_path, 60, patient=lambda i: f"p{i % 20}", sample=lambda i: f"s{i}")
    parts = split_off({"train": source}, 0.1, seed=0)
    assert not patients(parts["train"]) & patients(parts["val"])
    assert len(parts["val"]) == 6  # two patients
    assert len(parts["train"]) + len(parts["val"]) == 60
    again = split_off({"train": source}, 0.1, seed=0)
    assert again["val"].fingerprint == parts["val"].fingerprint
    other = split_off({"train": source}, 0.1, seed=1)
    assert other["val"].fingerprint != parts["val"].fingerprint
    assert Rows(source, [0, 20, 1]).groups == ["group p0", "group p0", "group p1"]


def test_one_group_is_not_moved_out_of_train(tmp_path):
    source = table(tmp_path, 8, sample=lambda i: "all")
    assert list(split_off({"train": source}, 0.5, seed=0)) == ["train"]


def test_rows_without_groups_are_chosen_as_before(tmp_path):
    source = table(tmp_path, 50)
    assert source.groups is None
    parts = split_off({"train": source}, 0.1, seed=3)
    import numpy as np

    chosen = sorted(np.random.default_rng([3, 50]).permutation(50)[:5].tolist())
    assert parts["val"].rows == chosen


@pytest.mark.parametrize("column", ["patient", "sample"])
def test_parquet(tmp_path, column):
    names = [f"g{i // 2}" for i in range(9)] + [None]
    cells = pa.table({"image": [b"x"] * 10, "text": ["t"] * 10, column: names})
    pq.write_table(cells, tmp_path / "d.parquet", row_group_size=3)
    groups = open_source(tmp_path / "d.parquet").groups
    assert groups == [*(f"group {name}" for name in names[:9]), "row 9"]
