"""Measuring for the benchmarks: CPU seconds and memory of a function in a fork, and paired ratios with an interval."""

import ctypes
import os
import pickle
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

M_MMAP_THRESHOLD, GIVEN_BACK = -3, 1 << 16


@dataclass(frozen=True)
class Run:
    """One call: its result, CPU seconds, and the peak of resident memory above the start, in MB."""

    result: object
    seconds: float
    megabytes: float


def time_and_memory(function: Callable[[], object], warm_up: Callable[[], object]) -> Run:
    """Run `function` twice, each time in a process of its own: once for its time, once for its memory.

    By default the allocator keeps what a tensor has left, and how much depends on chance. For the memory it gives
    blocks of 64 kB and more back at once, which takes time.
    """

    def prepare() -> None:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, GIVEN_BACK)
        warm_up()

    timed = in_fork(function, warm_up)
    return Run(timed.result, timed.seconds, in_fork(function, prepare).megabytes)


def in_fork(function: Callable[[], object], warm_up: Callable[[], object] = lambda: None) -> Run:
    """Run `function` in a forked process, so that memory it takes is given back and its peak is its own.

    `warm_up` runs there first, unmeasured: a fresh fork has yet to map the libraries' code.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(read)
            warm_up()
            outcome = _run(function)
            with os.fdopen(write, "wb") as pipe:
                pickle.dump(outcome, pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        payload = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"the measured process failed with status {status}")
    return pickle.loads(payload)


def _run(function: Callable[[], object]) -> Run:
    ctypes.CDLL(None).malloc_trim(0)  # what the warm-up freed goes back, so that it hides nothing
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = _status("VmRSS"), time.process_time()
    result = function()
    return Run(result, time.process_time() - start, (_status("VmHWM") - before) / 1024)


def _status(name: str) -> int:
    """A memory figure of this process, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@dataclass(frozen=True)
class Interval:
    """A median with its bootstrap interval at 95 %."""

    median: float
    low: float
    high: float

    def contains(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.median:.4f} [{self.low:.4f}, {self.high:.4f}] (width {self.high - self.low:.4f})"


def bootstrap_median(values: list[float], draws: int = 2000) -> Interval:
    """Median of `values` with the percentile interval over resamples."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return Interval(statistics.median(values), medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1])
