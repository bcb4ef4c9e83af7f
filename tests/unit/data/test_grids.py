"""Grids of patch features: what is stored of them, that a cell belongs to its code, and batches.

The stand-ins see one thing in a picture, the red level of a cell, and say it in the cell's code and
in its patch: so that it shows when a patch lies elsewhere than its code.
"""

import json
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from arra.config import ModelConfig
from arra.data import feature_statistics, grid_column, job
from arra.data.grid_column import GridFormat, bad_cells, coarsened, group_rows, resampled
from arra.data.loader import Loader
from arra.data.manifest import read_manifest
from arra.data.prepare import prepare
from arra.data.prepare_config import PrepareConfig
from arra.data.shard_file import stored_name
from arra.data.shards import Dataset, open_dataset
from arra.models.loading import load_for_training
from arra.objective import Feature, Objective, Target

SIZE = 16


class RedTokenizer:
    """Every code is the red level of its cell of 4 x 4 pixels."""

    codebook_size, factor, fingerprint = 256, 4, "red"

    def encode(self, pixels_NCHW):
        return pixels_NCHW[:, 0, ::4, ::4].long()


class RedPatches:
    """Patches of 2 x 2 pixels (or as many as said): [mean red / 256, 1]."""

    spec, name, pooling, dim, dtype, gives_grids = "red", "red", "patch", 2, "float32", True

    def __init__(self, patch=2, bad=None):
        self.patch, self.bad, self.fingerprint = patch, bad, f"patches-{patch}"
        self.grid = (SIZE // patch, SIZE // patch)

    def pixels(self, images):
        return torch.stack(
            [torch.from_numpy(np.asarray(i)[..., 0].copy()).float()[None] for i in images]
        )

    def pool(self, pixels_NCHW):
        red_NP = F.avg_pool2d(pixels_NCHW, self.patch).flatten(1) / 256
        cells = torch.stack([red_NP, torch.ones_like(red_NP)], dim=2)
        if self.bad is not None:
            cells[red_NP[:, 0] * 256 == self.bad[0], -1] = self.bad[1]
        return cells


def make_source(folder, count):
    """Pictures of 4 x 4 cells, every cell of another red level."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    lines = []
    for i in range(count):
        cells = np.zeros((4, 4, 3), np.uint8)
        cells[..., 0] = generator.permutation(240)[:16].reshape(4, 4) + 1
        cells[0, 0, 0] = 241 + i % 14
        Image.fromarray(cells).resize((SIZE, SIZE), 0).save(folder / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "text": f"picture {i}", "grid.own": i})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Prepares pictures with such an encoder."""
    make_source(tmp_path / "in", 23)

    def run(encoder, out="out", **changes):
        monkeypatch.setattr(job, "load_encoder", lambda spec, device, grids, dtype: encoder)
        options = {"image_tokenizer": "red", "encoder": ("dino=red",), "size": SIZE}
        options |= {"batch_size": 4, "shard_rows": 10, "val_fraction": 0.1, "threads": 1}
        config = PrepareConfig(source=str(tmp_path / "in"), out=tmp_path / out, **options | changes)
        return prepare(config, RedTokenizer())

    return run


# ---- one cell ------------------------------------------------------------------------------------

numbers = st.floats(-6e4, 6e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-4)


@given(st.lists(st.lists(numbers, min_size=5, max_size=5), min_size=1, max_size=4))
def test_int8_is_within_half_a_step_of_its_vector(rows):
    cells_pD = np.array(rows, np.float32)
    cells_pD[:, 0] = np.where(cells_pD.any(axis=1), cells_pD[:, 0], 1)
    form = GridFormat(5, (2, 2), "int8")
    stored_pb = form.pack(cells_pD)
    assert stored_pb.shape == (len(rows), form.width)
    largest_p1 = np.abs(cells_pD).max(axis=1, keepdims=True)
    error_pD = np.abs(form.unpack(stored_pb) - cells_pD)
    assert (error_pD <= largest_p1 / 254 * (1 + 1e-5)).all()


def test_float16_is_rounded_and_no_more():
    cells_pD = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    form = GridFormat(5, (2, 3), "float16")
    stored_pb = form.pack(cells_pD)
    assert stored_pb.dtype == np.uint8
    assert stored_pb.shape == (6, form.width)
    assert np.array_equal(form.unpack(stored_pb), cells_pD.astype(np.float16))


def test_int8_keeps_directions():
    """What the loss compares: the cosine of random vectors with one channel ten times as large."""
    cells_pD = np.random.default_rng(0).normal(size=(200, 768)).astype(np.float32)
    cells_pD[:, 7] *= 10
    form = GridFormat(768, (1, 1), "int8")
    found = torch.from_numpy(form.unpack(form.pack(cells_pD)))
    assert F.cosine_similarity(found, torch.from_numpy(cells_pD)).min() > 0.995


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ([[1, 0], [0, 2]], None),
        ([[1, 0], [0, np.nan]], "NaN or infinite"),
        ([[1, 0], [0, 7e4]], "NaN or infinite"),
        ([[1, 0], [0, 1e-9]], "zero everywhere in cell 1"),
    ],
)
def test_what_cannot_be_aligned_to(cells, reason):
    assert bad_cells(np.array(cells, np.float32)) == reason


