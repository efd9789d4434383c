"""The squeezing effect in closed form: against autograd, and the claims of arXiv 2407.10490 about it as properties."""

import pytest
import torch

from trl_dynamics.ops import squeeze

SHARPNESS = [0.05, 0.5, 1.0, 2.0, 4.0]


def random_rows(sharpness: float, num_rows: int = 200, vocab: int = 50, seed: int = 0):
    """Logits N(0, sharpness^2) and a label for each row."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV = sharpness * torch.randn(num_rows, vocab, generator=generator, dtype=torch.float64)
    return logits_NV, torch.randint(vocab, (num_rows,), generator=generator)


def probabilities(logits_NV, label_N, strength) -> tuple[torch.Tensor, torch.Tensor]:
    return logits_NV.softmax(-1), squeeze.step(logits_NV, label_N, strength).softmax(-1)


def others_of(values_NV: torch.Tensor, *names_N: torch.Tensor) -> list[torch.Tensor]:
    """Per row, the values of all labels that are not named."""
    kept = []
    for row, values_V in enumerate(values_NV):
        named = {int(names[row]) for names in names_N}
        kept.append(values_V[[v for v in range(len(values_V)) if v not in named]])
    return kept


@pytest.mark.parametrize("strength", [0.5, -0.5])
def test_a_step_on_the_inputs_of_a_softmax_regression_is_gradient_descent(strength):
    """z = W x, one SGD step on -+ln p(y): the logits of x move by eta ||x||^2 (e_y - p)."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    x, label = torch.randn(5, generator=generator, dtype=torch.float64), 3
    sign, rate = (1 if strength > 0 else -1), abs(strength) / float(x @ x)
    (sign * -(weight @ x).log_softmax(0)[label]).backward()
    moved = (weight - rate * weight.grad) @ x
    given = squeeze.step((weight @ x)[None].detach(), torch.tensor([label]), strength)
    torch.testing.assert_close(given[0], moved.detach(), rtol=0, atol=1e-12)


