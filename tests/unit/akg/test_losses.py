"""The force G = dL/dz of every loss, against its closed form."""

import pytest
import torch

from trl_dynamics.akg import losses

ROW = torch.tensor([0, 0, 1, 2, 2, 2, 3])
LABEL = torch.tensor([3, 1, 0, 2, 4, 0, 1])


def drawn() -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(7, 5, generator=rng, dtype=torch.float64, requires_grad=True)


def force_of(loss, batch=None) -> tuple[torch.Tensor, torch.Tensor]:
    """G, and the residual pi - e_y that it is a multiple of."""
    logits = drawn()
    (force,) = torch.autograd.grad(loss(logits, LABEL, ROW, batch), logits)
    return force, logits.detach().softmax(dim=-1) - torch.eye(5, dtype=torch.float64)[LABEL]


@pytest.mark.parametrize(
    ("loss", "weight"),
    [(losses.mean_cross_entropy, 1 / 7), (losses.sum_cross_entropy, 1.0), (losses.gradient_ascent, -1 / 7)],
)
def test_cross_entropies_pull_by_the_residual(loss, weight):
    force, residual = force_of(loss)
    torch.testing.assert_close(force, weight * residual)


def test_dpo_pulls_both_sides_by_beta_times_one_minus_a():
    ref = torch.tensor([-2.0, -1.0, -4.0, -1.5], dtype=torch.float64)
    force, residual = force_of(losses.dpo(beta=0.3), {"ref_logps": ref})
    logp = drawn().detach().log_softmax(dim=-1)
    answer = [sum(float(logp[i, LABEL[i]]) for i in range(7) if ROW[i] == row) for row in range(4)]
    ratio = [answer[row] - float(ref[row]) for row in range(4)]
    for position, row in enumerate(ROW.tolist()):
        pair = row % 2
        a = torch.sigmoid(torch.tensor(0.3 * (ratio[pair] - ratio[pair + 2]), dtype=torch.float64))
        sign = 1 if row < 2 else -1
        torch.testing.assert_close(force[position], sign * 0.3 * (1 - a) / 2 * residual[position])


@pytest.mark.parametrize(
    ("normalizer", "weights"),
    [
        ("dapo", [1 / 7] * 7),
        ("bnpo", [1 / 7] * 7),
        ("grpo", [1 / 8, 1 / 8, 1 / 4, 1 / 12, 1 / 12, 1 / 12, 1 / 4]),
        ("dr_grpo", [1 / 40] * 7),
    ],
)
def test_policy_gradients_pull_by_the_advantage(normalizer, weights):
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    loss = losses.policy_gradient(normalizer, max_length=10)
    force, residual = force_of(loss, {"advantages": advantages})
    expected = torch.tensor(weights, dtype=torch.float64)[:, None] * advantages[ROW][:, None] * residual
    torch.testing.assert_close(force, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("mean",), "normalizer is 'mean', expected one of"), (("dr_grpo",), "give max_length")],
)
def test_bad_normalizers_are_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        losses.policy_gradient(*arguments)


def test_dpo_needs_as_many_rejected_rows_as_chosen_ones():
    logits = drawn()
    with pytest.raises(ValueError, match="batch has 3 rows"):
        losses.dpo()(logits[:6], LABEL[:6], ROW[:6], {"ref_logps": torch.zeros(3)})
