"""The audit: every changed byte is found and named, every planted defect by its own check."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arra import cli
from arra.data.job import PROGRESS, REJECTS
from arra.data.manifest import (
    FeatureInfo,
    Manifest,
    ShardInfo,
    SplitInfo,
    TokenizerInfo,
    write_manifest,
)
from arra.data.prepare import prepare
from arra.data.prepare_config import PrepareConfig
from arra.data.shard_file import Row, shard_name, write_shard
from arra.doctor import neighbours
from arra.doctor.audit import audit
from arra.doctor.audit_files import kind_of
from arra.doctor.duplicates import repeats, shared
from arra.doctor.settings import AuditConfig
from arra.files import sha256_of, write_sealed

CODES, DIM = 64, 16
COLUMNS = {"patient": str}


# ---- a dataset of our own, sound but for what a test plants in it --------------------------------


def make_rows(split: str, count: int, start: int) -> list[Row]:
    random = np.random.default_rng(start + 1)
    return [
        Row(
            id=f"{split}/{i}",
            sample=f"{split}/{i}",
            image_index=0,
            text=f"picture {start + i}",
            codes_hw=random.integers(0, CODES, (4, 4)),
            features={"clip": random.normal(size=DIM).astype(np.float16)},
            extra={"patient": f"p{start + i}"},
        )
        for i in range(count)
    ]


def make_dataset(folder: Path, splits: dict[str, list[Row]]) -> Path:
    """Two shards of each split, with everything that `arra prepare` writes around them."""
    infos, with_views = {}, any(r.view_of for rows in splits.values() for r in rows)
    for split, rows in splits.items():
        half = len(rows) // 2
        shards = []
        for number, part in enumerate((rows[:half], rows[half:])):
            path = folder / shard_name(split, number)
            shards.append(write_shard(path, part, {"clip": DIM}, COLUMNS, with_views=with_views))
            note = {"shard": dataclasses.asdict(shards[-1]), "rejects": []}
            write_sealed(folder / PROGRESS / f"{path.stem}.json", note)
        infos[split] = SplitInfo(len(rows), shards)
    (folder / REJECTS).write_text("")
    kept = {s: sum(r.view_of is None for r in rows) for s, rows in splits.items()}
    options = {"shard_rows": max(len(rows) for rows in splits.values()) // 2, "splits": []}
    write_sealed(
        folder / "plan.json", {"rows": kept, "options": options | {"seed": 0, "val_fraction": 0.0}}
    )
    nothing = [0.0] * DIM
    clip = FeatureInfo(DIM, "fp", "clip", "class", nothing, nothing, nothing)
    tokenizer = TokenizerInfo(str(folder / "no-tokenizer"), "fp", CODES, 4)
    source = {"name": str(folder / "no-source"), "fingerprints": {}}
    made = Manifest(infos, tokenizer, {"clip": clip}, 16, "none", {"patient": "string"})
    sha256 = sha256_of(folder / REJECTS)
    write_manifest(folder, dataclasses.replace(made, source=source, rejects_sha256=sha256))
    return folder


def sound() -> dict[str, list[Row]]:
    return {"train": make_rows("train", 40, 0), "test": make_rows("test", 20, 100)}


def statuses(folder: Path, **options: object) -> dict[str, str]:
    """The checks that found something, samples apart: there is no tokenizer here."""
    found, _ = audit(AuditConfig(str(folder), samples=1, device="cpu", **options))  # type: ignore[arg-type]
    return {c.name: c.status for c in found.checks if c.status != "ok" and c.name != "samples"}


def said(folder: Path) -> list[str]:
    found, _ = audit(AuditConfig(str(folder), samples=1, device="cpu"))
    return [f.line() for c in found.checks for f in c.findings]


def test_a_sound_dataset_has_no_finding(tmp_path: Path) -> None:
    assert statuses(make_dataset(tmp_path / "d", sound())) == {}


def changed(row: Row, **values: object) -> Row:
    return dataclasses.replace(row, **values)  # type: ignore[arg-type]


def zeroed(splits: dict[str, list[Row]]) -> None:
    zero = {"clip": np.zeros(DIM, np.float16)}
    splits["train"][7] = changed(splits["train"][7], features=zero)


def infinite(splits: dict[str, list[Row]]) -> None:
    wrong = splits["test"][3].features["clip"].copy()
    wrong[5] = np.inf
    splits["test"][3] = changed(splits["test"][3], features={"clip": wrong})


def long_feature(splits: dict[str, list[Row]]) -> None:
    far = {"clip": splits["train"][7].features["clip"] * np.float16(20)}
    splits["train"][7] = changed(splits["train"][7], features=far)


def same_picture_in_two_splits(splits: dict[str, list[Row]]) -> None:
    one = splits["train"][11]
    splits["test"][2] = changed(splits["test"][2], codes_hw=one.codes_hw, features=one.features)


def same_picture_twice(splits: dict[str, list[Row]]) -> None:
    one = splits["train"][11]
    splits["train"][30] = changed(splits["train"][30], codes_hw=one.codes_hw, features=one.features)


def same_patient(splits: dict[str, list[Row]]) -> None:
    splits["test"][4] = changed(splits["test"][4], extra={"patient": "p9"})


def same_sample(splits: dict[str, list[Row]]) -> None:
    for split, row in (("train", 1), ("test", 1)):
        splits[split][row] = changed(splits[split][row], sample="together")


def same_id_in_two_splits(splits: dict[str, list[Row]]) -> None:
    splits["test"][4] = changed(splits["test"][4], id="train/9", sample="train/9")


def same_id_twice(splits: dict[str, list[Row]]) -> None:
    splits["train"][25] = changed(splits["train"][25], id="train/9", sample="train/9")


def dead_codebook(splits: dict[str, list[Row]]) -> None:
    for split, rows in splits.items():
        random = np.random.default_rng(len(rows))
        splits[split] = [changed(row, codes_hw=random.integers(0, 4, (4, 4))) for row in rows]


def code_outside(splits: dict[str, list[Row]]) -> None:
    codes = splits["train"][20].codes_hw.copy()
    codes[1, 2] = CODES
    splits["train"][20] = changed(splits["train"][20], codes_hw=codes)


def near_duplicate(splits: dict[str, list[Row]]) -> None:
    close = splits["train"][20].features["clip"] * np.float16(1.01)
    splits["train"][33] = changed(splits["train"][33], features={"clip": close})


def one_caption(splits: dict[str, list[Row]]) -> None:
    splits["train"] = [changed(row, text="a picture") for row in splits["train"]]


def constant_feature(splits: dict[str, list[Row]]) -> None:
    shift = np.full(DIM, 100, np.float16)
    for split, rows in splits.items():
        splits[split] = [changed(r, features={"clip": r.features["clip"] + shift}) for r in rows]


PLANTED = [
    (zeroed, {"feature clip": "damage"}, "train/7"),
    (infinite, {"feature clip": "damage"}, "test/3"),
    (long_feature, {"feature clip": "warning"}, "train/7"),
    (constant_feature, {"feature clip": "warning", "near clip": "warning"}, "mean cosine"),
    (same_picture_in_two_splits, {"leakage": "damage"}, "train/11 = test/2"),
    (same_picture_twice, {"pictures": "warning"}, "train/11 = train/30"),
    (same_patient, {"leakage": "damage"}, "1 value of column patient in both (p9)"),
    (same_sample, {"leakage": "damage"}, "1 value of column sample in both (together)"),
    (same_id_in_two_splits, {"leakage": "damage"}, "1 row in both, by id (train/9)"),
    (same_id_twice, {"ids": "damage"}, "train/9"),
    (dead_codebook, {"codes": "warning"}, "4 of 64 codes are ever used"),
    (code_outside, {"codes": "damage"}, "train/20"),
    (near_duplicate, {"near clip": "warning"}, "train/20 ~ train/33"),
    (one_caption, {"captions": "warning"}, '"a picture"'),
]


@pytest.mark.parametrize(
    ("plant", "found", "named"), PLANTED, ids=lambda x: getattr(x, "__name__", "")
)
def test_a_planted_defect_is_found_by_its_own_check_only(plant, found, named, tmp_path) -> None:  # type: ignore[no-untyped-def]
    splits = sound()
    plant(splits)
    folder = make_dataset(tmp_path / "d", splits)
    assert statuses(folder) == found
    assert any(named in line for line in said(folder))


def test_a_picture_in_two_splits_is_a_warning_below_one_percent(tmp_path: Path) -> None:
    splits = {"train": make_rows("train", 150, 0), "test": make_rows("test", 120, 200)}
    same_picture_in_two_splits(splits)
    assert statuses(make_dataset(tmp_path / "d", splits)) == {"leakage": "warning"}
    assert statuses(tmp_path / "d", strict=True) == {"leakage": "warning"}


def test_ids_that_count_rows_are_not_leakage(tmp_path: Path) -> None:
    numbered = {
        split: [changed(row, id=str(i), sample=str(i)) for i, row in enumerate(rows)]
        for split, rows in sound().items()
    }
    folder = make_dataset(tmp_path / "d", numbered)
    assert statuses(folder) == {}
    assert any("ids count rows here" in line for line in said(folder))


def view(row: Row, name: str) -> Row:
    """A further view that looks like its main row."""
    return changed(row, id=f"{row.id}#{name}", view_of=row.id)


def test_views_are_no_duplicates_of_their_own_row_but_leak_for_it(tmp_path: Path) -> None:
    splits = sound()
    splits["train"] = [each for row in splits["train"] for each in (row, view(row, "flip"))]
    assert statuses(make_dataset(tmp_path / "sound", splits)) == {}
    test = splits["test"][6]
    random = np.random.default_rng(9)
    splits["train"][1] = changed(
        splits["train"][1], id="test/6#flip", sample="x", view_of="test/6",
        codes_hw=random.integers(0, CODES, (4, 4)),
        features={"clip": random.normal(size=DIM).astype(np.float16)},
    )  # fmt: skip
    folder = make_dataset(tmp_path / "by-id", splits)
    assert "leakage" in statuses(folder)
    assert any("1 row in both, by id (test/6#flip = test/6)" in line for line in said(folder))
    splits = sound()
    splits["train"] = [each for row in splits["train"] for each in (row, view(row, "flip"))]
    splits["train"][1] = changed(splits["train"][1], codes_hw=test.codes_hw, features=test.features)
    folder = make_dataset(tmp_path / "by-picture", splits)
    assert statuses(folder) == {"leakage": "damage"}
    assert any("train/0#flip = test/6" in line for line in said(folder))


def test_a_damaged_shard_of_views_is_not_taken_for_missing_rows(tmp_path: Path) -> None:
    splits = sound()
    splits["train"] = [each for row in splits["train"] for each in (row, view(row, "flip"))]
    folder = make_dataset(tmp_path / "d", splits)
    shard = folder / "train-00001.parquet"
    shard.write_bytes(shard.read_bytes()[1:])
    found = {"files": "damage", "rows": "not checked", "content": "not checked"}
    assert statuses(folder) == found


# ---- bytes ---------------------------------------------------------------------------------------


def make_pictures(folder: Path, count: int) -> Path:
    """An image folder that the bundled tokenizer can take; one picture is damaged."""
    folder.mkdir()
    lines = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"noise {i}"}))
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    return prepare(
        PrepareConfig(
            source=str(make_pictures(folder / "pictures", 11)),
            image_tokenizer="builtin:scenes",
            encoder=("clip=builtin:scenes-clip",),
            size=64, batch_size=4, shard_rows=4, val_fraction=0.2, threads=1, workers=0,
            device="cpu", out=folder / "data",
        )
    )  # fmt: skip


def files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def bytes_only(folder: Path) -> dict[str, list[str]]:
    """File -> what is said about it, without a look at the content."""
    from arra.doctor.audit_files import check_bytes, read_files

    files = read_files(folder)
    if files.manifest is not None:
        check_bytes(files, folder, lambda rows: None)
    return {f.where: [f.what] for f in files.findings if f.level == "damage"}


def damages(content: bytes, random: np.random.Generator, count: int):  # type: ignore[no-untyped-def]
    """A bit flipped and a byte cut, at the ends and at random."""
    places = [0, len(content) - 1, *random.integers(0, len(content), count).tolist()]
    for place in places:
        flipped = content[place] ^ (1 << int(random.integers(8)))
        yield content[:place] + bytes([flipped]) + content[place + 1 :]
        yield content[:place] + content[place + 1 :]


def flip_and_cut_each_file(prepared: Path, copy: Path, count: int) -> int:
    shutil.copytree(prepared, copy)
    names, tried = files_of(copy), 0
    kinds = {"manifest.json", "plan.json", "rejects.jsonl"}
    kinds |= {"train-00000.parquet", f"{PROGRESS}/train-00000.json"}
    assert kinds <= set(names)
    assert bytes_only(copy) == {}
    random = np.random.default_rng(4)
    for name in names:
        content = (copy / name).read_bytes()
        for damaged in damages(content, random, count):
            (copy / name).write_bytes(damaged)
            assert list(bytes_only(copy)) == [name], f"{name}: not found, or others"
            tried += 1
        (copy / name).unlink()
        assert list(bytes_only(copy)) == [name], f"{name} is missing"
        (copy / name).write_bytes(content)
    assert bytes_only(copy) == {}
    return tried


def test_a_flipped_bit_or_cut_byte_in_any_file_is_found_and_named(
    prepared: Path, tmp_path: Path
) -> None:
    assert flip_and_cut_each_file(prepared, tmp_path / "copy", 2) >= 80


@pytest.mark.long
def test_two_hundred_damages_in_each_file(prepared: Path, tmp_path: Path) -> None:
    assert flip_and_cut_each_file(prepared, tmp_path / "copy", 100) >= 2000


def test_a_damaged_shard_is_named_and_its_content_is_not_judged(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    shard = copy / "train-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert statuses(copy) == {"files": "damage", "content": "not checked"}
    assert cli.main(["doctor", str(copy), "--samples", "0"]) == 1
    printed = capsys.readouterr()
    assert "train-00001.parquet: is damaged" in printed.out
    assert "same `arra prepare` command again" in printed.out
    assert printed.out.rstrip().endswith("verdict: NOT fine: damage in 1 place, 1 not checked")
    assert printed.err.splitlines()[-1].startswith(f"arra: {copy}: NOT fine: damage in 1 place")


def test_a_dataset_in_an_object_store(prepared: Path) -> None:
    pytest.importorskip("upath")
    import fsspec

    store = fsspec.filesystem("memory")
    store.put(f"{prepared}/", "/audited/", recursive=True)
    assert not audit(AuditConfig("memory://audited", samples=0, device="cpu"))[0].failed
    note = f"/audited/{PROGRESS}/train-00000.json"
    store.pipe(note, store.cat(note)[:-1])
    found, _ = audit(AuditConfig("memory://audited", samples=0, device="cpu"))
    damage = [f for c in found.checks for f in c.findings if f.level == "damage"]
    assert [f.where for f in damage] == [f"{PROGRESS}/train-00000.json"]


def test_without_a_manifest_the_rest_is_said_to_be_not_checked(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    (copy / "manifest.json").unlink()
    assert cli.main(["doctor", str(copy)]) == 1
    printed = capsys.readouterr().out
    assert "manifest.json: is missing: preparing was not finished" in printed
    assert "1 not checked" in printed


# ---- rows, samples, report -----------------------------------------------------------------------


def test_a_missing_row_is_counted(prepared: Path, tmp_path: Path) -> None:
    from arra.data.manifest import read_manifest

    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    manifest = read_manifest(copy)
    last = manifest.splits["train"].shards[-1]
    (copy / last.file).unlink()
    (copy / PROGRESS / f"{Path(last.file).stem}.json").unlink()
    train = SplitInfo(
        manifest.splits["train"].rows - last.rows, manifest.splits["train"].shards[:-1]
    )
    splits = {**manifest.splits, "train": train}
    write_manifest(copy, dataclasses.replace(manifest, splits=splits))
    found = statuses(copy)
    assert found["rows"] == "damage"
    assert any(f"{last.rows} missing" in line for line in said(copy))


def test_rejects_are_counted_by_reason() -> None:
    reasons = [
        "missing file /data/a b/12.png",
        "missing file other/13.jpg",
        "filtered: a side is shorter than 64 pixels (12)",
        "filtered: a side is shorter than 64 pixels (40)",
        "feature 'clip' is zero everywhere in float16",
    ]
    assert len({kind_of(reason) for reason in reasons[2:4]}) == 1
    assert kind_of(reasons[4]) == "feature … is zero everywhere in floatN"


def test_the_report_holds_its_pictures_and_says_what_is_missing(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    assert cli.main(["doctor", str(prepared), "--out", str(out), "--samples", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert json.loads((out / "audit.json").read_text()) == told
    assert told["failed"] is False
    checks = {check["name"]: check for check in told["checks"]}
    assert checks["rows"]["facts"]["rejects"] == {"train": 1} or checks["rows"]["facts"][
        "rejects"
    ] == {"val": 1}
    assert checks["samples"]["facts"]["agreement"] == 1.0
    assert checks["samples"]["facts"]["compared"] == 4
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64") >= 8
    assert "http" not in page.replace("http://www.w3.org", "")
    assert sorted(p.name for p in out.iterdir()) == [
        "audit.json", "near-clip.png", "report.html", "samples.png",
    ]  # fmt: skip
    with Image.open(out / "samples.png") as sheet:
        assert sheet.width > 1000


def test_what_cannot_be_checked_is_said(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere, files = tmp_path / "elsewhere", files_of(prepared)
    shutil.copytree(prepared.parent / "pictures", elsewhere)
    gone = ["--source", str(tmp_path / "nowhere"), "--image-tokenizer", str(tmp_path / "none")]
    assert cli.main(["doctor", str(prepared), *gone]) == 0
    printed = capsys.readouterr().out
    assert "codes as pictures: the image tokenizer" in printed
    assert "originals: the source" in printed
    assert "verdict: fine" in printed
    assert "2 not checked" in printed
    assert files_of(prepared) == files  # nothing is written
    moved = ["--source", str(elsewhere)]
    found, seen = audit(AuditConfig(str(prepared), samples=3, source=moved[1], device="cpu"))
    assert not found.failed
    assert all(each.original is not None for each in seen.samples)


def test_another_picture_in_the_source_is_seen(prepared: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(prepared.parent / "pictures", elsewhere)
    for path in elsewhere.glob("*.png"):
        size = path.stat().st_size
        Image.new("RGB", (64, 64), "red").save(path)
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    found, seen = audit(AuditConfig(str(prepared), samples=3, source=str(elsewhere), device="cpu"))
    text = [f.line() for c in found.checks if c.name == "samples" for f in c.findings]
    assert "codes are not those of the original" in text[0] or "is another now" in text[0]
    assert seen.samples


# ---- what it counts on ---------------------------------------------------------------------------


def test_repeats_and_shared() -> None:
    key = np.array([5, 0, 7, 5, 0, 7, 5], np.uint64)
    owner = np.array([1, 2, 3, 4, 5, 3, 1], np.uint64)
    again, firsts = repeats(key, owner)
    assert (again.tolist(), firsts.tolist()) == ([3], [0])
    mine, theirs = shared(key, np.array([9, 0, 7], np.uint64))
    assert (mine.tolist(), theirs.tolist()) == ([2], [2])
    assert repeats(key[:0], owner[:0])[0].tolist() == []


def test_near_duplicates_by_blocks_and_draws_are_those_of_all_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {"train": make_rows("train", 60, 0), "test": make_rows("test", 30, 100)}
    for row in range(0, 20, 2):
        close = splits["train"][row].features["clip"] * np.float16(1.01)
        splits["train"][row + 1] = changed(splits["train"][row + 1], features={"clip": close})
    leaked = splits["train"][50].features["clip"] * np.float16(0.99)
    splits["test"][5] = changed(splits["test"][5], features={"clip": leaked})
    folder = make_dataset(tmp_path / "d", splits)

    def near() -> dict[str, object]:
        found, _ = audit(AuditConfig(str(folder), samples=0, device="cpu"))
        facts = next(c.facts for c in found.checks if c.name == "near clip")
        # Products of other shapes differ in their last bit.
        pairs = [{**pair, "cosine": round(pair["cosine"], 5)} for pair in facts["pairs"]]
        return {**facts, "pairs": pairs}

    exact = near()
    assert (exact["within"], exact["between"]) == (10, 1)
    assert exact["pairs"][0]["one"] == ["train", 50]  # type: ignore[index]
    feature = np.stack([r.features["clip"].astype(np.float32) for s in splits.values() for r in s])
    unit = feature / np.linalg.norm(feature, axis=1, keepdims=True)
    upper = np.triu(unit @ unit.T, 1)
    assert int((upper >= 0.99).sum()) == 11
    monkeypatch.setattr(neighbours, "_BLOCK", 7)
    assert near() == exact
    monkeypatch.setattr(neighbours, "EXACT", 40)
    monkeypatch.setattr(neighbours, "FEWEST", 40)
    drawn = near()
    assert (drawn["compared"], drawn["rows"]) == (40, 90)
    assert 1 <= drawn["within"] + drawn["between"] <= 11  # type: ignore[operator]
    monkeypatch.setattr(neighbours, "FEWEST", 89)
    assert near()["between"] == 1


def test_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "nowhere"]) == 2
    assert "is no prepared dataset" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "nowhere", "--near", "2"])
    assert stopped.value.code == 2
    assert "--near must be in (0, 1]" in capsys.readouterr().err


def test_strict_makes_warnings_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = sound()
    same_picture_twice(splits)
    folder = make_dataset(tmp_path / "d", splits)
    assert cli.main(["doctor", str(folder)]) == 0
    assert cli.main(["doctor", str(folder), "--strict"]) == 1
    assert "--strict makes warnings errors" in capsys.readouterr().out


def test_a_shard_that_is_not_what_the_manifest_says(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "d", sound())
    other = [changed(r, features={"dino": r.features["clip"]}) for r in make_rows("train", 20, 0)]
    shard = write_shard(folder / "train-00000.parquet", other, {"dino": DIM}, COLUMNS)
    from arra.data.manifest import read_manifest

    manifest = read_manifest(folder)
    shards = [ShardInfo(*dataclasses.astuple(shard)), manifest.splits["train"].shards[1]]
    splits = {**manifest.splits, "train": SplitInfo(40, shards)}
    write_manifest(folder, dataclasses.replace(manifest, splits=splits))
    note = {"shard": dataclasses.asdict(shard), "rejects": []}
    write_sealed(folder / PROGRESS / "train-00000.json", note)
    assert statuses(folder) == {"files": "damage", "content": "not checked"}
    assert "train-00000.parquet: has no column feature.clip" in " ".join(said(folder))
