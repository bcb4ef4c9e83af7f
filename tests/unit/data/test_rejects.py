"""What is said of rows that were left out."""

from arra.data.rejects import REJECTS, by_reason, told, write_rejects


def reject(row, reason):
    return {"split": "train", "row": row, "id": None, "reason": reason}


def test_reasons_are_counted_whatever_names_and_numbers_they_hold(tmp_path):
    rejects = [
        reject(0, "missing file /data/a b.png"),
        reject(1, "filtered: aesthetic 4.2 is not >= 5"),
        reject(2, "filtered: aesthetic 3 is not >= 5"),
        reject(3, "the caption is empty\u2028"),
    ]
    assert by_reason(rejects).most_common(1) == [("filtered: aesthetic N is not >= N", 2)]
    write_rejects(tmp_path / REJECTS, rejects)
    lines = list(told(tmp_path / REJECTS))
    assert lines[0].startswith("4 rows were left out")
    assert lines[1].split() == ["2", "filtered:", "aesthetic", "N", "is", "not", ">=", "N"]
    assert len(lines) == 4


def test_other_reasons_are_counted_together_and_nothing_is_said_of_nothing(tmp_path):
    write_rejects(tmp_path / REJECTS, [reject(i, f"because of {'abcdefgh'[i]}") for i in range(8)])
    assert list(told(tmp_path / REJECTS))[-1].split() == ["3", "for", "3", "other", "reasons"]
    write_rejects(tmp_path / REJECTS, [])
    assert list(told(tmp_path / REJECTS)) == []
