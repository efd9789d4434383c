"""How far a label may be pushed down until third parties pay too much: kept rows against scans of all V labels."""

import pytest
import torch

from trl_dynamics.ops import squeeze, tiled_head
from trl_dynamics.ops.tiled_head import Head, squeeze_rows

SHARPNESS = [0.05, 1.0, 4.0]
PUSHES = [1e-3, 0.1, 1.0, 5.0]


def problem(sharpness: float, vocab: int = 50, num_rows: int = 100):
    """Logits N(0, sharpness^2); labels anywhere, but of the first ten rows the likeliest and of ten more the least."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = sharpness * torch.randn(num_rows, vocab, generator=generator, dtype=torch.float64)
    label_N = torch.randint(vocab, (num_rows,), generator=generator)
    label_N[:10], label_N[10:20] = logits_NV[:10].argmax(-1), logits_NV[10:20].argmin(-1)
    return logits_NV, label_N


def share_by_scan(logits_NV, label_N, push_N, budget: float, num_points: int) -> torch.Tensor:
    """The largest of `num_points` + 1 shares in [0, 1] that keeps the budget, by looking at all of them."""
    best_N = torch.zeros_like(push_N)
    for share in torch.linspace(0, 1, num_points + 1, dtype=torch.float64).tolist():
        fits_N = squeeze.drained_mass(logits_NV, label_N, -share * push_N) <= budget
        best_N = torch.where(fits_N, share, best_N)
    return best_N


@pytest.mark.parametrize("vocab", [3, 50, 32_000])
@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_kept_rows_know_the_drained_mass_of_any_push(vocab, sharpness):
    logits_NV, label_N = problem(sharpness, vocab)
    rows = squeeze.keep_rows(logits_NV.clone(), label_N)
    in_float32 = squeeze.keep_rows(logits_NV.float(), label_N)
    for push in PUSHES:
        push_N = torch.full((len(label_N),), push, dtype=torch.float64)
        exact_N = squeeze.drained_mass(logits_NV, label_N, -push_N)
        excess_N = squeeze.drained_by_push(rows, push_N) - exact_N
        assert (excess_N >= -1e-13).all()
        assert (excess_N <= squeeze.push_error(rows, push_N) + 1e-13).all()
        assert squeeze.push_error(rows, push_N).max() < 1e-7
        single_N = squeeze.drained_by_push(in_float32, push_N.float())
        assert single_N.dtype == torch.float32
        torch.testing.assert_close(single_N.double(), exact_N, rtol=1e-4, atol=1e-6 * min(push, 1.0))


def test_the_bound_holds_where_too_little_is_kept():
    """Three labels and two power sums are not enough for a large push; the excess shows and the bound covers it."""
    logits_NV, label_N = problem(0.05)
    rows = squeeze.keep_rows(logits_NV.clone(), label_N, num_top=2, num_powers=2)
    push_N = torch.full((len(label_N),), 20.0, dtype=torch.float64)
    excess_N = squeeze.drained_by_push(rows, push_N) - squeeze.drained_mass(logits_NV, label_N, -push_N)
    assert (excess_N > 1e-4).all() and (excess_N <= squeeze.push_error(rows, push_N)).all()


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_drained_mass_falls_before_it_rises_or_only_rises(sharpness):
    """So that the pushes within a budget are an interval that begins at 0."""
    logits_NV, label_N = problem(sharpness, num_rows=300)
    path = torch.stack([squeeze.drained_mass(logits_NV, label_N, -s) for s in torch.linspace(0, 8, 400).tolist()])
    change = path.diff(dim=0)
    rose = (change > 1e-14).cummax(dim=0).values
    assert (change[rose] > -1e-14).all()
    kinds = {(bool(first), bool(last)) for first, last in zip(change[0] > 0, change[-1] > 0, strict=True)}
    assert (False, True) in kinds and (True, False) not in kinds


@pytest.mark.parametrize(("vocab", "num_rows", "num_points"), [(50, 100, 2000), (32_000, 20, 200)])
@pytest.mark.parametrize("sharpness", [1.0, 4.0])
def test_the_share_is_the_largest_of_a_scan(sharpness, vocab, num_rows, num_points):
    logits_NV, label_N = problem(sharpness, vocab, num_rows)
    push_N = torch.linspace(0.01, 6, num_rows, dtype=torch.float64)
    rows = squeeze.keep_rows(logits_NV.clone(), label_N)
    drained_N = squeeze.drained_mass(logits_NV, label_N, -push_N)
    budget = drained_N[drained_N > 0].median().item() / 2
    share_N = squeeze.largest_share(rows, push_N, budget)
    scanned_N = share_by_scan(logits_NV, label_N, push_N, budget, num_points)
    assert 0.1 < (share_N < 1).double().mean() < 0.9
    assert ((share_N - scanned_N).abs() <= 1.001 / num_points).all()
    assert (squeeze.drained_mass(logits_NV, label_N, -share_N * push_N) <= budget * (1 + 1e-9)).all()
    held_N = share_N < 1
    beyond_N = squeeze.drained_mass(logits_NV, label_N, -(share_N + 1e-6) * push_N)
    assert (beyond_N[held_N] > budget).all()


def test_the_budget_is_kept_where_too_little_is_kept_of_the_rows():
    logits_NV, label_N = problem(1.0)
    rows = squeeze.keep_rows(logits_NV.clone(), label_N, num_top=2, num_powers=2)
    for push in (20.0, 200.0, 1e30):
        push_N = torch.full((len(label_N),), push, dtype=torch.float64)
        share_N = squeeze.largest_share(rows, push_N, 0.01)
        assert (share_N < 1).any() and (share_N > 0).all()
        assert (squeeze.drained_mass(logits_NV, label_N, -share_N * push_N) <= 0.01).all()


def test_no_push_and_no_limit_leave_every_share_at_one():
    logits_NV, label_N = problem(4.0)
    rows = squeeze.keep_rows(logits_NV.float(), label_N)
    some_N, none_N = torch.full((100,), 3.0), torch.zeros(100)
    assert (squeeze.largest_share(rows, some_N, 1.0) == 1).all()
    assert (squeeze.largest_share(rows, none_N, 0.0) == 1).all()
    # Of a flat row everybody gains.
    flat_NV, label_N = problem(0.05)
    assert (squeeze.largest_share(squeeze.keep_rows(flat_NV, label_N), some_N, 0.0) == 1).all()
    # Without a budget a label in the valley is not pushed at all, and one that leads as long as others gain by it.
    share_N = squeeze.largest_share(rows, some_N, 0.0)
    assert (share_N[10:20] < 1e-6).all() and (share_N[:10] > 0.05).all()


def test_impossible_labels_are_no_third_parties():
    logits_NV, label_N = problem(1.0, vocab=20)
    label_N %= 18
    padded_NV = torch.cat([logits_NV[:, :18], torch.full((100, 6), -torch.inf, dtype=torch.float64)], dim=1)
    push_N = torch.full((100,), 2.0, dtype=torch.float64)
    given = [squeeze.drained_by_push(squeeze.keep_rows(z, label_N), push_N) for z in (padded_NV, logits_NV[:, :18])]
    torch.testing.assert_close(*given, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rows_per_tile", [1, 3, 100])
def test_the_tile_of_the_head_does_not_matter(rows_per_tile, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden_ND, weight_VD = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (7, 23))
    label_N, head = torch.randint(23, (7,), generator=generator), Head(weight_VD, factor=0.5)
    whole = squeeze.keep_rows(head.logits(hidden_ND), label_N)
    monkeypatch.setattr(tiled_head, "TILE_ELEMENTS", rows_per_tile * 23)
    tiled = squeeze_rows(hidden_ND, head, label_N)
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(tiled, name), value, rtol=1e-12, atol=1e-15)
    assert torch.equal(tiled[label_N > 5].rival_id_N, tiled.rival_id_N[label_N > 5])
    empty = squeeze_rows(hidden_ND[:0], head, label_N[:0])
    assert squeeze.largest_share(empty, torch.zeros(0, dtype=torch.float64), 0.1).shape == (0,)


def test_the_fitted_response_of_softmax_regression_is_the_squared_norm_of_the_input():
    """One SGD step on -sum_n c_n ln p(y_n), inputs orthogonal and equally long: every row moves by itself alone."""
    generator = torch.Generator().manual_seed(0)
    inputs_ND = 3 * torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64)).Q[:12]
    weight_VD = torch.randn(50, 20, generator=generator, dtype=torch.float64, requires_grad=True)
    label_N, coefficient_N = (
        torch.randint(50, (12,), generator=generator),
        torch.rand(12, generator=generator).double(),
    )
    before_NV = inputs_ND @ weight_VD.T
    logp_N = before_NV.log_softmax(-1).gather(1, label_N[:, None])[:, 0]
    (gradient_VD,) = torch.autograd.grad((coefficient_N * logp_N).sum(), weight_VD)
    after_NV = (inputs_ND @ (weight_VD - 0.2 * gradient_VD).T).log_softmax(-1).detach()
    rows = squeeze.keep_rows(before_NV.detach(), label_N)
    after = [after_NV.gather(1, ids_N[:, None])[:, 0] for ids_N in (label_N, rows.rival_id_N)]
    product, square, change = squeeze.response_sums(rows, *after, 0.2 * coefficient_N).tolist()
    assert product / square == pytest.approx(9, rel=1e-12)
    assert product**2 / (square * change) == pytest.approx(1, rel=1e-12)
