"""Two preparations of one source: what counts as the same, and what is told of the rest."""

import json

import numpy as np
import pytest
from red_models import RedEncoder, RedTokenizer, config, make_source

from arra.cli import main
from arra.data import job as module
from arra.data.compare import compare_datasets, float16_steps
from arra.data.prepare import prepare


class Noisy(RedEncoder):
    """Sums in another order, as other hardware does."""

    def pool(self, pixels_NCHW):
        return super().pool(pixels_NCHW) * (1 + self.noise)


class OtherCodes(RedTokenizer):
    """One code of each image falls on the other side of a boundary."""

    def encode(self, pixels_NCHW):
        codes_Nhw = super().encode(pixels_NCHW)
        codes_Nhw[:, 0, 0] += 1
        return codes_Nhw


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Prepares one source again and again."""
    source = make_source(tmp_path / "in", 24)

    def make(name, tokenizer=None, noise=0.0, **changes):
        encoder = Noisy()
        encoder.noise = noise
        monkeypatch.setattr(module, "load_encoder", lambda spec, device, grids, dtype: encoder)
        return prepare(config(source, tmp_path / name, **changes), tokenizer or RedTokenizer())

    return make


def test_the_same_command_gives_the_same_bytes(prepared):
    found = compare_datasets(prepared("a"), prepared("b"))
    assert found.agrees
    assert found.splits["train"].same_files
    assert found.told() == (
        "train: 22 rows, every byte equal\nval: 2 rows, every byte equal\nthe datasets agree"
    )
    json.dumps(found.to_json(), allow_nan=False)


def test_shards_of_another_length_hold_the_same_rows(prepared):
    found = compare_datasets(prepared("a"), prepared("b", shard_rows=7))
    assert found.agrees
    assert not found.splits["train"].same_files
    assert found.splits["train"].codes == 1
    assert found.splits["train"].features["red"].equal == 1


def test_other_hardware_is_measured(prepared):
    near = compare_datasets(prepared("a"), prepared("b", OtherCodes(), noise=4e-4))
    assert near.agrees
    assert near.splits["train"].codes == 3 / 4
    feature = near.splits["train"].features["red"]
    assert 0 < feature.steps <= 1
    assert feature.equal < 1
    assert "codes: 75.0000 % equal" in near.told()
    far = compare_datasets(prepared("c"), prepared("d", noise=4e-3))
    assert not far.agrees
    assert far.splits["train"].features["red"].steps > 1
    assert far.told().endswith("the datasets do NOT agree")


def test_other_settings_and_other_rows_are_named(prepared):
    other = RedTokenizer()
    other.fingerprint = "another"
    found = compare_datasets(prepared("a"), prepared("b", other, val_fraction=0.2))
    assert found.settings == ["the image tokenizer", "the source's content"]
    assert found.splits["train"].rows == (22, 20)
    assert found.splits["train"].first_difference is not None
    assert not found.agrees
    assert "22 and 20 rows, which differ from row" in found.told()
    found = compare_datasets(prepared("c"), prepared("d", val_fraction=0))
    assert found.splits["val"].rows == (2, 0)


def test_a_step_is_the_spacing_of_float16():
    one = np.array([[1.0, -2.0, 3.0, 0.0]], np.float16)
    other = np.nextafter(one, np.float16(9))
    assert float16_steps(one, one).max() == 0
    steps = float16_steps(one, other)[0]
    assert steps[0] == steps[2] == 1
    assert steps[1] == 0.5  # the spacing changes at a power of two
    assert steps[3] < 1e-3  # nothing beside the others


def test_the_doctor_compares(prepared, capsys):
    one, other, far = prepared("a"), prepared("b"), prepared("c", noise=4e-3)
    assert main(["doctor", str(one), "--against", str(other)]) == 0
    assert capsys.readouterr().out.endswith("the datasets agree\n")
    assert main(["doctor", str(one), "--against", str(far), "--json"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["agrees"] is False
    assert said.err == f"arra: {one} and {far} do not agree\n"
