"""What probing will cost, said as soon as it is known: after the first scoring, and once ten steps have run."""

import logging

from trl_dynamics.tracking.budget import planned
from trl_dynamics.tracking.cost import CostLedger, duration
from trl_dynamics.tracking.schedule import Schedule

# Probing that takes more of training time than this is worth a warning where nobody set a limit.
MAX_SHARE = 0.05
# After so many steps training time per step is known; the first one is slow and not counted.
KNOWN_STEPS = 10


class Forecast:
    """The cost of one part of a run, from its start or from the checkpoint that it resumes from.

    Args:
        ledger ([`CostLedger`]): What probing and training took so far.
        schedule ([`Schedule`]): Its limit is compared with.
        due (`set[int]`): Steps of all scorings: scheduled, at checkpoints and with evaluations.
        start, max_steps (`int`): Optimiser steps done before this part, and of the whole run.

    Attributes:
        marks (`frozenset[int]`): Steps at which [`Forecast.after_step`] is to be called.
    """

    def __init__(self, ledger: CostLedger, schedule: Schedule, due: set[int], start: int, max_steps: int):
        self.ledger, self.schedule, self.due = ledger, schedule, due
        self.start, self.max_steps = start, max_steps
        known = start + KNOWN_STEPS
        self.marks = frozenset({start + 1, known}) if known <= max_steps else frozenset()
        self._has_scored = self._has_told = False

    def after_scoring(self, step: int, seconds: float) -> tuple[int, str] | None:
        """Log level and text after the first scoring of this part: how many will come, and what they take in all."""
        if self._has_scored:
            return None
        self._has_scored = True
        num = 1 + sum(other > step for other in self.due)
        more = " more" if self.start else ""
        limited = (
            "" if self.schedule.limit is None else f"; the limit is {percent(self.schedule.limit)} of training time"
        )
        return logging.INFO, (
            f"probing will take about {num}{more} scorings of {duration(seconds)} each = {duration(num * seconds)} "
            f"in all, if none is left out{limited}"
        )

    def after_step(self, step: int) -> tuple[int, str] | None:
        """Log level and text at the last of `marks`: the share of training time, and what the limit does about it."""
        if step == self.start + 1:
            self.ledger.mark(step)
            return None
        training = self.ledger.projected_training(step, self.max_steps)
        costs = self.ledger.costs
        if not costs or training <= 0:
            return None
        self._has_told = True
        last = self.ledger.typical_cost if self.max_steps in self.due else 0.0
        coming = sum(other >= step for other in self.due) * self.ledger.typical_cost
        share = (self.ledger.probe_seconds + coming) / training
        return self._tell(share, self.ledger.setup_seconds + costs[0] + last, training)

    def at_end(self) -> tuple[int, str] | None:
        """Log level and text of a part that was too short for a forecast, where probing took more than it should."""
        probing, training = self.ledger.probe_seconds, self.ledger.train_seconds
        limit = MAX_SHARE if self.schedule.limit is None else self.schedule.limit
        if self._has_told or training <= 0 or probing <= limit * training:
            return None
        return logging.WARNING, (
            f"probing took {duration(probing)}, {percent(probing / training)} of the {duration(training)} of training "
            f"and more than {percent(limit)}. To make it cheaper, score fewer probes (probe_subset)"
        )

    def _tell(self, share: float, ends: float, training: float) -> tuple[int, str]:
        limit, every = self.schedule.limit, self.schedule.every
        takes = f"probing will take about {percent(share)} of the time that training takes"
        if limit is None and share > MAX_SHARE:
            return logging.WARNING, (
                f"{takes} (more than {percent(MAX_SHARE)}). To make it cheaper, probe less often (probe_every, now "
                f"{every:g}), score fewer probes (probe_subset), or set a limit (probe_budget={MAX_SHARE})"
            )
        if limit is None:
            return logging.INFO, takes
        if ends > limit * training:
            return logging.WARNING, (
                f"probing will take about {duration(ends)} at the start and the end alone, {percent(ends / training)} "
                f"of the {duration(training)} of training and above the limit of {percent(limit)}: other scorings are "
                "left out. To make it cheaper, score fewer probes (probe_subset)"
            )
        if share > planned(limit):
            return logging.INFO, (
                f"{takes} if none is left out: some are left out evenly, to keep to the limit of {percent(limit)}. "
                "probe_budget sets another limit, probe_every a schedule without one"
            )
        is_worth_it = self.schedule.is_thinned and share > MAX_SHARE
        return logging.WARNING if is_worth_it else logging.INFO, f"{takes}, within the limit of {percent(limit)}"


def percent(share: float) -> str:
    """A share as people write it: 33 %."""
    return f"{100 * share:.0f} %"
