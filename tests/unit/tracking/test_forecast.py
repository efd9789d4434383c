"""What probing will cost is said after the first scoring and after ten steps, with numbers that come true."""

import logging
import re

import pytest

from trl_dynamics.tracking.budget import is_affordable, planned
from trl_dynamics.tracking.cost import CostLedger
from trl_dynamics.tracking.forecast import Forecast
from trl_dynamics.tracking.schedule import plan
from trl_dynamics.trainers.config import ProbeArguments


class Run:
    """A run whose clock gives each step and each scoring a fixed time."""

    def __init__(
        self, *, scoring: float, step: float = 1.0, max_steps: int = 100, start: int = 0, ledger=None, **given
    ):
        self.now, self.said, self.taken = 0.0, [], []
        self.schedule = plan(ProbeArguments(**given), max_steps)
        self.ledger = CostLedger(lambda: self.now)
        self.ledger.restart(start, [] if ledger is None else ledger.timeline)
        self.forecast = Forecast(self.ledger, self.schedule, set(self.schedule.steps), start, max_steps)
        decisions: list[dict] = []
        for at in range(start, max_steps + 1):
            self.now += step if at > start else 0.0
            if at in self.forecast.marks:
                self._hear(at, self.forecast.after_step(at))
            if at in self.schedule.steps and (at > start or at == 0):
                limits = {"step": at, "max_steps": max_steps, "scheduled": self.schedule.steps}
                limit = self.schedule.limit
                taken = limit is None or is_affordable(self.ledger, limit, **limits, decisions=decisions)
                decisions.append({"step": at, "taken": taken})
                if taken:
                    self.now += scoring
                    self.ledger.add(at, scoring)
                    self.taken.append(at)
                    self._hear(at, self.forecast.after_scoring(at, scoring))
        self._hear("end", self.forecast.at_end())

    def _hear(self, at, message) -> None:
        if message is not None:
            self.said.append((at, *message))

    @property
    def share(self) -> float:
        return self.ledger.probe_seconds / self.ledger.train_seconds


def numbers(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"\d+\.?\d*", text)]


def test_cheap_probing_keeps_the_whole_default_schedule():
    run = Run(scoring=0.1)
    assert run.taken == sorted(run.schedule.steps) and len(run.taken) == 24
    (first, level, text), (then, second_level, share) = run.said
    assert (first, then) == (0, 10) and level == second_level == logging.INFO
    assert numbers(text)[:3] == [24, 0.1, 2.4] and numbers(share) == [2, 33]


@pytest.mark.parametrize("scoring", [0.7, 1.5, 3.0, 8.0])
def test_the_default_schedule_is_thinned_to_a_third_and_log_spaced_steps_are_too(scoring):
    run = Run(scoring=scoring)
    assert run.taken[0] == 0 and run.taken[-1] == 100 and run.share <= 1 / 3
    assert len(run.taken) < len(run.schedule.steps) or scoring == 0.7
    assert not {1, 2, 4} <= set(run.taken) or scoring == 0.7
    # And the limit is used.
    assert run.share > planned(1 / 3) - 3 * scoring / 100 or scoring == 0.7


def test_a_given_spacing_is_obeyed_and_warned_of():
    run = Run(scoring=8.0, probe_every=0.05)
    assert run.taken == sorted(run.schedule.steps)
    (_, _, text), (at, level, share) = run.said
    assert numbers(text)[:3] == [24, 8, 192]
    assert (at, level) == (10, logging.WARNING) and numbers(share)[0] == 192 == pytest.approx(100 * run.share)


def test_ends_that_cost_more_than_the_limit_are_told_with_numbers():
    run = Run(scoring=30.0)
    assert run.taken == [0, 100]
    at, level, text = run.said[-1]
    assert (at, level) == (10, logging.WARNING) and numbers(text)[:4] == [60, 60, 100, 33]


def test_a_run_that_ends_before_the_tenth_step_is_told_at_its_end():
    run = Run(scoring=2.0, max_steps=6)
    assert run.taken == [0, 6]
    at, level, text = run.said[-1]
    assert (at, level) == ("end", logging.WARNING) and numbers(text)[:4] == [4, 67, 6, 33]
    assert [at for at, *_ in Run(scoring=0.01, max_steps=6).said] == [0]


def test_a_resumed_part_counts_what_is_to_come_at_its_own_speed():
    first = Run(scoring=1.0, probe_every=10)
    first.ledger.timeline = [entry for entry in first.ledger.timeline if entry[0] <= 50]
    run = Run(scoring=0.5, step=0.5, start=50, ledger=first.ledger, probe_every=10)
    (at, level, share), (then, _, text) = run.said
    assert run.taken == [60, 70, 80, 90, 100] and (at, then) == (60, 60)
    # Ten scorings of one second before, five to come, over 50 s of training before and 25 s now.
    assert level == logging.WARNING and numbers(share)[0] == 20
    assert "5 more scorings" in text and numbers(text)[:3] == [5, 0.5, 2.5]


def test_nothing_is_said_of_a_share_before_anything_was_scored():
    run = Run(scoring=1.0, probe_every=50, probe_at_start=False, probe_log_spaced=False)
    assert [at for at, *_ in run.said] == [50]
