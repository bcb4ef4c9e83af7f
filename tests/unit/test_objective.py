"""The method against the paper's formula written naively, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arra.batch import Batch
from arra.layout import Image, Layout, Text
from arra.objective import Feature, Objective, Projector, Target, chunked_cross_entropy

D, E_DIM, V = 12, 6, 40
LAYOUT = Layout("chameleon", tuple(range(20, 36)), pad=0, begin=1, end=2)


def make_batch(texts: tuple[int, ...] = (2, 5), pad_to: int | None = None) -> Batch:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for length in texts:
        codes = torch.randint(0, 16, (6,), generator=generator).tolist()
        text = torch.randint(3, 20, (length,), generator=generator).tolist()
        samples.append(LAYOUT.sample([Text(tuple(text)), Image(tuple(codes), 2, 3)]))
    return LAYOUT.collate(samples, pad_to=pad_to)


def hidden(batch: Batch, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (*batch.ids_BT.shape, D)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def feature(images: int, seed: int = 3) -> Feature:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(images, E_DIM, generator=generator, dtype=torch.float64)
    mean = torch.randn(E_DIM, generator=generator)
    return Feature(values, mean, torch.randn(E_DIM, generator=generator))


def head(bias: bool = True) -> nn.Linear:
    torch.manual_seed(4)
    return nn.Linear(D, V, bias=bias, dtype=torch.float64)


def naive_gva(
    batch: Batch, tap_BTD: Tensor, f_A: Projector, target_ED: Tensor, layout: Layout = LAYOUT
) -> Tensor:
    """Mean over an image's positions whose next token is a code, then over images."""
    per_image = []
    for row, ids in enumerate(batch.ids_BT.tolist()):
        aligned = [t for t in range(len(ids) - 1) if ids[t + 1] in layout.code_ids]
        cosines = [
            F.cosine_similarity(f_A(tap_BTD[row, t]), target_ED[row], dim=0) for t in aligned
        ]
        per_image.append(torch.stack([1 - c for c in cosines]).mean())
    return torch.stack(per_image).mean()


def test_the_whole_loss_equals_the_papers_formula() -> None:
    batch, values = make_batch(), feature(2)
    objective = Objective(D, [Target("clip", E_DIM, layers=(3,), weight=0.7)], chunk=5).double()
    tap, last, table = hidden(batch, 1), hidden(batch, 2), head()
    terms = objective({3: tap}, last, table, batch, {"clip": values})
    logits = table(last)
    expected_ar = F.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten())
    expected_gva = naive_gva(batch, tap, objective.projectors["clip@3"], values.values)
    torch.testing.assert_close(terms.total(), expected_ar + 0.7 * expected_gva, rtol=1e-12, atol=0)
    expected = torch.autograd.grad(expected_ar + 0.7 * expected_gva, [tap, last, table.weight])
    found = torch.autograd.grad(terms.total(), [tap, last, table.weight])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_gradient_reaches_only_the_tap_and_the_projector() -> None:
    batch = make_batch()
    objective = Objective(D, [Target("clip", E_DIM)]).double()
    tap, last, table = hidden(batch, 1), hidden(batch, 2), head()
    terms = objective({1: tap}, last, table, batch, {"clip": feature(2)})
    terms.sums["gva/clip"].backward()
    assert last.grad is None
    assert table.weight.grad is None
    mask = torch.zeros(batch.ids_BT.numel(), dtype=torch.bool)
    mask[batch.positions["hybnext"].flat_N] = True
    mask = mask.view(batch.ids_BT.shape)
    assert (tap.grad[mask].abs().sum(-1) > 0).all()
    assert (tap.grad[~mask] == 0).all()
    assert all(p.grad is not None for p in objective.parameters())


def test_padding_and_neighbours_change_nothing() -> None:
    objective = Objective(D, [Target("clip", E_DIM)]).double()
    table = head()
    alone, padded = make_batch((4,)), make_batch((4,), pad_to=30)
    tap, last = hidden(padded, 1), hidden(padded, 2)
    T = alone.ids_BT.shape[1]
    big = objective({1: tap}, last, table, padded, {"clip": feature(1)})
    small = objective({1: tap[:, :T]}, last[:, :T], table, alone, {"clip": feature(1)})
    for name in big.sums:
        torch.testing.assert_close(big.sums[name], small.sums[name], rtol=1e-12, atol=0)
    two = make_batch((4, 9))
    tap2, last2 = hidden(two, 8).detach(), hidden(two, 9).detach()
    tap2[0, :T], last2[0, :T] = tap[0, :T].detach(), last[0, :T].detach()
    both = feature(2)
    both.values[0] = feature(1).values[0]
    pair = objective({1: tap2}, last2, table, two, {"clip": both})
    second = objective(
        {1: tap2[1:]},
        last2[1:],
        table,
        _row(two, 1),
        {"clip": Feature(both.values[1:], both.mean, both.constant)},
    )
    for name in pair.sums:
        expected = small.sums[name] + second.sums[name]
        torch.testing.assert_close(pair.sums[name], expected, rtol=1e-12, atol=0)


