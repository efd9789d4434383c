"""Win rate, interval and bias against counting by hand, exact distributions and planted cases."""

import itertools
import math
import random

import numpy as np
import pytest

from trl_dynamics.judging.folder import to_row
from trl_dynamics.judging.match import SIDES, Match, Verdict, both_orders
from trl_dynamics.judging.outcome import (
    by_order,
    lengths,
    numbers,
    outcomes,
    position_bias,
    summarise,
    win_rate_interval,
)
from trl_dynamics.judging.table import table

CHOICES = ("first", "second", "tie", "unparsable")


def contest(pairs, answers=None):
    """Matches with the rows of their verdicts; `pairs` holds what was chosen with A first and with B first."""
    answers = answers or [(f"a{i}", f"b{i}") for i in range(len(pairs))]
    matches = [Match(i, f"p{i}", dict(zip("AB", texts, strict=True))) for i, texts in enumerate(answers)]
    rows = {}
    for match, chosen in zip(matches, pairs, strict=True):
        for showing, choice in zip(both_orders([match]), chosen, strict=True):
            rows[showing.key] = to_row(showing, Verdict(choice))
    return matches, rows


def points(choice, a_is_first):
    if choice == "first":
        return 1 if a_is_first else 0
    if choice == "second":
        return 0 if a_is_first else 1
    return 0.5


def test_outcome_of_a_prompt_by_both_orders():
    pairs = list(itertools.product(CHOICES, repeat=2))
    found = outcomes(*contest(pairs))
    for (a_first, b_first), outcome in zip(pairs, found, strict=True):
        total = points(a_first, True) + points(b_first, False)
        assert outcome == (1 if total > 1 else 0 if total < 1 else 0.5), (a_first, b_first)


def test_swapping_the_sides_turns_the_result_round():
    pairs = random.Random(0).choices(list(itertools.product(CHOICES, repeat=2)), k=50)
    ours = summarise(*contest(pairs))
    theirs = summarise(*contest([pair[::-1] for pair in pairs]))
    assert (ours["wins"], ours["losses"]) == (theirs["losses"], theirs["wins"])
    assert ours["win_rate"] == pytest.approx(1 - theirs["win_rate"], abs=1e-12)
    assert ours["position_bias"] == theirs["position_bias"]


def test_a_judge_that_always_takes_the_first_is_all_bias_and_no_result():
    matches, rows = contest([("first", "first")] * 10)
    summary = summarise(matches, rows)
    assert (summary["win_rate"], summary["ties"]) == (0.5, 10)
    assert summary["position_bias"] == {"prompts": 10, "follows_first": 10, "follows_second": 0, "share": 1.0}
    assert by_order(matches, rows) == {"A_first": 1.0, "B_first": 0.0}


def test_bias_counts_readable_prompts_whose_verdict_follows_the_place():
    pairs = [("first", "first"), ("second", "second"), ("first", "second"), ("first", "tie"), ("first", "unparsable")]
    matches, rows = contest([*pairs, ("tie", "tie")], [(f"a{i}", f"b{i}") for i in range(5)] + [("same", "same")])
    assert position_bias(matches, rows) == {"prompts": 4, "follows_first": 1, "follows_second": 1, "share": 0.5}
    matches, rows = contest([("unparsable", "first")])
    assert position_bias(matches, rows)["share"] is None


def test_unparsable_verdicts_are_ties_counted_apart():
    summary = summarise(*contest([("unparsable", "unparsable"), ("first", "unparsable")]))
    assert (summary["wins"], summary["ties"], summary["win_rate"]) == (1, 1, 0.75)
    assert summary["verdicts"] == {"unparsable": 3, "A": 1}


def exact_interval(outcome, confidence):
    """Quantiles of the bootstrap's own distribution, by adding up one draw after the other."""
    n = len(outcome)
    shares = {2: np.mean(outcome == 1), 1: np.mean(outcome == 0.5), 0: np.mean(outcome == 0)}
    total = {0: 1.0}
    for _ in range(n):
        after = {}
        for (sum_so_far, p), (value, q) in itertools.product(total.items(), shares.items()):
            after[sum_so_far + value] = after.get(sum_so_far + value, 0.0) + p * q
        total = after
    bounds = []
    for level in ((1 - confidence) / 2, (1 + confidence) / 2):
        reached = 0.0
        for value in sorted(total):
            reached += total[value]
            if reached >= level - 1e-12:
                bounds.append(value / 2 / n)
                break
    return bounds


@pytest.mark.parametrize(("counts", "confidence"), [((18, 5, 7), 0.95), ((50, 0, 50), 0.9), ((1, 30, 9), 0.8)])
def test_the_interval_is_the_bootstraps(counts, confidence):
    outcome = np.repeat([1.0, 0.5, 0.0], counts)
    found = win_rate_interval(outcome, confidence=confidence, num_resamples=200_000, seed=3)
    # A quantile of the draws may fall on the neighbour of the exact one.
    np.testing.assert_allclose(found, exact_interval(outcome, confidence), atol=0.5 / len(outcome) + 1e-12)
    rng = random.Random(1)
    slow = sorted(sum(rng.choices(outcome.tolist(), k=len(outcome))) / len(outcome) for _ in range(20_000))
    expected = [slow[int(20_000 * level)] for level in ((1 - confidence) / 2, (1 + confidence) / 2)]
    np.testing.assert_allclose(found, expected, atol=1 / len(outcome) + 1e-12)


def test_the_interval_covers_the_true_rate_as_often_as_it_says():
    rng = np.random.default_rng(0)
    true_rate, covered = 0.5 + 0.2 / 2, 0
    for trial in range(400):
        outcome = rng.choice([1.0, 0.5, 0.0], size=120, p=[0.5, 0.2, 0.3])
        low, high = win_rate_interval(outcome, num_resamples=1000, seed=trial)
        covered += low <= true_rate <= high
    assert 0.91 <= covered / 400 <= 0.98


def test_the_interval_depends_on_the_seed_and_outcomes_alone():
    outcome = np.repeat([1.0, 0.5, 0.0], (30, 10, 25))
    assert win_rate_interval(outcome, seed=5) == win_rate_interval(outcome[::-1], seed=5)
    assert win_rate_interval(np.ones(4)) == (1.0, 1.0)
    for bad in ({"confidence": 1.0}, {"confidence": 0.0}, {"num_resamples": 0}):
        with pytest.raises(ValueError, match="confidence"):
            win_rate_interval(outcome, **bad)
    with pytest.raises(ValueError, match="no judged prompt"):
        win_rate_interval(np.array([]))


def test_lengths_tell_when_length_is_what_wins():
    answers = [("x" * 10, "y" * 20)] * 3 + [("x" * 30, "y" * 15)] + [("x x" * 10, "y" * 28), ("x" * 20, "y" * 20)]
    longer_wins = [("second", "first")] * 3 + [("first", "second")] + [("second", "first"), ("first", "second")]
    matches, rows = contest(longer_wins, answers)
    found = lengths(matches, outcomes(matches, rows))
    assert found["longer"] == {"prompts": 4, "win_rate": 1.0}
    assert found["similar"] == {"prompts": 2, "win_rate": 0.5}
    assert found["characters"] == {"A": 110 / 6, "B": (60 + 15 + 28 + 20) / 6}
    assert found["words"]["A"] == pytest.approx((5 + 11) / 6)


def test_numbers_are_means_by_side():
    match = Match(0, "p", {"A": "a", "B": "b"})
    verdict = Verdict("first", numbers={"A": {"reward": 2.0}, "B": {"reward": -1.0}})
    rows = {showing.key: to_row(showing, verdict) for showing in both_orders([match])}
    identical = Match(1, "q", {"A": "s", "B": "s"})
    assert numbers([match, identical], rows) == {"A": {"reward": 2.0}, "B": {"reward": -1.0}}
    assert math.isclose(summarise([match, identical], rows)["win_rate"], 0.5)


def shown(found: dict) -> list[str]:
    counts = dict.fromkeys(("left_out", "new_verdicts", "kept_verdicts"), 0)
    return table(found | counts | {"sees_order": False} | {s: {"num_cut": 0} for s in SIDES}, {"A": "a", "B": "b"})


@pytest.mark.parametrize(("side", "line"), [("A", "A -1.500, B -"), ("B", "A -, B -1.500")])
def test_a_side_of_blank_answers_has_no_mean_in_the_table(side, line):
    """A model that ends at once has no likelihood per token."""
    match = Match(0, "p", {"A": "a", "B": " "})
    verdict = Verdict("tie", numbers=dict.fromkeys(SIDES, {}) | {side: {"logp_mean": -1.5}})
    rows = {showing.key: to_row(showing, verdict) for showing in both_orders([match])}
    assert f"mean logp_mean: {line}" in shown(summarise([match], rows))


def test_the_table_names_the_confidence_that_was_asked_for():
    found = summarise(*contest([("first", "second")]), confidence=0.995)
    assert [text for text in shown(found) if "99.5% interval" in text]
