"""When to probe: a fixed set of steps that depends on the arguments alone, so that a resumed run keeps to it."""

import math


def probe_steps(
    max_steps: int, every: float, *, log_spaced: bool = True, at_start: bool = True, at_end: bool = True
) -> list[int]:
    """Steps at which to score the probe set, ascending.

    Args:
        max_steps (`int`): Optimiser steps of the run.
        every (`float`): Steps between probes; below 1 a share of `max_steps`; 0 for no regular probes.
        log_spaced (`bool`, *optional*): Also at 1, 2, 4, ... up to the first regular probe, where things move fastest.
        at_start, at_end (`bool`, *optional*): Also at step 0 and at `max_steps`.

    Raises:
        ValueError: If `every` is negative or a fraction of more than one step.
    """
    check_every(every)
    # 0.07 * 100 is a little more than 7 in floating point, and must not become 8.
    interval = math.ceil(round(every * max_steps, 9)) if 0 < every < 1 else int(every)
    steps = set(range(interval, max_steps + 1, interval)) if interval else set()
    if log_spaced:
        first = interval or max_steps
        steps |= {1 << k for k in range(max_steps.bit_length()) if 1 << k < first}
    steps |= {0} if at_start else set()
    steps |= {max_steps} if at_end else set()
    return sorted(steps)


def check_every(every: float) -> None:
    """Refuse what is neither a number of steps nor a share of them.

    Raises:
        ValueError: If it is negative or a fraction of more than one step.
    """
    if not 0 <= every < math.inf or (every > 1 and every != int(every)):
        raise ValueError(f"probe_every is {every}, expected a whole number of steps, a share below 1, or 0 for none")
