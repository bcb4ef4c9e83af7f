"""MS-SSIM against pytorch-msssim and torchmetrics' windows; which pictures are compared."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from formula import ints
from PIL import Image

from arra.evaluate.ms_ssim import (
    _terms,
    diversity_pairs,
    ms_ssim,
    ms_ssim_diversity,
    ms_ssim_paired,
    pair_up,
)

GOLDEN = json.loads(
    (Path(__file__).parents[2] / "golden/pairwise_metrics.json").read_text(encoding="utf-8")
)["ms_ssim"]
BLOCKS = ints("metrics.first", (3, 3, 12, 13), 256).double()
FIRST = torch.nn.functional.interpolate(BLOCKS, scale_factor=16, mode="nearest")
NOISE = ints("metrics.noise", (3, 3, 192, 208), 256).double()
SECOND = (0.75 * FIRST + 0.25 * NOISE).round()


def pictures(batch_NCHW):
    return [Image.fromarray(x.permute(1, 2, 0).byte().numpy()) for x in batch_NCHW]


def reader(images):
    return lambda indices: [images[index] for index in indices]


REAL, PAINTED = pictures(FIRST), pictures(SECOND)


def test_equals_pytorch_msssim():
    ours = [ms_ssim(*pair) for pair in zip(REAL, PAINTED, strict=True)]
    assert ours == pytest.approx(GOLDEN["values"], rel=2e-6)


def test_a_scale_equals_torchmetrics_where_windows_lie_within_the_picture():
    functional = pytest.importorskip("torchmetrics.functional.image")
    one, two = FIRST[:1] / 255, SECOND[:1] / 255
    _, full = functional.structural_similarity_index_measure(
        two, one, data_range=1.0, return_full_image=True
    )
    contrast, brightness = _terms(torch.cat([one, two]))
    torch.testing.assert_close(contrast * brightness, full[0, :, 5:-5, 5:-5], rtol=1e-9, atol=1e-12)


def test_properties():
    assert ms_ssim(REAL[0], REAL[0]) == pytest.approx(1, abs=1e-12)
    assert ms_ssim(REAL[0], PAINTED[0]) == ms_ssim(PAINTED[0], REAL[0])
    assert ms_ssim(REAL[0], REAL[1]) < 0.5 < ms_ssim(REAL[0], PAINTED[0])
    turned = [x.transpose(Image.Transpose.ROTATE_90) for x in (REAL[0], PAINTED[0])]
    assert ms_ssim(*turned) == pytest.approx(ms_ssim(REAL[0], PAINTED[0]), rel=1e-12)
    odd = [x.crop((0, 0, 171, 163)) for x in (REAL[0], PAINTED[0])]
    assert ms_ssim(*odd) == pytest.approx(ms_ssim(REAL[0], PAINTED[0]), abs=0.05)


def test_sizes_that_do_not_fit_are_refused_with_the_smallest_side():
    small = REAL[0].resize((160, 200))
    with pytest.raises(ValueError, match="at least 161 pixels; an image has 160x200"):
        ms_ssim(small, small)
    with pytest.raises(ValueError, match="208x192 and 192x192"):
        ms_ssim(REAL[0], REAL[1].resize((192, 192)))
    keys = np.arange(3, dtype=np.uint64)
    found = ms_ssim_diversity(keys, reader([small] * 3))
    assert found.value is None
    assert "at least 161 pixels" in found.reason
    paired, values = ms_ssim_paired(np.array([[0, 0]]), reader(REAL), reader([small]))
    assert paired.value is None
    assert "one size" in paired.reason
    assert np.isnan(values).all()


def test_diversity_is_the_mean_over_pairs_in_any_order():
    mixed = [*REAL[:2], PAINTED[0]]
    keys = np.array([2**63 + 5, 7, 2**40], dtype=np.uint64)
    found = ms_ssim_diversity(keys, reader(mixed))
    by_hand = [ms_ssim(mixed[a], mixed[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert found.value == pytest.approx(np.mean(by_hand), rel=1e-12)
    assert (found.n, found.details["pairs"]) == (3, "of the whole set")
    assert found.low <= found.value <= found.high
    other = ms_ssim_diversity(keys[[2, 0, 1]], reader([mixed[i] for i in (2, 0, 1)]))
    assert abs(other.value - found.value) < 1e-8
    assert (
        ms_ssim_diversity(keys[:1], reader(mixed)).reason
        == "a pair takes two images; the set has 1"
    )


def as_keys(pairs, keys):
    return {frozenset((int(keys[a]), int(keys[b]))) for a, b in pairs}


def test_pairs_depend_on_keys_and_not_on_order():
    keys = np.random.default_rng(0).integers(0, 2**64, 40, dtype=np.uint64)
    captions = [f"caption {index % 13}" for index in range(40)]
    order = np.random.default_rng(1).permutation(40)
    for texts, shuffled in ((None, None), (captions, [captions[i] for i in order])):
        pairs, within = diversity_pairs(keys, texts, 30, seed=4)
        again, _ = diversity_pairs(keys[order], shuffled, 30, seed=4)
        assert as_keys(pairs, keys) == as_keys(again, keys[order])
        other, _ = diversity_pairs(keys, texts, 30, seed=5)
        assert as_keys(pairs, keys) != as_keys(other, keys)
        assert within == (texts is not None)
        assert len(as_keys(pairs, keys)) == len(pairs) == (26 if within else 30)
        if within:
            assert all(captions[a] == captions[b] for a, b in pairs)
    every, _ = diversity_pairs(keys, None, 10_000, seed=0)
    assert len(as_keys(every, keys)) == 40 * 39 // 2
    few_prompts, _ = diversity_pairs(keys, captions, 5, seed=0)
    assert len({captions[a] for a, _ in few_prompts}) == 5
    assert not diversity_pairs(keys, [str(index) for index in range(40)], 5, seed=0)[1]


def test_collapsed_pictures_raise_diversity_and_swapped_ones_lower_the_paired():
    keys = np.arange(3, dtype=np.uint64)
    collapsed = ms_ssim_diversity(keys, reader([PAINTED[0], REAL[0], PAINTED[0]]))
    assert collapsed.value > 0.85 > 0.5 > ms_ssim_diversity(keys, reader(PAINTED)).value
    pairs = np.array([[0, 0], [1, 1], [2, 2]])
    right, values = ms_ssim_paired(pairs, reader(REAL), reader(PAINTED))
    assert right.value == pytest.approx(np.mean(GOLDEN["values"]), rel=1e-5)
    assert values == pytest.approx(GOLDEN["values"], rel=1e-5)
    swapped, _ = ms_ssim_paired(pairs, reader(REAL), reader(PAINTED[1:] + PAINTED[:1]))
    assert swapped.value < 0.5
    assert ms_ssim_paired(pairs[:0], reader(REAL), reader(PAINTED))[0].reason == "no pairs"


def test_pairs_by_name():
    real = ["train/b.jpg", "train/a.jpg", "train/c.jpg"]
    assert pair_up(real, None, ["a.png", "c.png"], None).tolist() == [[1, 0], [2, 1]]
    texts = ["x", "y", "z"]
    assert pair_up(real, texts, ["a.png", "c.png"], ["y", "z"]).tolist() == [[1, 0], [2, 1]]


def test_pairs_by_caption():
    real, captions = ["2", "1", "0"], ["heart", "lung", "heart"]
    # The numbers are names by chance: captions contradict them.
    pairs = pair_up(real, captions, ["0", "1", "2"], ["lung", "heart", "heart"])
    assert pairs.tolist() == [[1, 0], [2, 1], [0, 2]]
    more = pair_up(real, captions, ["d", "c", "b", "a"], ["heart"] * 4)
    assert more.tolist() == [[0, 0], [2, 1], [0, 2], [2, 3]]


def test_what_has_no_partner_is_named():
    with pytest.raises(ValueError, match=r"x\.png, y\.png have the name of no real image"):
        pair_up(["a"], None, ["x.png", "a.png", "y.png"], None)
    with pytest.raises(ValueError, match=r"p \('liver'\) has neither"):
        pair_up(["a"], ["heart"], ["p", "q"], ["liver", "heart"])
    with pytest.raises(ValueError, match="several real"):
        pair_up(["x/a.png", "y/a.png"], None, ["a"], None)
