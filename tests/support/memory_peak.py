"""Peaks of memory: of a process of its own, and of the tensors of this one."""

import itertools
import sys
from collections.abc import Callable

import pytest
import torch

# getrusage counts what the process was started from as well, a worker of pytest with all that it has grown to.
PEAK = """
def peak_kib():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")


def most_alive(call: Callable[[], object]) -> int:
    """The most bytes of tensors that were alive at once, above those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))
