"""What probing costs: wall seconds of probing and of training, step by step, and what they will come to."""

import time
from collections.abc import Callable
from statistics import median

# A projection needs a few probes, and training steps beyond those in which kernels warm up and caches fill.
MIN_PROBES, MIN_STEPS = 3, 10
MAX_SHARE = 0.05


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
        self._first, self._step = len(self.timeline), step
        self._train_before = self.timeline[-1][2] if self.timeline else 0.0
        self._probed_before = self.probe_seconds
        self._began = self._clock()

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

    def projected_share(self, max_steps: int, remaining: int) -> float | None:
        """Seconds of probing over seconds of training at the end of the run, None while too little is known.

        Probing so far + (median probe) x (probes to come), over training so far + (seconds per step) x (steps to
        come); seconds per step are taken between the first mark after a step of this part of the run and now.

        Args:
            max_steps (`int`): Optimiser steps of the whole run.
            remaining (`int`): Probes to come.
        """
        own = self.timeline[self._first :]
        costs = [seconds for _, seconds, _ in own if seconds > 0]
        trained = [entry for entry in own if entry[0] > self._step]
        if len(costs) < MIN_PROBES or not trained or trained[-1][0] - trained[0][0] < MIN_STEPS:
            return None
        per_step = (trained[-1][2] - trained[0][2]) / (trained[-1][0] - trained[0][0])
        training = self.timeline[-1][2] + per_step * (max_steps - trained[-1][0])
        return (self.probe_seconds + median(costs) * remaining) / training if training > 0 else None
