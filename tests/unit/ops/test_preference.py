"""Pair losses and gates against numbers worked out by hand, and their limits."""

import math

import pytest
import torch

from trl_dynamics.ops import preference

CHOSEN, REJECTED = (torch.tensor(values, dtype=torch.float64) for values in ([1.5, -2.0, 0.0], [-0.5, -3.0, 4.0]))
BETA = 0.2


def minus_log_sigmoid(value: float) -> float:
    return math.log(1 + math.exp(-value))


def test_dpop_lowers_the_margin_only_where_the_chosen_answer_fell():
    got = preference.dpo(CHOSEN, REJECTED, BETA, preference.dpop_term(CHOSEN, REJECTED, 5.0))
    # Margins 2 and 1 and -4; the second answer lost 2 nats, which counts five times.
    assert got.tolist() == pytest.approx([minus_log_sigmoid(0.2 * m) for m in (2.0, 1.0 - 10.0, -4.0)])


def test_dpo_shift_scales_the_rejected_log_ratio():
    got = preference.dpo(CHOSEN, REJECTED, BETA, preference.dpo_shift_term(CHOSEN, REJECTED, 0.5))
    assert got.tolist() == pytest.approx([minus_log_sigmoid(0.2 * m) for m in (1.75, -0.5, -2.0)])


def test_cal_dpo_has_no_beta_in_its_sigmoid_and_targets_on_both_sides():
    got = preference.cal_dpo(CHOSEN, REJECTED, BETA, weight=0.5)
    squares = [(1.5 - 2.5) ** 2 + (-0.5 + 2.5) ** 2, (-4.5) ** 2 + (-0.5) ** 2, (-2.5) ** 2 + 6.5**2]
    expected = [minus_log_sigmoid(m) + 0.5 * s for m, s in zip((2.0, 1.0, -4.0), squares, strict=True)]
    assert got.tolist() == pytest.approx(expected)


def test_gradients_are_those_of_small_differences():
    losses = [
        lambda c, r: preference.dpo(
            c, r, BETA, preference.dpop_term(c, r, 5.0) + preference.dpo_shift_term(c, r, 0.7)
        ),
        lambda c, r: preference.cal_dpo(c, r, BETA, 0.5),
    ]
    inputs = tuple((values + 0.1).requires_grad_() for values in (CHOSEN, REJECTED))
    assert all(torch.autograd.gradcheck(loss, inputs) for loss in losses)


def test_a_linear_schedule_starts_ends_and_is_straight():
    assert [preference.linear(1.0, 0.5, progress) for progress in (0.0, 0.5, 1.0)] == [1.0, 0.75, 0.5]


def test_the_gate_opens_with_probability_and_has_no_gradient():
    prob = torch.tensor([0.0, 0.1, 0.2, 1.0], requires_grad=True)
    opened = preference.gate(prob, alpha=30.0, tau=0.1)
    assert opened.tolist() == pytest.approx([1 / (1 + math.exp(3)), 0.5, 1 / (1 + math.exp(-3)), 1.0], abs=1e-6)
    assert not opened.requires_grad


PROBS = [[0.5, 0.1, 0.9, 0.3], [0.2, 0.8]]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("token", PROBS),
        ("sequence", [[(0.5 * 0.1 * 0.9 * 0.3) ** 0.25] * 4, [0.4] * 2]),
        # A tenth of the way through sorted values that lie at 0, 1/(n-1), ..., 1.
        ("q10", [[0.1 + 0.3 * 0.2] * 4, [0.2 + 0.1 * 0.6] * 2]),
    ],
)
@pytest.mark.parametrize(("padding", "dtype"), [(0, torch.float64), (3, torch.float64), (3, torch.bfloat16)])
def test_gated_probabilities_do_not_see_padding_or_prompts(kind, expected, padding, dtype):
    """In half precision too, which FSDP2 rounds the log-probabilities to."""
    width = 1 + 4 + padding
    logp_BT, mask_BT = torch.zeros(3, width, dtype=dtype), torch.zeros(3, width, dtype=torch.bool)
    for row, probs in enumerate(PROBS):
        logp_BT[row, 1 : 1 + len(probs)] = torch.tensor(probs, dtype=torch.float64).log()
        mask_BT[row, 1 : 1 + len(probs)] = True
    got_BT = preference.GATED_PROB[kind](logp_BT, mask_BT)
    assert got_BT.shape == logp_BT.shape and got_BT.isfinite().all()
    for row, values in enumerate(expected):
        assert got_BT[row, 1 : 1 + len(values)].tolist() == pytest.approx(
            values, rel=2e-2 if dtype == torch.bfloat16 else 1e-6
        )