def test_the_last_column_changes_nothing() -> None:
    batch, values = make_batch(), feature(2)
    objective = Objective(D, [Target("clip", E_DIM)]).double()
    tap, last, table = hidden(batch, 1), hidden(batch, 2), head()
    whole = objective({1: tap}, last, table, batch, {"clip": values})
    shorter = batch.without_last()
    assert shorter.ids_BT.shape[1] == batch.ids_BT.shape[1] - 1
    assert shorter.labels_N.tolist() == batch.labels_N.tolist()
    cut = objective({1: tap[:, :-1]}, last[:, :-1], table, shorter, {"clip": values})
    for name in whole.sums:
        torch.testing.assert_close(cut.sums[name], whole.sums[name], rtol=1e-12, atol=0)
    assert cut.counts == whole.counts


def _row(batch: Batch, row: int) -> Batch:
    ids = batch.ids_BT[row].tolist()
    n = int(batch.attention_BT[row].sum())
    first = ids.index(1)
    codes = tuple(i - 20 for i in ids[first + 1 : n - 1])
    sample = LAYOUT.sample([Text(tuple(ids[:first])), Image(codes, 2, 3)])
    return LAYOUT.collate([sample], pad_to=len(ids))


def test_terms_divide_by_global_counts_so_accumulation_changes_no_gradient() -> None:
    objective = Objective(D, [Target("clip", E_DIM)], z_loss=1e-3).double()
    table, whole = head(), make_batch((2, 7, 4, 3))
    values = feature(4)
    tap, last = hidden(whole, 1), hidden(whole, 2)
    parameters = [*objective.parameters(), table.weight]
    total = objective({1: tap}, last, table, whole, {"clip": values})
    for name in total.sums:
        expected = torch.autograd.grad(
            total.sums[name] / total.counts[name], parameters, retain_graph=True, allow_unused=True
        )
        parts = [_row(whole, row) for row in range(4)]
        counts = {n: sum(objective.counts(p)[n] for p in parts) for n in total.sums}
        found = [torch.zeros_like(p) for p in parameters]
        for row, part in enumerate(parts):
            one = Feature(values.values[row : row + 1], values.mean, values.constant)
            terms = objective(
                {1: tap[row : row + 1]}, last[row : row + 1], table, part, {"clip": one}
            )
            grads = torch.autograd.grad(
                terms.sums[name] / counts[name], parameters, retain_graph=True, allow_unused=True
            )
            found = [f if g is None else f + g for f, g in zip(found, grads, strict=True)]
        for f, e in zip(found, expected, strict=True):
            e = torch.zeros_like(f) if e is None else e
            torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-12)


def test_lambda_zero_skips_the_term_and_leaves_no_parameters() -> None:
    plain = Objective(D, [Target("clip", E_DIM, weight=0.0)])
    assert list(plain.parameters()) == []
    assert plain.layers == ()
    batch = make_batch()
    last, table = hidden(batch, 2), head()
    terms = plain.double()({}, last, table, batch, {})
    assert set(terms.sums) == {"ar"}
    later = Objective(D, [Target("clip", E_DIM)]).double()
    stopped = later({}, last, table, batch, {}, schedule=0.0)
    assert torch.equal(stopped.total(), terms.total())


def test_no_images_contribute_zero_but_run_the_projector() -> None:
    text = LAYOUT.collate([LAYOUT.sample([Text((3, 4, 5))], train_text=True)])
    objective = Objective(D, [Target("clip", E_DIM)]).double()
    empty = Feature(torch.zeros(0, E_DIM), torch.zeros(E_DIM), torch.ones(E_DIM))
    tap = hidden(text, 1)
    terms = objective({1: tap}, hidden(text, 2), head(), text, {"clip": empty})
    assert terms.counts["gva/clip"] == 0
    terms.total().backward()
    assert terms.sums["gva/clip"] == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in objective.parameters())


def test_centred_raw_constant_and_retrieval() -> None:
    batch = make_batch()
    values = feature(2)
    centred = Objective(D, [Target("clip", E_DIM, centred=True)]).double()
    tap, last, table = hidden(batch, 1), hidden(batch, 2), head()
    terms = centred({1: tap}, last, table, batch, {"clip": values})
    shifted = values.values - values.mean
    expected = naive_gva(batch, tap, centred.projectors["clip@1"], shifted)
    torch.testing.assert_close(terms.sums["gva/clip"] / 2, expected, rtol=1e-12, atol=0)
    unit = F.normalize(shifted, dim=-1)
    constant = 1 - (unit @ F.normalize(values.constant.double(), dim=0)).mean()
    total, count = terms.metrics["gva_constant/clip"]
    torch.testing.assert_close(total / count, constant, rtol=1e-5, atol=0)
    # A projector that answers with the image's own feature finds it; a constant one does not.
    with torch.no_grad():
        f_A = centred.projectors["clip@1"]
        f_A.down.weight.zero_()
        f_A.down.bias.copy_(shifted[1])
    terms = centred({1: tap}, last, table, batch, {"clip": values})
    assert terms.metrics["retrieval/clip"][0] == 1


