"""The gauge's sums: against loops over tokens, and however a batch is cut into parts."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from trl_dynamics.trainers.squeeze.gauge import QUANTITIES, Gauge, risk_metrics, risk_sums
from trl_dynamics.trainers.squeeze.recording import TokenForward

VALLEY = 0.2


def batch(seed: int, lengths: list[int], width: int = 12) -> tuple[torch.Tensor, torch.Tensor, TokenForward]:
    """Gradients, weights and a forward of rows whose completions end where they like; outside there is rubbish."""
    generator = torch.Generator().manual_seed(seed)
    logits_BTV = 3 * torch.randn(len(lengths), width, 7, generator=generator)
    logp_BTV = logits_BTV.log_softmax(-1)
    gradient_BT, weight_BT = torch.randn(2, len(lengths), width, generator=generator)
    mask_BT = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        start = int(torch.randint(0, width - length + 1, (), generator=generator))
        mask_BT[row, start : start + length] = True
    sum_sq_BT = logp_BTV.mul(2).logsumexp(-1)
    # As TRL does it: zeros outside completions.
    forward = TokenForward(
        logp_BTV[..., 0].masked_fill(~mask_BT, 0), mask_BT, sum_sq_BT.masked_fill(~mask_BT, 0), len(lengths) // 2
    )
    return gradient_BT.masked_fill(~mask_BT, 0), weight_BT.sigmoid(), forward


def slowly(gradient_BT, weight_BT, forward) -> dict[str, float]:
    found, half = {}, forward.num_pairs
    for side, rows in (("chosen", range(half)), ("rejected", range(half, 2 * half))):
        tokens = {row: [t for t in range(forward.mask_BT.shape[1]) if forward.mask_BT[row, t]] for row in rows}
        energies = [
            half * sum(abs(gradient_BT[row, t].item()) for t in of) / len(of) for row, of in tokens.items() if of
        ]
        found[f"{side}/energy"] = sum(energies) / len(energies)
        pairs = [(row, t) for row, of in tokens.items() for t in of]
        probs = [math.exp(forward.logp_BT[row, t].item()) for row, t in pairs]
        sum_sq = [math.exp(forward.log_sum_sq_BT[row, t].item()) for row, t in pairs]
        squares = [1 - 2 * p + s for p, s in zip(probs, sum_sq, strict=True)]
        found[f"{side}/residual_norm"] = math.sqrt(sum(squares) / len(squares))
    found["rejected/geometric_prob"] = math.prod(probs) ** (1 / len(probs))
    found["rejected/valley_share"] = sum(p < VALLEY for p in probs) / len(probs)
    sizes = [abs(gradient_BT[row, t].item()) for row, t in pairs]
    left = [size * weight_BT[row, t].item() for size, (row, t) in zip(sizes, pairs, strict=True)]
    found["rejected/kept"] = sum(left) / sum(sizes)
    return {f"squeeze_risk/{name}": value for name, value in found.items()}


def test_the_sums_are_those_of_loops_over_tokens():
    # One answer was cut off altogether.
    given = batch(0, [3, 12, 5, 1, 0, 9])
    got = risk_metrics(risk_sums(*given, VALLEY))
    assert got == pytest.approx(slowly(*given), rel=1e-6) and len(got) == len(QUANTITIES)
    assert 0 < got["squeeze_risk/rejected/valley_share"] < 1


def test_uneven_parts_add_up_to_the_whole():
    """Processes and micro-batches: of P pairs each, whose mean losses have gradients 1 / P of a token's own."""
    gradient_BT, weight_BT, forward = batch(1, [2, 7, 1, 12, 3, 8])

    def part(pairs: list[int]) -> torch.Tensor:
        rows = [*pairs, *(pair + 3 for pair in pairs)]
        own = TokenForward(forward.logp_BT[rows], forward.mask_BT[rows], forward.log_sum_sq_BT[rows], len(pairs))
        return risk_sums(gradient_BT[rows] * 3 / len(pairs), weight_BT[rows], own, VALLEY)

    parts, whole = part([1]) + part([0, 2]), risk_sums(gradient_BT, weight_BT, forward, VALLEY)
    assert risk_metrics(parts) == pytest.approx(risk_metrics(whole), rel=1e-6)
    mean_of_means = (part([1])[2] / part([1])[2, 1] + part([0, 2])[2] / part([0, 2])[2, 1]) / 2
    assert mean_of_means[0] != pytest.approx((whole[2, 0] / whole[2, 1]).item(), rel=1e-3)


def test_a_step_that_an_exception_ended_is_not_in_the_next_runs_first():
    trainer = SimpleNamespace(accelerator=SimpleNamespace(reduce=lambda sums, how: sums), _metrics={"train": None})
    gauge, logged = Gauge(trainer, 1, VALLEY), []
    for lost in (True, False):
        trainer._metrics["train"] = defaultdict(list)
        gauge.on_train_begin(None, None, None)
        if lost:
            gauge.measure(*batch(3, [2, 7, 1, 12]))
            gauge.on_train_begin(None, None, None)
        gauge.measure(*batch(0, [3, 12, 5, 9]))
        gauge.on_step_end(None, SimpleNamespace(global_step=1), None)
        logged.append(dict(trainer._metrics["train"]))
    assert logged[0] == logged[1] and len(logged[0]) == len(QUANTITIES)


def test_what_nothing_was_counted_for_is_left_out():
    gradient_BT, _, forward = batch(2, [3, 5, 0, 0])
    names = {
        name.removeprefix("squeeze_risk/") for name in risk_metrics(risk_sums(gradient_BT, None, forward, VALLEY))
    }
    assert names == {"chosen/energy", "chosen/residual_norm"}


@pytest.mark.parametrize("prob", [1e-30, 0.5, 1 - 1e-7])
def test_the_residual_norm_stays_within_its_bounds(prob):
    """A token with nearly all the mass has next to no residual, which 1 - 2p + sum p^2 would lose in float32."""
    logp_BT = torch.tensor([[math.log(prob)]] * 2)
    other = 1 - prob
    sum_sq_BT = torch.tensor([[math.log(prob**2 + other**2)]] * 2)
    forward = TokenForward(logp_BT, torch.ones(2, 1, dtype=torch.bool), sum_sq_BT, 1)
    got = risk_metrics(risk_sums(torch.ones(2, 1), None, forward, VALLEY))["squeeze_risk/rejected/residual_norm"]
    assert got == pytest.approx(math.sqrt(2) * other, rel=0.05, abs=5e-4)
