"""What probing costs is counted apart from training, restored after a resume, and projected soundly."""

import random

import pytest

from trl_dynamics.tracking.cost import CostLedger, duration


class Clock:
    def __init__(self):
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def train(ledger: CostLedger, clock: Clock, steps: range, every: int, step_seconds, probe_seconds) -> None:
    """Training steps of `step_seconds(step)` each; after every `every`-th one a probe of `probe_seconds(step)`."""
    for step in steps:
        clock.time += step_seconds(step)
        if step % every == 0:
            clock.time += probe_seconds(step)
            ledger.add(step, probe_seconds(step))


def test_training_is_wall_time_without_probing():
    clock = Clock()
    ledger = CostLedger(clock)
    ledger.add(0, 0.0)
    train(ledger, clock, range(1, 21), 5, lambda step: 2.0, lambda step: 0.5)
    clock.time += 3.0
    assert ledger.probe_seconds == pytest.approx(2.0) and ledger.train_seconds == pytest.approx(43.0)
    assert [entry[2] for entry in ledger.timeline] == pytest.approx([0.0, 10.0, 20.0, 30.0, 40.0])


def test_what_is_left_out_counts_as_neither():
    clock = Clock()
    ledger = CostLedger(clock)
    clock.time += 5.0
    ledger.leave_out(3.0)
    ledger.add(1, 0.5)
    assert ledger.train_seconds == pytest.approx(1.5) and ledger.probe_seconds == pytest.approx(0.5)


def test_a_resumed_run_counts_on_from_its_checkpoint():
    """Time between the checkpoint and the crash is trained again, and counted once."""
    clock = Clock()
    ledger = CostLedger(clock)
    train(ledger, clock, range(1, 13), 4, lambda step: 1.0, lambda step: 0.25)
    clock.time += 1000.0
    resumed = CostLedger(clock)
    resumed.restart(8, ledger.timeline, setup_seconds=0.125)
    assert resumed.probe_seconds == pytest.approx(0.625) and resumed.train_seconds == pytest.approx(8.0)
    train(resumed, clock, range(9, 13), 4, lambda step: 1.0, lambda step: 0.25)
    assert resumed.timeline == [pytest.approx(entry) for entry in ledger.timeline]
    assert resumed.setup_seconds == 0.125


@pytest.mark.parametrize("probe_seconds", [0.2, 1.0])
def test_the_projection_comes_true(probe_seconds):
    clock = Clock()
    ledger = CostLedger(clock)
    noise = random.Random(0)
    costs = [lambda step: 1.0 + 0.1 * noise.random(), lambda step: probe_seconds]
    train(ledger, clock, range(1, 2), 10, *costs)
    ledger.mark(1)
    train(ledger, clock, range(2, 101), 10, *costs)
    projected = ledger.projected_training(100, 1000)
    train(ledger, clock, range(101, 1001), 10, *costs)
    assert projected == pytest.approx(ledger.train_seconds, rel=0.02)
    assert ledger.typical_cost == pytest.approx(probe_seconds)


def test_slow_first_steps_do_not_count_for_the_rest():
    """The first step takes a minute and the first probe ten seconds; the rest is even."""
    clock = Clock()
    ledger = CostLedger(clock)
    slow = [lambda step: 60.0 if step == 1 else 0.1, lambda step: 10.0 if step == 1 else 0.01]
    train(ledger, clock, range(1, 2), 1, *slow)
    ledger.mark(1)
    train(ledger, clock, range(2, 51), 1, *slow)
    assert ledger.projected_training(50, 10_000) == pytest.approx(60 + 0.1 * 9999, rel=1e-6)
    assert ledger.typical_cost == pytest.approx(0.01)


def test_a_resumed_part_is_projected_from_its_own_speed():
    """Another machine, twice as fast, takes over at step 100."""
    clock = Clock()
    ledger = CostLedger(clock)
    train(ledger, clock, range(1, 101), 10, lambda step: 2.0, lambda step: 0.2)
    resumed = CostLedger(clock)
    resumed.restart(100, ledger.timeline)
    assert resumed.typical_cost == pytest.approx(0.2)
    train(resumed, clock, range(101, 151), 10, lambda step: 1.0, lambda step: 0.1)
    assert resumed.typical_cost == pytest.approx(0.1)
    assert resumed.projected_training(150, 1000) == pytest.approx(200 + 50 + 850)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s"), (0.0421, "0.042 s"), (4.23, "4.2 s"), (9.97, "10 s"), (261.4, "261 s")]
)
def test_seconds_are_written_with_two_digits(seconds, said):
    assert duration(seconds) == said
