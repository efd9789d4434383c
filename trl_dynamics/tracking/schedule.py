"""When to probe: a fixed set of steps that depends on the arguments alone, and the limit that may thin it."""

import math
from dataclasses import dataclass

from transformers import TrainingArguments

# Where `probe_every` is not given: the schedule, and most seconds of probing over seconds of training.
DEFAULT_EVERY, DEFAULT_LIMIT = 0.05, 1 / 3


@dataclass(frozen=True)
class Schedule:
    """What one run plans to score.

    Args:
        steps (`frozenset[int]`): Steps of the whole schedule.
        every (`float`): As `probe_every`.
        limit (`float`, *optional*): Most time of probing over time of training; None for no limit.
        is_thinned (`bool`): Whether the limit is there because no `probe_every` was given.
    """

    steps: frozenset[int]
    every: float
    limit: float | None
    is_thinned: bool

    @property
    def description(self) -> dict:
        """What meta.json keeps of it."""
        return {"steps": sorted(self.steps), "every": self.every, "budget": self.limit, "thinned": self.is_thinned}


def plan(args: TrainingArguments, max_steps: int, earlier: dict | None = None) -> Schedule:
    """The schedule of a run.

    A given `probe_every` is obeyed, with the given `probe_budget` or no limit. Without it a resumed run keeps the
    spacing and the limit that it began with, and a new one has [`DEFAULT_EVERY`] within [`DEFAULT_LIMIT`].

    Args:
        args: Anything with the fields of [`ProbeArguments`].
        max_steps (`int`): Optimiser steps of the run.
        earlier (`dict`, *optional*): `schedule` in the meta.json of the run that is resumed.
    """
    every, limit, is_thinned = args.probe_every, args.probe_budget, False
    if every is None:
        kept = earlier or {"every": DEFAULT_EVERY, "budget": DEFAULT_LIMIT, "thinned": True}
        every, is_thinned = kept["every"], limit is None and kept["thinned"]
        limit = kept["budget"] if limit is None else limit
    steps = probe_steps(
        max_steps,
        every,
        log_spaced=args.probe_log_spaced,
        at_start=args.probe_at_start,
        at_end=args.probe_at_end,
    )
    return Schedule(frozenset(steps), every, limit, is_thinned)


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


def repeated_steps(strategy: str, interval: float, max_steps: int, num_epochs: int) -> set[int]:
    """Steps of checkpoints or evaluations, as far as they are known before training; epochs are taken as equal.

    Args:
        strategy (`str`): `"steps"` (every `interval` steps), `"epoch"` (at the end of each); others give none, and so
            do epochs of unknown length, of which the trainer counts more than there are steps.
    """
    if strategy == "steps" and interval >= 1:
        return set(range(int(interval), max_steps + 1, int(interval)))
    if strategy == "epoch" and num_epochs <= max_steps:
        return {math.ceil(max_steps * epoch / num_epochs) for epoch in range(1, num_epochs + 1)}
    return set()


def check_every(every: float | None) -> None:
    """Refuse what is neither a number of steps nor a share of them; None is the default schedule.

    Raises:
        ValueError: If it is negative or a fraction of more than one step.
    """
    if every is not None and (not 0 <= every < math.inf or (every > 1 and every != int(every))):
        raise ValueError(f"probe_every is {every}, expected a whole number of steps, a share below 1, or 0 for none")