# ---- resampling ----------------------------------------------------------------------------------


def test_coarser_is_the_mean_over_areas_and_finer_is_bilinear():
    cells_NPD = torch.randn(2, 6 * 4, 3, generator=torch.Generator().manual_seed(0))
    grid = cells_NPD.unflatten(1, (6, 4)).permute(0, 3, 1, 2)

    def flat(grid_NDhw):
        return grid_NDhw.flatten(2).transpose(1, 2)

    assert resampled(cells_NPD, (6, 4), (6, 4)) is cells_NPD
    wanted = F.avg_pool2d(grid, (3, 2))
    torch.testing.assert_close(resampled(cells_NPD, (6, 4), (2, 2)), flat(wanted))
    wanted = F.interpolate(grid, (12, 10), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resampled(cells_NPD, (6, 4), (12, 10)), flat(wanted))
    # 6 rows over 4: each takes one and a half, so every second row is shared
    thirds = resampled(cells_NPD, (6, 4), (4, 4)).unflatten(1, (4, 4))[:, 0]
    wanted = (2 * grid[:, :, 0] + grid[:, :, 1]).transpose(1, 2) / 3
    torch.testing.assert_close(thirds, wanted)
    ones = resampled(torch.ones(1, 37 * 37, 1), (37, 37), (16, 21))
    torch.testing.assert_close(ones, torch.ones(1, 16 * 21, 1))


def test_what_is_stored_is_never_finer_than_the_codes():
    form = GridFormat(3, (6, 4), "float16")
    assert form.stored_shape((3, 8)) == (3, 4)
    cells_NPD = torch.randn(2, 24, 3, generator=torch.Generator().manual_seed(0))
    stored = coarsened(cells_NPD, (6, 4), (3, 8))
    assert stored.shape == (2, 12, 3)
    whole = resampled(cells_NPD, (6, 4), (3, 8))
    torch.testing.assert_close(resampled(stored, (3, 4), (3, 8)), whole)


def test_groups_are_about_a_megabyte():
    assert group_rows([0], 16) == 16
    assert group_rows([512 * 1024, 1000], 16) == 2
    assert group_rows([5 * 2**20], 16) == 1


