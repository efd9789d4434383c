"""A limit on what probing may cost: which of the scheduled probes are taken."""

from statistics import median

from trl_dynamics.tracking.cost import CostLedger

# Until this step training time per step is not known well: first steps are slow, and would promise too much time.
SETTLED_STEPS, UNSETTLED_TRUST = 10, 0.5
# What closing the store and summing it up may take, in probes.
CLOSING = 0.25
# What is not planned with, as a share of training time, and at most of the budget. What probing leaves of the heap
# changes how often the allocator asks the system for memory in training steps: up to a hundredth of training that no
# clock of ours sees.
RESERVE, MOST_RESERVE = 0.015, 0.3


def check_budget(share: float | None) -> None:
    """Refuse a budget that is no share.

    Raises:
        ValueError: If it is not above 0 and at most 1.
    """
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"probe_budget is {share}, expected a share of training time above 0 and at most 1, or none")


def planned(share: float) -> float:
    """The part of a budget that is planned with, as a share of training time."""
    return share - min(RESERVE, MOST_RESERVE * share)


def is_affordable(
    ledger: CostLedger, share: float, *, step: int, max_steps: int, scheduled: frozenset[int], decisions: list[dict]
) -> bool:
    """Whether the probe that is due now is taken, such that all of the run's stay within `share` of training time.

    Affordable are n = floor((planned share x projected training time - spent - what the end takes) / median cost) of
    the m scheduled probes from here to the one before the end; every (m / n)-th is taken, so that what is left out is
    left out evenly. The end takes the last probe and a quarter of one to close the store. The first probe, which is
    the baseline, and the last are always taken.

    Args:
        ledger ([`CostLedger`]): What probing and training took so far.
        share (`float`): Most seconds of probing over seconds of training.
        step, max_steps (`int`): Optimiser steps done and in all.
        scheduled (`frozenset[int]`): Steps of the whole schedule.
        decisions (`list[dict]`): Earlier choices, each with `step` and `taken`.
    """
    costs = ledger.costs
    if not costs or step >= max_steps:
        return True
    if step == 0:
        return False
    trust = 1.0 if step >= SETTLED_STEPS else UNSETTLED_TRUST
    trained = ledger.train_seconds
    # Slow first steps would promise too much for all those that come: what the last stretch took counts too.
    marked, _, until = ledger.timeline[-1]
    recent = (trained - until) / (step - marked) if step > marked else trained / step
    training = trust * (trained + min(recent, trained / step) * (max_steps - step))
    cost = median(costs[-5:])
    ends = CLOSING + (1 if max_steps in scheduled else 0)
    affordable = int((planned(share) * training - ledger.probe_seconds - ends * cost) / cost)
    if affordable < 1:
        return False
    taken = [choice["step"] for choice in decisions if choice["taken"]]
    skipped = sum(choice["step"] > (taken[-1] if taken else -1) for choice in decisions)
    to_come = len([other for other in scheduled if step <= other < max_steps])
    return (skipped + 1) * affordable >= max(1, to_come)
