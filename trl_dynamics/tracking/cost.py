"""What probing costs: wall seconds of probing and of training, step by step, and what they will come to."""

import time
from collections.abc import Callable
from statistics import median

# What one scoring costs is the median of so many last ones.
RECENT = 5


class CostLedger:
    """Seconds of probing and training of one run, over all its parts.

    Args:
        clock (`Callable[[], float]`, *optional*): Wall time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self.restart(0, [])

    def restart(self, step: int, timeline: list[list[float]], setup_seconds: float = 0.0) -> None:
        """Start the clock at `step`.

        Args:
            timeline (`list[list[float]]`): (step, seconds of this probe, seconds of training until then) of what was
                taken before; entries after `step` are left out.
            setup_seconds (`float`): What went before the first probe: the check of the layout.
        """
        self.timeline = [list(entry) for entry in timeline if entry[0] <= step]
        self.setup_seconds = setup_seconds
        self._first = len(self.timeline)
        self._train_before = self.timeline[-1][2] if self.timeline else 0.0
        self._probed_before = self.probe_seconds
        self._began = self._clock()
        self._marked = step, self.train_seconds

    @property
    def probe_seconds(self) -> float:
        """Seconds of probing so far, preparations included."""
        return self.setup_seconds + sum(entry[1] for entry in self.timeline)

    @property
    def train_seconds(self) -> float:
        """Wall seconds of training without probing, earlier parts of a resumed run included."""
        return self._train_before + self._clock() - self._began - (self.probe_seconds - self._probed_before)

    def now(self) -> float:
        return self._clock()

    def add(self, step: int, probe_seconds: float) -> None:
        """Note a probe that has just been taken, or with 0 seconds a checkpoint without one."""
        self.timeline.append([step, probe_seconds, 0.0])
        self.timeline[-1][2] = self.train_seconds

    def leave_out(self, seconds: float) -> None:
        """Count seconds that just passed neither as training nor as probing."""
        self._began += seconds

    @property
    def costs(self) -> list[float]:
        """Seconds of each scoring so far, earlier parts of a resumed run included."""
        return [seconds for _, seconds, _ in self.timeline if seconds > 0]

    @property
    def typical_cost(self) -> float:
        """Median seconds of the last scorings of this part of the run, else of earlier ones."""
        own = [seconds for _, seconds, _ in self.timeline[self._first :] if seconds > 0]
        return median((own or self.costs)[-RECENT:])

    def mark(self, step: int) -> None:
        """Start to measure training time per step, after steps that are slow because kernels and caches warm up."""
        self._marked = step, self.train_seconds

    def projected_training(self, step: int, max_steps: int) -> float:
        """Seconds of training that the whole run will take: those so far, and the steps to come at the speed since
        [`CostLedger.mark`].

        Args:
            step, max_steps (`int`): Optimiser steps done, after the marked one, and of the whole run.
        """
        marked, until = self._marked
        trained = self.train_seconds
        return trained + (trained - until) / (step - marked) * (max_steps - step)


def duration(seconds: float) -> str:
    """Seconds as people write them: 0.042 s, 4.2 s, 42 s."""
    return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.2g} s"
