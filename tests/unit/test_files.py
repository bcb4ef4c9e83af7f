"""Files appear whole or not at all, and others may read them as the umask says."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from arra.files import atomic_dir, atomic_write, is_abandoned, read_json, write_json


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


@pytest.mark.parametrize("links", [True, False])
def test_of_several_writers_one_is_first(tmp_path: Path, monkeypatch, links: bool) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    path, barrier, won = tmp_path / "plan.json", threading.Barrier(8), []

    def write(number: int) -> None:
        barrier.wait()
        try:
            write_json(path, number, only_new=True)
        except FileExistsError:
            return
        won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [read_json(path)] == won
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_leftovers_of_the_dead_are_told_from_files_in_the_making(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.json") as temporary:
        temporary.write_text("1")
        assert not is_abandoned(temporary)
        elsewhere = temporary.with_name(temporary.name.replace(".json.", ".json.else"))
        elsewhere.write_text("1")
        assert not is_abandoned(elsewhere)
        os.utime(elsewhere, (0, 0))
        assert is_abandoned(elsewhere)
    assert not is_abandoned(temporary)
    code = (
        "import os, sys; from arra.files import atomic_write\n"
        f"with atomic_write({str(tmp_path / 'b.json')!r}) as temporary:\n"
        "    temporary.write_text('1'); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    (left,) = tmp_path.glob(".b.json*")
    assert is_abandoned(left)