# ---- prepared ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_a_patch_belongs_to_the_code_of_its_place(made, patch, dtype):
    out = made(RedPatches(patch), grid_dtype=dtype)
    manifest = read_manifest(out)
    info = manifest.grids["dino"]
    assert (info.grid, info.stored) == ([SIZE // patch] * 2, dtype)
    assert manifest.features == {}
    rows = 0
    for split in ("train", "val"):
        dataset = open_dataset(out, split)
        column = dataset.patch_features["dino"]
        for row in range(len(dataset)):
            cells_nD = column[row]
            assert cells_nD.shape == (16, 2)
            code_n = torch.from_numpy(dataset.image_ids[row].astype(np.float32))
            if patch == 8:  # coarser than the codes: interpolated, so its means are kept
                assert abs(float(cells_nD[:, 0].mean() * 256 - code_n.mean())) < 2
                continue
            tolerance = 1.1 if dtype == "int8" else 0.13  # 256 / 254 and 2^-11
            torch.testing.assert_close(cells_nD[:, 0] * 256, code_n, atol=tolerance, rtol=0)
        rows += len(dataset)
    assert rows == 23
    file = pq.ParquetFile(out / "train-00000.parquet")
    form = grid_column.format_of(info)
    assert file.schema_arrow.field("grid.dino").type == form.type
    assert file.metadata.row_group(0).column(0).statistics is None
    stored = 16 if patch < 8 else 4
    assert len(file.read(columns=["grid.dino"]).column(0)[0]) == stored
    assert "source.grid.own" in file.schema_arrow.names
    assert stored_name("grid.own") == "source.grid.own"


def test_means_are_those_of_what_training_sees(made, monkeypatch):
    monkeypatch.setattr(feature_statistics, "GRID_IMAGES", 7)
    out = made(RedPatches(8))
    column = open_dataset(out).patch_features["dino"]
    chosen = feature_statistics.evenly(len(column), 7)
    assert len(chosen) <= 7
    assert chosen[-1] > len(column) / 2
    value = torch.stack([column[row] for row in chosen]).double()
    info = read_manifest(out).grids["dino"]
    mean_D = value.mean((0, 1))
    torch.testing.assert_close(torch.tensor(info.mean, dtype=torch.double), mean_D)
    unit = F.normalize(value, dim=-1).mean((0, 1))
    torch.testing.assert_close(torch.tensor(info.unit_mean, dtype=torch.double), unit)
    centred = F.normalize(value - mean_D, dim=-1).mean((0, 1))
    torch.testing.assert_close(torch.tensor(info.centred_unit_mean, dtype=torch.double), centred)


def test_bad_cells_are_rejects(made):
    out = made(RedPatches(bad=(245, float("nan"))))
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert {r["reason"] for r in rejects} == {"feature 'dino' is NaN or infinite in float16"}
    kept = [open_dataset(out, split) for split in ("train", "val") if split]
    assert sum(map(len, kept)) + len(rejects) == 23
    assert 241 + 4 not in {int(codes[0]) for dataset in kept for codes in dataset.image_ids}
    zero = made(RedPatches(4, bad=(245, 0.0)), out="zero")
    assert "zero everywhere in cell 15 in float16" in (zero / "rejects.jsonl").read_text()


def test_other_settings_do_not_mix_and_a_damaged_shard_is_made_anew(made):
    out = made(RedPatches())
    before = {path.name: path.read_bytes() for path in out.glob("*.parquet")}
    with pytest.raises(ValueError, match="--grid-dtype was float16, now int8"):
        made(RedPatches(), grid_dtype="int8")
    with pytest.raises(ValueError, match="the encoder of feature 'dino' is another"):
        made(RedPatches(4))
    (out / "train-00001.parquet").write_bytes(before["train-00001.parquet"][:-9])
    made(RedPatches())
    assert before == {path.name: path.read_bytes() for path in out.glob("*.parquet")}


def test_cells_that_do_not_fit_are_named(made):
    dataset = open_dataset(made(RedPatches()))
    column = dataset.patch_features["dino"]
    column._codes = column._codes - 1
    with pytest.raises(ValueError, match=r"row 0: grid\.dino has 16 cells, not 3 x 3"):
        column[0]


def test_only_what_is_asked_for_is_opened(made):
    out = made(RedPatches())
    assert open_dataset(out, features=()).patch_features == {}
    assert list(open_dataset(out, features=("dino",)).patch_features) == ["dino"]
    with pytest.raises(ValueError, match="has no feature 'clip', it has dino"):
        open_dataset(out, features=("clip",))


# ---- batches -------------------------------------------------------------------------------------

Info = namedtuple("Info", "dim mean unit_mean centred_unit_mean")


def lumina():
    config = ModelConfig(
        layers=1, hidden_size=16, heads=2, mlp_size=16, max_length=64, layout="lumina"
    )
    return load_for_training(
        None, config, codebook_KC=torch.zeros(8, 2), captions=["a", "b"], seed=0
    )


def two_grids(cells):
    """Images of 2 x 2, 2 x 4, 4 x 2, ... codes; a grid and a global feature of each."""
    sides = [(2, 2), (2, 4), (4, 2), (2, 2)]
    info = Info(3, [0.5, 0.0, 0.0], [1.0, 0, 0], [0, 1.0, 0])
    table = pa.table(
        {
            **{name: list("abcd") for name in ("id", "sample", "text")},
            "image_index": [0] * 4,
            "image_ids": pa.array([list(range(h * w)) for h, w in sides], pa.list_(pa.int32())),
            "grid_height": [h for h, _ in sides],
            "grid_width": [w for _, w in sides],
        }
    )
    manifest = SimpleNamespace(
        features={"clip": info},
        grids={"dino": info},
        text_features={},
        splits={"train": SimpleNamespace(shards=[])},
    )
    made = Dataset(Path("."), "train", manifest, table)
    made.features, made.patch_features = {"clip": np.ones((4, 3), np.float16)}, {"dino": cells}
    return made


def test_images_of_several_grids_share_a_batch():
    """Each image's terms are those that it has alone."""
    generator = torch.Generator().manual_seed(0)
    cells = [torch.randn(n, 3, generator=generator) for n in (4, 8, 8, 4)]
    loader = Loader(two_grids(cells), lumina(), batch_size=4, seed=0)
    assert {name: target.kind for name, target in loader.targets.items()} == {
        "clip": "global",
        "dino": "patch",
    }
    micro = next(loader.in_order(4))
    feature = micro.features["dino"]
    assert feature.values.shape == (4, 8, 3)
    for image, cell in enumerate(cells):
        assert torch.equal(feature.values[image, : len(cell)], cell)
    targets = [Target("dino", 3, kind="patch", centred=True), Target("clip", 3)]
    objective = Objective(16, targets)
    head = torch.nn.Linear(16, micro.batch.labels_BT.max().item() + 1)

    def terms(batch, features):
        state = torch.Generator().manual_seed(1)
        tap = torch.randn(64, 16, generator=state)[: batch.ids_BT.shape[1]]
        tap = tap.expand(*batch.ids_BT.shape, 16)
        return objective({1: tap}, tap, head, batch, features)

    together = terms(micro.batch, micro.features)
    assert together.counts["gva/dino"] == together.counts["gva/clip"] == 4
    singles = Loader(two_grids(cells), lumina(), batch_size=1, seed=0)
    alone = [terms(m.batch, m.features) for m in singles.in_order(4)]
    for name in ("gva/dino", "gva/clip"):
        total = torch.stack([each.sums[name] for each in alone]).sum()
        torch.testing.assert_close(together.sums[name], total)
    constant = torch.stack([e.metrics["gva_constant/dino"][0] for e in alone]).sum()
    torch.testing.assert_close(together.metrics["gva_constant/dino"][0], constant)


def test_retrieval_is_not_misled_by_what_fills_a_batch_up():
    """A projector that says each image's own cells finds every image, whatever its grid."""
    generator = torch.Generator().manual_seed(0)
    cells = [torch.randn(n, 3, generator=generator) for n in (4, 8, 8, 4)]
    loader = Loader(two_grids(cells), lumina(), batch_size=4, seed=0)
    micro = next(loader.in_order(4))
    feature = micro.features["dino"]
    objective = Objective(3, [Target("dino", 3, kind="patch", centred=True)])
    objective.projectors["dino@1"] = torch.nn.Identity()
    positions = micro.batch.positions["hybnext"]
    tap = torch.zeros(micro.batch.ids_BT.numel(), 3)
    tap[positions.flat_N] = feature.values[positions.image_N, positions.cell_N] - feature.mean
    tap = tap.view(*micro.batch.ids_BT.shape, 3)
    for far in (0.0, 100.0):
        values = feature.values.clone()
        values[0, 4:] = values[3, 4:] = far  # behind their last cells: never read
        given = {"dino": Feature(values, feature.mean, feature.constant)}
        head = torch.nn.Linear(3, micro.batch.labels_BT.max().item() + 1)
        terms = objective({1: tap}, tap, head, micro.batch, given)
        assert int(terms.metrics["retrieval/dino"][0]) == 4
        assert float(terms.sums["gva/dino"]) < 1e-5


def test_memory_of_a_split_does_not_grow_with_its_grids(made, monkeypatch):
    out: Path = made(RedPatches(), shard_rows=4)
    column = open_dataset(out).patch_features["dino"]
    assert not column._groups
    column[3]
    assert len(column._groups) == 1
