"""How repetitive token ids are: against definitions written out, and on sequences whose answer is known."""

import math
import random

import pytest

from trl_dynamics.scoring.repetition import distinct_share, longest_repeat, repeat_share, same_shares

LOOP = [5, 3, 8] * 7
CASES = {
    "nothing": [],
    "one": [4],
    "all different": list(range(12)),
    "one token again and again": [2] * 9,
    "a loop": LOOP,
    "a loop after a good start": [1, 9, 2, 7, *LOOP],
    "a sentence twice, with another between": [1, 2, 3, 4, 5, 9, 8, 7, 1, 2, 3, 4, 5],
    "a doubled token": [1, 2, 2, 3],
}
RANDOM = [[random.Random(seed).randrange(letters) for _ in range(25)] for letters in (2, 3, 6) for seed in range(8)]
ALL = [*CASES.values(), *RANDOM]


def runs(ids):
    """Every run of neighbours, with where it begins."""
    return [(i, tuple(ids[i:j])) for i in range(len(ids)) for j in range(i + 1, len(ids) + 1)]


def slow_longest_repeat(ids):
    starts = {}
    for start, run in runs(ids):
        starts.setdefault(run, []).append(start)
    return max((len(run) for run, found in starts.items() if len(found) > 1), default=0)


def slow_repeat_share(ids):
    covered = set()
    for start, run in runs(ids):
        if len(run) % 2 == 0 and run[: len(run) // 2] == run[len(run) // 2 :]:
            covered |= set(range(start, start + len(run)))
    return len(covered) / len(ids) if ids else math.nan


def slow_distinct_share(ids, n):
    seen, total = [], 0
    for _, run in runs(ids):
        if len(run) == n:
            total += 1
            if run not in seen:
                seen.append(run)
    return len(seen) / total if total else math.nan


@pytest.mark.parametrize("ids", ALL)
def test_numbers_are_those_of_the_definitions(ids):
    assert longest_repeat(ids) == slow_longest_repeat(ids)
    assert repeat_share(ids) == pytest.approx(slow_repeat_share(ids), nan_ok=True)
    for n in (1, 2, 3):
        assert distinct_share(ids, n) == pytest.approx(slow_distinct_share(ids, n), nan_ok=True)


def test_same_answers_are_counted_pair_by_pair():
    answers = [[1, 2], [3], [1, 2], [], [1, 2], [2, 1], []]
    slow = [sum(i != j and a == b for j, b in enumerate(answers)) / 6 for i, a in enumerate(answers)]
    assert same_shares(answers) == slow and slow[:2] == [2 / 6, 0]
    assert math.isnan(same_shares([[1]])[0]) and same_shares([]) == []


def test_a_loop_shows_in_every_number():
    assert (longest_repeat(LOOP), repeat_share(LOOP)) == (len(LOOP) - 3, 1.0)
    assert distinct_share(LOOP, 2) == pytest.approx(3 / (len(LOOP) - 1))
    mixed = CASES["a loop after a good start"]
    assert longest_repeat(mixed) == 18 and repeat_share(mixed) == pytest.approx(21 / 25)


def test_said_twice_is_a_repeat_but_no_loop():
    ids = CASES["a sentence twice, with another between"]
    assert (longest_repeat(ids), repeat_share(ids)) == (5, 0.0)
