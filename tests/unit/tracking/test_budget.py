"""A budget leaves out scheduled probes evenly, and what is taken stays within it."""

import pytest

from trl_dynamics.tracking.budget import check_budget, is_affordable, planned
from trl_dynamics.tracking.cost import CostLedger
from trl_dynamics.tracking.schedule import probe_steps


def simulate(
    share: float,
    *,
    probe: float,
    step: float = 1.0,
    max_steps: int = 1000,
    every: int = 10,
    slow: float = 0,
    setup: float = 0,
):
    """Run the schedule on a clock that is told what things take; returns taken steps and probing over training.

    Closing takes as much as a fifth of a probe.
    """
    now = 0.0
    ledger = CostLedger(lambda: now)
    ledger.restart(0, [], setup)
    scheduled, decisions, taken = frozenset(probe_steps(max_steps, every)), [], []
    for at in range(max_steps + 1):
        if at:
            now += step + (slow if at <= 3 else 0)
        if at in scheduled:
            choice = is_affordable(
                ledger, share, step=at, max_steps=max_steps, scheduled=scheduled, decisions=decisions
            )
            decisions.append({"step": at, "taken": choice})
            if choice:
                now += probe
                ledger.add(at, probe)
                taken.append(at)
    return taken, (ledger.probe_seconds + probe / 5) / ledger.train_seconds


@pytest.mark.parametrize("setup", [0, 2.5])
@pytest.mark.parametrize("slow", [0, 5, 30])
@pytest.mark.parametrize("probe", [0.4, 1.0, 3.0, 9.0])
def test_probing_keeps_to_the_budget_and_uses_it(probe, slow, setup):
    taken, share = simulate(0.05, probe=probe, slow=slow, setup=setup * probe)
    assert taken[0] == 0 and taken[-1] == 1000
    assert share <= 0.05
    assert share > planned(0.05) - 3 * probe / 1000 or len(taken) >= len(probe_steps(1000, 10)) - 3


def test_a_generous_budget_takes_every_probe_once_it_knows_the_pace():
    taken, _ = simulate(0.5, probe=1.0)
    assert {step for step in probe_steps(1000, 10) if step >= 10} <= set(taken)


def test_what_is_left_out_is_left_out_evenly():
    taken, _ = simulate(0.05, probe=3.0)
    late = [step for step in taken if step >= 10]
    gaps = [b - a for a, b in zip(late, late[1:], strict=False)]
    assert len(late) >= 8 and max(gaps[:-1]) <= 3 * min(gaps)


def test_ends_are_always_taken():
    assert simulate(0.001, probe=50.0)[0] == [0, 1000]


def test_what_is_held_back_is_a_part_of_training_and_not_of_a_large_budget():
    assert planned(0.05) == pytest.approx(0.035) and planned(0.01) == pytest.approx(0.007)
    assert planned(1 / 3) == pytest.approx(1 / 3 - 0.015)


@pytest.mark.parametrize("probe", [1.0, 4.0, 10.0, 30.0])
def test_a_large_budget_is_used(probe):
    taken, share = simulate(1 / 3, probe=probe, every=20)
    assert planned(1 / 3) - 3 * probe / 1000 < share <= 1 / 3 or len(taken) >= len(probe_steps(1000, 20)) - 3


@pytest.mark.parametrize("share", [0, -0.1, 1.5, 5])
def test_a_budget_is_a_share(share):
    with pytest.raises(ValueError, match=f"probe_budget is {share}, expected a share of training time above 0"):
        check_budget(share)
    check_budget(None)
    check_budget(0.05)
