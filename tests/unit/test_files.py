"""Files appear whole or not at all, and others may read them as the umask says."""

import os
from pathlib import Path

import pytest

from arra.files import atomic_dir, atomic_write, read_json, write_json


def test_a_file_is_replaced_whole_or_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text(str(1 / 0))
    assert read_json(path) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_appears_when_complete_and_is_never_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), atomic_dir(folder) as temporary:
        (temporary / "half").write_text(str(1 / 0))
    assert list(tmp_path.iterdir()) == []
    before = os.umask(0o022)
    try:
        with atomic_dir(folder) as temporary:
            file = temporary / "private"
            file.write_text("whole")
            file.chmod(0o600)
    finally:
        os.umask(before)
    assert (folder / "private").stat().st_mode & 0o777 == 0o644
    with pytest.raises(FileExistsError, match="already exists"), atomic_dir(folder):
        pass


@pytest.mark.parametrize(("content", "words"), [("{", "not valid JSON"), (None, "does not exist")])
def test_bad_json_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        read_json(path)


def test_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "nan.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []
