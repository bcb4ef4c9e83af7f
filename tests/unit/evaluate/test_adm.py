"""Files of ADM's evaluator: what np.load reads of them is read here, in place, without pickle."""

import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arra.evaluate.adm import (
    KEYS,
    Moments,
    NpzImages,
    has_images,
    has_moments,
    read_moments,
    write_moments,
)
from arra.evaluate.image_set import StoredSet, digest_of

COUNT = 23


def drawn(count: int = COUNT) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (count, 12, 8, 3), np.uint8)


def spread(dim: int, seed: int) -> Moments:
    rows_ND = np.random.default_rng(seed).normal(size=(3 * dim, dim))
    return Moments(rows_ND.mean(axis=0), np.cov(rows_ND, rowvar=False), len(rows_ND))


@pytest.fixture(params=[np.savez, np.savez_compressed], ids=["stored", "compressed"])
def save(request: pytest.FixtureRequest) -> Callable[..., None]:
    found: Callable[..., None] = request.param
    return found


def test_a_batch_is_read_as_numpy_reads_it(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "samples.npz"
    save(path, arr_0=drawn(), arr_1=np.arange(COUNT))
    batch = NpzImages(path)
    assert len(batch) == COUNT
    for start, stop in [(0, 8), (8, 16), (16, 99), (5, 6), (2, 4), (22, 23), (0, 0)]:
        entries = list(batch.read(start, stop))
        assert [entry.name for entry in entries] == [f"row {i}" for i in range(start, stop)][
            : COUNT - start
        ]
        got = [np.asarray(entry.image) for entry in entries]
        np.testing.assert_array_equal(
            np.array(got, np.uint8).reshape(-1, 12, 8, 3), drawn()[start:stop], strict=True
        )


def test_two_readers_of_one_batch_do_not_disturb_each_other(
    tmp_path: Path, save: Callable[..., None]
) -> None:
    save(tmp_path / "x.npz", arr_0=drawn())
    batch = NpzImages(tmp_path / "x.npz")
    one, other = batch.read(0, COUNT), batch.read(4, COUNT)
    for row in range(COUNT - 4):
        for reader, at in ((one, row), (other, row + 4)):
            np.testing.assert_array_equal(np.asarray(next(reader).image), drawn()[at])


def test_a_batch_is_a_set_like_any_other(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "x.npz", arr_0=drawn())
    found = StoredSet("x.npz", NpzImages(tmp_path / "x.npz"))
    assert found.captions is None
    pictures = list(found)
    assert [picture.index for picture in pictures] == list(range(COUNT))
    assert found.described()["sizes"] == [[8, 12]]
    again = found.at([20, 3, 11])
    for picture, index in zip(again, (20, 3, 11), strict=True):
        np.testing.assert_array_equal(np.asarray(picture.image), drawn()[index])
        assert digest_of(picture.image) == digest_of(pictures[index].image)


def test_an_empty_batch_is_no_set(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=drawn(0))
    with pytest.raises(ValueError, match="holds no images"):
        StoredSet("x.npz", NpzImages(tmp_path / "x.npz"))


def refused(path: Path, reader: Callable[[Path], Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as told:
        reader(path)
    assert str(path) in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"images": drawn()}, "has no arr_0"),
        ({"arr_0": drawn().astype(np.float32)}, r"float32 \(23, 12, 8, 3\), but"),
        ({"arr_0": drawn()[..., 0]}, r"but a batch of images is uint8 \(N, H, W, 3\)"),
        ({"arr_0": drawn().transpose(0, 3, 1, 2)}, "but a batch of images"),
        ({"arr_0": np.asfortranarray(drawn())}, "not kept one after another"),
        ({"arr_0": np.array([{"a": 1}], dtype=object)}, "Python objects"),
    ],
)
def test_what_is_no_batch_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], reason: str
) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    refused(tmp_path / "x.npz", NpzImages, reason)


def test_damaged_files_are_refused(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "x.npz"
    save(path, arr_0=drawn())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, NpzImages, "cannot be read as an .npz file")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    path.write_bytes(bytes(flipped))
    refused(path, NpzImages, "cannot be read as an .npz file")
    path.write_bytes(b"")
    refused(path, NpzImages, "cannot be read as an .npz file")
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none.npz"))):
        NpzImages(tmp_path / "none.npz")


def test_an_array_shorter_than_its_header_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "arr_0.npy", drawn())
    short = (tmp_path / "arr_0.npy").read_bytes()[:-5]
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", short)
    refused(tmp_path / "x.npz", NpzImages, "fewer bytes than its header says")


def test_moments_come_back_as_they_were_kept(tmp_path: Path) -> None:
    kept = {"features": spread(8, 0), "spatial": replace(spread(5, 1), count=24)}
    about = {"source": "cxr", "extractors": {"inception": {"resize": "tf"}}}
    write_moments(tmp_path / "reference.npz", kept, about)
    found, said = read_moments(tmp_path / "reference.npz")
    assert said == about
    assert found["features"].count == 24
    for stream, moments in kept.items():
        np.testing.assert_array_equal(found[stream].mean_D, moments.mean_D)
        np.testing.assert_array_equal(found[stream].covariance_DD, moments.covariance_DD)
    assert has_moments(tmp_path / "reference.npz")
    assert not has_images(tmp_path / "reference.npz")


def test_other_programs_files_are_read_and_ours_by_them(tmp_path: Path) -> None:
    """The members' names are those of ADM's evaluator and of pytorch-fid (mu, sigma alone)."""
    pool, spatial = spread(6, 2), spread(4, 3)
    np.savez(
        tmp_path / "virtual.npz",
        arr_0=drawn(),
        mu=pool.mean_D.astype(np.float32),
        sigma=pool.covariance_DD,
        mu_s=spatial.mean_D.astype(np.float32),
        sigma_s=spatial.covariance_DD,
    )
    found, said = read_moments(tmp_path / "virtual.npz")
    assert said == {}
    assert set(found) == {"features", "spatial"}
    assert found["spatial"].count is None
    assert found["spatial"].mean_D.dtype == np.float64
    np.testing.assert_allclose(found["features"].mean_D, pool.mean_D, rtol=1e-6)
    assert len(NpzImages(tmp_path / "virtual.npz")) == COUNT
    assert has_images(tmp_path / "virtual.npz")
    assert has_moments(tmp_path / "virtual.npz")

    np.savez_compressed(tmp_path / "pytorch_fid.npz", mu=pool.mean_D, sigma=pool.covariance_DD)
    assert set(read_moments(tmp_path / "pytorch_fid.npz")[0]) == {"features"}

    write_moments(tmp_path / "ours.npz", {"features": pool}, {})
    with np.load(tmp_path / "ours.npz") as file:
        np.testing.assert_array_equal(file["mu"], pool.mean_D)
        np.testing.assert_array_equal(file["sigma"], pool.covariance_DD)


GOOD = spread(4, 4)
NOT_FINITE = GOOD.mean_D * np.array([1, np.nan, 1, 1])
LOPSIDED = GOOD.covariance_DD + np.triu(np.ones((4, 4)), 1)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"arr_0": drawn()}, "has no mu and sigma"),
        ({"mu": GOOD.mean_D}, "has mu but no sigma"),
        ({"mu": GOOD.mean_D, "sigma": GOOD.covariance_DD[:3, :3]}, "do not fit together"),
        ({"mu": NOT_FINITE, "sigma": GOOD.covariance_DD}, "NaN or infinity"),
        ({"mu": GOOD.mean_D, "sigma": LOPSIDED}, "not symmetric"),
        ({"mu": np.arange(4), "sigma": GOOD.covariance_DD}, "floating point"),
        ({"mu": np.array([{}], dtype=object), "sigma": GOOD.covariance_DD}, "allow_pickle=False"),
        (
            {"mu": GOOD.mean_D, "sigma": GOOD.covariance_DD, "about": np.array("[1]")},
            "not a JSON object",
        ),
        ({"mu": GOOD.mean_D, "sigma": GOOD.covariance_DD, "about": np.array("{")}, "Expecting"),
    ],
)
def test_what_is_no_reference_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], reason: str
) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    refused(tmp_path / "x.npz", read_moments, reason)


def test_other_files_have_neither_images_nor_moments(tmp_path: Path) -> None:
    for name in ("x.npz", "x.zip", "x.npy"):
        (tmp_path / name).write_bytes(b"no zip")
        assert not has_images(tmp_path / name)
        assert not has_moments(tmp_path / name)
    refused(tmp_path / "x.npz", read_moments, "cannot be read")
    with pytest.raises(FileNotFoundError):
        read_moments(tmp_path / "none.npz")
    assert set(KEYS) == {"features", "spatial"}


@pytest.mark.parametrize("about", ["5", '{"extractor": 5}', '{"extractor": {}}'])
def test_moments_of_a_file_that_says_something_odd_are_refused(tmp_path, about):
    file = tmp_path / "odd.npz"
    np.savez(file, mu=np.zeros(2), sigma=np.eye(2), about=np.asarray(about))
    with pytest.raises(ValueError, match=r"odd\.npz cannot be read .*about"):
        read_moments(file)
