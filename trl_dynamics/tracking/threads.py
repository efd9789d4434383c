"""Threads on a CPU that others use too wait for each other, which can cost ten times the time: what to do."""

import logging
import os

import torch

logger = logging.getLogger(__name__)

# Threads of this run and what runs already, as a multiple of the cores, above which threads wait for each other. The
# load of this run's own start stays below it.
CROWDED = 1.4


def tell_threads(device: torch.device, num_processes: int) -> None:
    """Say once what OMP_NUM_THREADS does, where this run computes on a crowded CPU; to be called on one process."""
    if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return
    # Neither is there on every system.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    hint = thread_hint(torch.get_num_threads(), here, cores, load)
    if hint is not None:
        logger.info(hint)


def thread_hint(threads: int, num_processes: int, cores: int, load: float) -> str | None:
    """A sentence about more threads than there are free cores; None where they fit.

    Args:
        threads (`int`): Of each process.
        num_processes (`int`): On this machine.
        cores (`int`): That this process may use.
        load (`float`): Of the last minute: how many threads ran or waited for a core.
    """
    if threads == 1 or threads * num_processes + load <= CROWDED * cores:
        return None
    fitting = max(1, int(cores - load) // num_processes)
    processes = f"{num_processes} processes of " if num_processes > 1 else ""
    return (
        f"{processes}{threads} threads share {cores} cores with a load of {load:.1f}: threads that wait for a core "
        f"can make this many times slower. OMP_NUM_THREADS={fitting} in the environment sets {fitting} per process"
    )
