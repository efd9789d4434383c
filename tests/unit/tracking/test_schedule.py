"""Probing steps: examples written out, and what holds for every combination of arguments."""

import itertools
import sys

import pytest

from trl_dynamics.tracking.schedule import plan, probe_steps, repeated_steps
from trl_dynamics.trainers.config import ProbeArguments


@pytest.mark.parametrize(
    ("arguments", "options", "steps"),
    [
        ((20, 5), {}, [0, 1, 2, 4, 5, 10, 15, 20]),
        ((20, 5), {"log_spaced": False}, [0, 5, 10, 15, 20]),
        ((20, 5), {"log_spaced": False, "at_start": False}, [5, 10, 15, 20]),
        ((22, 5), {"log_spaced": False, "at_end": False}, [0, 5, 10, 15, 20]),
        ((22, 5), {"log_spaced": False}, [0, 5, 10, 15, 20, 22]),
        ((40, 0.25), {"log_spaced": False}, [0, 10, 20, 30, 40]),
        ((40, 0.25), {}, [0, 1, 2, 4, 8, 10, 20, 30, 40]),
        ((10, 0.15), {"log_spaced": False}, [0, 2, 4, 6, 8, 10]),
        ((20, 0), {}, [0, 1, 2, 4, 8, 16, 20]),
        ((20, 0), {"log_spaced": False}, [0, 20]),
        ((20, 0), {"log_spaced": False, "at_start": False, "at_end": False}, []),
        ((6, 100), {}, [0, 1, 2, 4, 6]),
        ((8, 8), {}, [0, 1, 2, 4, 8]),
        ((3, 1), {}, [0, 1, 2, 3]),
        ((3, 1.0), {}, [0, 1, 2, 3]),
        ((3, 0.01), {}, [0, 1, 2, 3]),
        ((1, 0.05), {}, [0, 1]),
        ((0, 0.05), {}, [0]),
    ],
)
def test_examples(arguments, options, steps):
    assert probe_steps(*arguments, **options) == steps


@pytest.mark.parametrize("max_steps", [1, 2, 3, 7, 64, 65, 1000])
@pytest.mark.parametrize("every", [0, 1, 2, 10, 5000, 0.05, 0.3, 0.999])
def test_properties(max_steps, every):
    for log_spaced, at_start, at_end in itertools.product((False, True), repeat=3):
        options = {"log_spaced": log_spaced, "at_start": at_start, "at_end": at_end}
        steps = probe_steps(max_steps, every, **options)
        assert steps == sorted(set(steps)) and all(isinstance(step, int) for step in steps)
        assert all(0 <= step <= max_steps for step in steps)
        assert (0 in steps) == at_start
        assert not at_end or max_steps in steps
        if log_spaced:
            regular = probe_steps(max_steps, every, log_spaced=False, at_start=False, at_end=False)
            early = [step for step in steps if 0 < step < (regular[0] if regular else max_steps)]
            assert set(steps) - {0, max_steps} == {*regular, *early} - {max_steps}
            assert early == [1 << k for k in range(len(early))]
            assert not early or 2 * early[-1] >= (regular[0] if regular else max_steps)


def test_regular_steps_are_the_multiples():
    steps = probe_steps(1000, 0.05, log_spaced=False)
    assert steps == list(range(0, 1001, 50)) == probe_steps(1000, 50, log_spaced=False)


def test_a_share_of_one_hundred_steps():
    """Asking at a share of p percent is asking every p steps; rounding must not add a step."""
    shares = {percent: probe_steps(100, percent / 100, log_spaced=False) for percent in range(1, 100)}
    assert shares == {percent: probe_steps(100, percent, log_spaced=False) for percent in range(1, 100)}


@pytest.mark.parametrize("every", [-1, -0.1, 1.5, 10.01])
def test_errors_say_what_was_given_and_expected(every):
    with pytest.raises(ValueError, match=f"probe_every is {every}, expected a whole number of steps, a share below 1"):
        probe_steps(10, every)


@pytest.mark.parametrize("every", [float("inf"), float("nan")])
def test_neither_infinity_nor_nan_is_a_number_of_steps(every):
    with pytest.raises(ValueError, match="probe_every"):
        probe_steps(10, every)


def planned(earlier=None, **options):
    schedule = plan(ProbeArguments(**options), 100, earlier)
    return schedule.every, schedule.limit, schedule.is_thinned


def test_a_given_spacing_has_no_limit_and_the_default_one_has():
    assert planned() == (0.05, 1 / 3, True)
    assert planned(probe_budget=0.1) == (0.05, 0.1, False)
    assert planned(probe_every=0.05) == (0.05, None, False)
    assert planned(probe_every=7, probe_budget=0.1) == (7, 0.1, False)
    assert plan(ProbeArguments(), 100).steps == frozenset(probe_steps(100, 0.05))


def test_a_resumed_run_keeps_spacing_and_limit_unless_others_are_given():
    seven = {"steps": [0, 7], "every": 7, "budget": None, "thinned": False}
    assert planned(seven) == (7, None, False)
    assert planned(seven, probe_budget=0.2) == (7, 0.2, False)
    assert planned(seven, probe_every=9) == (9, None, False)
    first = plan(ProbeArguments(), 100)
    assert plan(ProbeArguments(), 100, first.description) == first


def test_checkpoints_and_evaluations_are_counted():
    assert repeated_steps("steps", 30, 100, 1) == {30, 60, 90}
    assert repeated_steps("epoch", 500, 100, 3) == {34, 67, 100}
    assert repeated_steps("no", 30, 100, 3) == repeated_steps("steps", 0, 100, 3) == set()
    # A streamed data set has no length, and the trainer as many epochs as fit an integer.
    assert repeated_steps("epoch", 500, 100, sys.maxsize) == set()
