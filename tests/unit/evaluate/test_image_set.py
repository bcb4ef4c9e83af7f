"""Sets of images: where they are read from, their hash, and that a bad one is never passed over."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from arra.evaluate import image_set
from arra.evaluate.entries import open_entries
from arra.evaluate.image_set import StoredSet, key_of
from arra.evaluate.painter import PaintedSet
from arra.generate.settings import GenerateConfig

COUNT = 6


def pictures(count: int = COUNT, size: int = 24) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    made = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in made]


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def opened(spec: object, **given: object) -> StoredSet:
    return StoredSet(str(spec), open_entries(str(spec), **given))  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "plain"
    place.mkdir()
    for number, image in enumerate(pictures()):
        image.save(place / f"{number}.png")
    return place


def containers(place: Path) -> list[Path]:
    """The same pictures in four more containers, none with captions, one in reverse order."""
    with tarfile.open(place / "a.tar", "w") as tar:
        for number, image in reversed(list(enumerate(pictures()))):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(as_png(image))
            tar.addfile(member, io.BytesIO(as_png(image)))
    cells = [{"bytes": as_png(image), "path": None} for image in pictures()]
    pq.write_table(pa.table({"image": cells}), place / "b.parquet", row_group_size=4)
    pq.write_table(pa.table({"image": [as_png(i) for i in pictures()]}), place / "c.parquet")
    (place / "d").mkdir()
    for number, image in enumerate(pictures()):
        image.save(place / "d" / f"{number}.bmp")
    return [place / "a.tar", place / "b.parquet", place / "c.parquet", place / "d"]


def test_a_set_has_one_hash_whatever_holds_it(folder: Path, tmp_path: Path) -> None:
    expected = opened(folder).described()
    assert (expected["n"], expected["distinct"], expected["sizes"]) == (COUNT, COUNT, [[24, 24]])
    for container in containers(tmp_path):
        found = opened(container)
        assert found.described()["sha256"] == expected["sha256"], container
        assert found.captions is None
    (folder / "6.png").write_bytes(as_png(Image.new("RGB", (24, 24))))
    assert opened(folder).described()["sha256"] != expected["sha256"]
    assert opened(folder, limit=COUNT).described()["sha256"] == expected["sha256"]


def test_pictures_come_again_alone_and_by_any_number_of_workers(folder: Path) -> None:
    found = opened(folder)
    first = {picture.index: picture for picture in found}
    assert {p.index: p.key for p in StoredSet("x", open_entries(str(folder)), 5)} == {
        index: picture.key for index, picture in first.items()
    }
    again = found.at([4, 0, 4])
    assert [p.index for p in again] == [4, 0, 4]
    assert again[1].key == first[0].key
    assert np.array_equal(np.asarray(again[0].image), np.asarray(pictures()[4]))


def test_a_file_that_changes_meanwhile_is_told(folder: Path) -> None:
    found = opened(folder)
    pictures()[0].save(folder / "3.png")
    with pytest.raises(ValueError, match=r"3\.png changed while it was measured"):
        list(found)


def test_painted_folder_brings_prompts_seeds_and_settings(folder: Path) -> None:
    rows = [{"file": f"{n}.png", "prompt": f"a red circle {n}", "seed": n} for n in range(3)]
    (folder / "images.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[::-1]))
    (folder / "settings.json").write_text(json.dumps({"cfg": 2.0, "prompts": ["x"]}))
    found = opened(folder)
    assert list(found.names) == ["2.png", "1.png", "0.png"]
    assert found.captions == ["a red circle 2", "a red circle 1", "a red circle 0"]
    assert found.seeds == [2, 1, 0]
    assert found.described()["painted"] == {"cfg": 2.0}
    assert len(opened(folder, limit=2)) == 2


def test_scenes_are_a_set_with_captions() -> None:
    found = opened("builtin:scenes", split="test", limit=4)
    assert len(found) == 4
    assert found.captions is not None
    assert found.described()["split"] == "test"
    assert found.described()["captions_sha256"] != found.described()["sha256"]


def test_bad_images_are_counted_named_and_refused(folder: Path) -> None:
    (folder / "1.png").write_bytes(b"")
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[: len(whole) // 2])
    (folder / "9.png").write_bytes(b"GIF89a, but not really")
    with pytest.raises(ValueError, match="3 of 7 images") as error:
        opened(folder)
    for name in ("1.png", "2.png", "9.png"):
        assert name in str(error.value)


def test_missing_painted_file_and_broken_listing(folder: Path) -> None:
    (folder / "images.jsonl").write_text('{"file": "0.png"}\n{"file": "gone.png"}\n')
    with pytest.raises(ValueError, match=r"gone\.png"):
        opened(folder)
    (folder / "images.jsonl").write_text('{"file": "0.png"}\n{"fi')
    with pytest.raises(ValueError, match="line 2"):
        opened(folder)


def test_a_set_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no images"):
        opened(tmp_path)


def test_damaged_containers_are_named(tmp_path: Path) -> None:
    paths = containers(tmp_path)
    for path in paths[:2]:
        path.write_bytes(path.read_bytes()[:700])
        with pytest.raises(ValueError, match=f"{path.name} is damaged"):
            opened(path)
    with pytest.raises(ValueError, match="no column 'picture'"):
        opened(paths[2], image_column="picture")


def test_pictures_straight_from_a_painter() -> None:
    """They equal those of a call, carry prompt and seed, and come again one by one."""
    config = GenerateConfig("builtin:scenes", "", num=2, seed=3, slots=8, device="cpu")
    prompts = ["a red circle", "a small blue square"]
    found = PaintedSet(config, prompts)
    seen = {picture.index: picture for picture in found}
    assert sorted(seen) == [0, 1, 2, 3]
    assert found.captions == ["a red circle"] * 2 + ["a small blue square"] * 2
    assert [seen[index].run for index in range(4)] == [3, 4, 3, 4]
    found._kept.clear()
    assert found.at([2])[0].key == seen[2].key
    described = found.described()
    assert described["painted"]["cfg"] > 0
    assert described["painted"]["ran_on"]["dtype"] == "float32"
    assert described["sizes"] == [[64, 64]]
    assert found.side == 64


def test_a_key_is_the_head_of_a_digest() -> None:
    assert key_of(b"\x01" + b"\x00" * 7 + b"\xff" * 24) == 1


def test_what_seems_to_be_an_image_is_never_left_out(folder: Path, tmp_path: Path) -> None:
    """Images by other names count; what cannot be looked at is named and refused."""
    whole = (folder / "0.png").read_bytes()
    (folder / "6.jfif").write_bytes(whole)
    (folder / "no-suffix").write_bytes(whole)
    (folder / "0.txt.json").write_text("{}")
    (folder / "README").write_text("six pictures")
    assert len(opened(folder)) == COUNT + 2
    (folder / "7.jpg.part").write_bytes(b"")
    (folder / "8.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "more").mkdir()
    (folder / "linked").symlink_to(tmp_path / "more")
    with pytest.raises(ValueError, match=r"3 of 11 images.*7\.jpg\.part.*8\.heic.*linked \(a link"):
        opened(folder)


def test_links_in_a_tar_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "6.png").hardlink_to(folder / "0.png")
    (folder / "7.png").symlink_to("0.png")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(folder, "plain")
    with pytest.raises(ValueError, match="2 of 8 images"):
        opened(tmp_path / "a.tar")


def test_images_beside_a_tar_are_not_passed_over(folder: Path) -> None:
    containers(folder)[0].rename(folder / "b.tar")
    (folder / "b.parquet").unlink()
    (folder / "c.parquet").unlink()
    with pytest.raises(ValueError, match=r"0\.png and 5 more images beside b\.tar"):
        opened(folder)


def test_several_splits_are_no_set(folder: Path, tmp_path: Path) -> None:
    tables = tmp_path / "tables"
    tables.mkdir()
    for name in ("train-0", "test-0"):
        pq.write_table(
            pa.table({"image": [as_png(i) for i in pictures()]}), tables / f"{name}.parquet"
        )
    assert len(opened(tables / "test-0.parquet")) == COUNT
    (tmp_path / "split").mkdir()
    for name in ("train", "val"):
        shutil.copytree(folder, tmp_path / "split" / name)
    assert len(opened(tmp_path / "split" / "val")) == COUNT
    for place, splits in ((tables, "test, train"), (tmp_path / "split", "train, val")):
        with pytest.raises(ValueError, match=f"holds several splits .{splits}"):
            opened(place)


def test_a_painted_folder_is_whole_and_reaches_nowhere_else(folder: Path) -> None:
    (folder / "settings.json").write_text(json.dumps({"cfg": 2.0, "num": 1, "prompts": ["x"]}))
    with pytest.raises(ValueError, match="not painted to its end"):
        opened(folder)
    rows = [{"file": f"{n}.png", "prompt": "red\u2028circle", "seed": n} for n in range(COUNT)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "images.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert opened(folder).captions == ["red\u2028circle"] * COUNT
    outside = json.dumps({"file": "../outside.png"})
    (folder / "images.jsonl").write_text("\n".join([*lines[:4], outside]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"1 of 5 .*leaves the folder"):
        opened(folder)


def test_names_and_prompts_can_be_written_down(folder: Path) -> None:
    """File names that are not UTF-8 are spelled out; such a prompt is no prompt."""
    (folder / "0.png").rename(folder / b"\xff.png".decode("utf-8", "surrogateescape"))
    found = opened(folder)
    assert "\\udcff.png" in found.names
    assert [picture.name for picture in found] == list(found.names)
    (folder / "images.jsonl").write_text('{"file": "1.png", "prompt": "\\udcff"}')
    with pytest.raises(ValueError, match="the prompt is not valid UTF-8"):
        opened(folder)
    (folder / "images.jsonl").write_bytes(b'{"file": "1.png", "prompt": "\xff"}')
    with pytest.raises(ValueError, match="is not UTF-8"):
        opened(folder)


def test_few_pictures_are_decoded_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or 256 photographs of 12 megapixels would take 9 GB."""
    for number in range(COUNT, 40):
        (folder / f"{number}.png").write_bytes((folder / "0.png").read_bytes())
    found = opened(folder)
    decoded = []
    load = image_set.load_rgb
    monkeypatch.setattr(image_set, "load_rgb", lambda path: decoded.append(path) or load(path))
    pictures_ = iter(found)
    next(pictures_)
    assert len(decoded) <= 2 * image_set.AHEAD + 1
    assert len(list(pictures_)) == 39