def test_autocast_rounds_no_metric() -> None:
    """Features near a constant leave 1 - cos little more than bfloat16's rounding."""
    batch = make_batch()
    values = torch.randn(2, E_DIM, generator=torch.Generator().manual_seed(0)) / 10 + 1
    constant = F.normalize(values, dim=-1).mean(0)
    objective, table = Objective(D, [Target("clip", E_DIM)]), nn.Linear(D, V)
    tap = hidden(batch, 1).float()
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values_of = {"clip": Feature(values, torch.zeros(E_DIM), constant)}
            terms = objective({1: tap}, tap, table, batch, values_of)
        found.append(terms.metrics["gva_constant/clip"][0])
    assert torch.equal(*found)


def test_patch_targets_compare_each_cell_with_its_own_vector() -> None:
    batch = make_batch((2,))
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(1, 6, E_DIM, generator=generator, dtype=torch.float64)
    patch = Feature(values, torch.zeros(E_DIM), torch.ones(E_DIM))
    objective = Objective(D, [Target("dino", E_DIM, kind="patch")]).double()
    tap = hidden(batch, 1)
    terms = objective({1: tap}, hidden(batch, 2), head(), batch, {"dino": patch})
    positions = batch.positions["hybnext"].flat_N
    projected = objective.projectors["dino@1"](tap.flatten(0, 1)[positions])
    expected = (1 - F.cosine_similarity(projected, values[0], dim=-1)).mean()
    torch.testing.assert_close(terms.sums["gva/dino"], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("with_z", [False, True])
@pytest.mark.parametrize("restricted", [False, True])
def test_chunked_cross_entropy_equals_the_stock_one(with_z: bool, restricted: bool) -> None:
    torch.manual_seed(0)
    table = head()
    hidden_ND = torch.randn(23, D, dtype=torch.float64, requires_grad=True)
    vocabulary = torch.tensor(LAYOUT.image_vocabulary()) if restricted else None
    labels = torch.randint(20, 36, (23,))
    ce, z = chunked_cross_entropy(
        hidden_ND, labels, table, vocabulary_V=vocabulary, with_z=with_z, chunk=7
    )
    logits = table(hidden_ND)
    if restricted:
        logits = logits[:, vocabulary]
        wanted = torch.searchsorted(vocabulary, labels)
    else:
        wanted = labels
    naive_ce = F.cross_entropy(logits, wanted, reduction="sum")
    naive_z = logits.logsumexp(-1).square().sum() if with_z else torch.zeros((), dtype=ce.dtype)
    torch.testing.assert_close(ce, naive_ce, rtol=1e-12, atol=0)
    torch.testing.assert_close(z.double(), naive_z, rtol=1e-12, atol=0)
    found = torch.autograd.grad(ce * 0.3 + z * 0.1, [hidden_ND, *table.parameters()])
    naive = naive_ce * 0.3 + naive_z * 0.1
    expected = torch.autograd.grad(naive, [hidden_ND, *table.parameters()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    with torch.no_grad():
        quiet, _ = chunked_cross_entropy(hidden_ND, labels, table, vocabulary_V=vocabulary)
    torch.testing.assert_close(quiet, naive_ce, rtol=1e-12, atol=0)


def test_z_loss_is_independent_of_the_alignment() -> None:
    """The released code computes the alignment inside `if z_loss_weight > 0`."""
    batch, tap, last, table = make_batch(), None, None, head()
    tap, last = hidden(batch, 1), hidden(batch, 2)
    gva = [
        Objective(D, [Target("clip", E_DIM)], z_loss=z).double()(
            {1: tap}, last, table, batch, {"clip": feature(2)}
        )
        for z in (0.0, 1e-5)
    ]
    assert torch.equal(gva[0].sums["gva/clip"], gva[1].sums["gva/clip"])
    assert set(gva[1].sums) - set(gva[0].sums) == {"z"}


def test_two_targets_at_two_layers() -> None:
    batch, values = make_batch(), feature(2)
    objective = Objective(
        D, [Target("a", E_DIM, layers=(1, 2)), Target("b", E_DIM, layers=(2,), weight=0.5)]
    ).double()
    taps = {1: hidden(batch, 1), 2: hidden(batch, 5)}
    terms = objective(taps, hidden(batch, 2), head(), batch, {"a": values, "b": values})
    f = objective.projectors
    mean = (
        naive_gva(batch, taps[1], f["a@1"], values.values)
        + naive_gva(batch, taps[2], f["a@2"], values.values)
    ) / 2
    torch.testing.assert_close(terms.sums["gva/a"] / 2, mean, rtol=1e-12, atol=0)
    assert terms.weights == {"ar": 1.0, "gva/a": 1.0, "gva/b": 0.5}


@pytest.mark.parametrize(
    "bad",
    [{"layers": (0,)}, {"layers": ()}, {"weight": -1.0}, {"kind": "patch", "positions": "all"}],
)
def test_impossible_targets_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="target 'clip'"):
        Target("clip", E_DIM, **bad)