def test_steps_on_two_labels_of_a_row_add_up():
    logits_NV, label_N = random_rows(1.0)
    other_N, weights = (label_N + 1) % 50, (0.3, -0.8)
    logits_NV.requires_grad_()
    logp_NV = logits_NV.log_softmax(-1)
    picked = [logp_NV.gather(1, ids[:, None]).sum() for ids in (label_N, other_N)]
    (gradient,) = torch.autograd.grad(weights[0] * picked[0] + weights[1] * picked[1], logits_NV)
    both = squeeze.step(logits_NV, label_N, weights[0]) + squeeze.step(logits_NV, other_N, weights[1]) - logits_NV
    torch.testing.assert_close(both - logits_NV, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_growth_and_drained_mass_are_those_of_the_probabilities(sharpness):
    logits_NV, label_N = random_rows(sharpness)
    strength_N = torch.linspace(-3, 3, len(label_N), dtype=torch.float64)
    before_NV, after_NV = probabilities(logits_NV, label_N, strength_N)
    growth_NV = squeeze.growth(logits_NV, label_N, strength_N)
    torch.testing.assert_close(growth_NV * before_NV, after_NV, rtol=1e-10, atol=0)
    rival_N = squeeze.rival(logits_NV, label_N)
    drained = squeeze.drained_mass(logits_NV, label_N, strength_N)
    for row, (kept_before, kept_after) in enumerate(
        zip(others_of(before_NV, label_N, rival_N), others_of(after_NV, label_N, rival_N), strict=True)
    ):
        assert rival_N[row] != label_N[row] and before_NV[row, rival_N[row]] >= kept_before.max()
        assert drained[row].item() == pytest.approx((kept_before.sum() - kept_after.sum()).item(), abs=1e-14)


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_claims_1_and_2_a_negative_step_lowers_the_label_and_raises_its_rival(sharpness):
    logits_NV, label_N = random_rows(sharpness, num_rows=2000)
    growth_NV = squeeze.growth(logits_NV, label_N, -0.5)
    assert (growth_NV.gather(1, label_N[:, None]) < 1).all()
    assert (growth_NV.gather(1, squeeze.rival(logits_NV, label_N)[:, None]) > 1).all()


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_claim_3_the_rich_get_richer(sharpness):
    logits_NV, label_N = random_rows(sharpness)
    growth_NV = squeeze.growth(logits_NV, label_N, -0.5)
    for rates, logits in zip(others_of(growth_NV, label_N), others_of(logits_NV, label_N), strict=True):
        ranked = rates[logits.argsort()]
        assert (ranked.diff() >= -1e-12).all()


def test_claim_3_where_the_distribution_is_flat_most_rise_and_where_it_is_peaked_only_the_rival():
    """Shares of others that fall: none where all are alike, nearly all where a few lead."""
    falling = []
    for sharpness in SHARPNESS:
        logits_NV, label_N = random_rows(sharpness, num_rows=2000)
        rates = torch.stack(others_of(squeeze.growth(logits_NV, label_N, -0.5), label_N))
        falling.append((rates < 1).double().mean().item())
    assert falling == pytest.approx([0.0, 0.22, 0.75, 0.93, 0.96], abs=0.02)


@pytest.mark.parametrize("sharpness", SHARPNESS)
@pytest.mark.parametrize("strength", [-0.05, -0.5, -5.0])
def test_claim_4_the_less_likely_the_label_the_more_third_parties_pay(sharpness, strength):
    """All other logits fixed, the label's own swept from eight nats below the runner-up up to it."""
    others_NV, _ = random_rows(sharpness, num_rows=50)
    runner_up = others_NV.topk(2, dim=-1).values[:, 1]
    label_N = torch.zeros(len(others_NV), dtype=torch.int64)
    sweep = torch.linspace(-8, 0, 40, dtype=torch.float64)
    drained = torch.stack(
        [
            squeeze.drained_mass(torch.cat([(runner_up + below)[:, None], others_NV], dim=1), label_N, strength)
            for below in sweep
        ]
    )
    assert (drained.diff(dim=0) <= 1e-12).all()
    assert (drained[0] > drained[-1]).all()


def test_claim_4_is_not_about_what_the_rival_gains():
    """The rival may gain more from a likelier label, which gives up more of its own mass."""
    others = torch.tensor([3.0, 2.5, 1.0, 0.5, 0.0], dtype=torch.float64)
    gains, drained = [], []
    for logit in (-5.0, 2.0):
        row, label = torch.cat([torch.tensor([logit], dtype=torch.float64), others])[None], torch.tensor([0])
        before, after = probabilities(row, label, -0.5)
        gains.append((after - before)[0, 1].item())
        drained.append(squeeze.drained_mass(row, label, -0.5).item())
    assert gains[0] < gains[1] and drained[0] > drained[1]


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_claim_5_a_larger_step_lowers_the_label_and_raises_the_rival_more(sharpness):
    logits_NV, label_N = random_rows(sharpness)
    rival_N = squeeze.rival(logits_NV, label_N)
    after = [squeeze.step(logits_NV, label_N, -s).softmax(-1) for s in torch.linspace(0, 8, 60).tolist()]
    label_path = torch.stack([probs.gather(1, label_N[:, None])[:, 0] for probs in after])
    rival_path = torch.stack([probs.gather(1, rival_N[:, None])[:, 0] for probs in after])
    assert (label_path.diff(dim=0) <= 1e-15).all() and (rival_path.diff(dim=0) >= -1e-15).all()


def test_claim_5_does_not_hold_for_drained_mass():
    """A label that leads: what it gives up first lifts everybody, and only later the rival takes it all."""
    row, label = torch.tensor([[2.0, 1.4, 0.3, 0.0, 0.0, -0.3]], dtype=torch.float64), torch.tensor([0])
    small, middle, large = (squeeze.drained_mass(row, label, -s).item() for s in (0.2, 1.0, 8.0))
    assert middle < small < 0 < large


def test_unlearning_the_least_likely_label_pays_one_label_of_a_peaked_row_and_all_of_a_flat_one():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(50, generator=generator, dtype=torch.float64)
    peaked = logits.clone()
    peaked[7] += 6.0
    valley = torch.tensor([int(peaked.argmin())])
    before, after = probabilities(peaked[None], valley, -5.0)
    rising = (after > before)[0].nonzero()[:, 0].tolist()
    assert rising == [7]
    flat = 0.02 * logits
    before, after = probabilities(flat[None], valley, -3.0)
    assert (after > before).sum() == 49
