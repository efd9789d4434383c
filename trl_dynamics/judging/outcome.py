"""Verdicts as numbers: win rate with its interval, position bias, and what length has to do with it.

M matches   R resamples
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from trl_dynamics.judging.match import SIDES, TIE, UNPARSABLE, Match, Showing

RULE = (
    "Each prompt is judged in both orders. A verdict for A is worth 1, a tie 1/2, one for B 0; A wins the prompt with "
    "more than 1 of 2, loses it with less, and ties with 1. Win rate of A = (wins + ties/2)/prompts. A reply that "
    "holds no verdict counts as a tie and is counted apart; identical answers tie."
)
WORTH = {"A": 1.0, TIE: 0.5, UNPARSABLE: 0.5, "B": 0.0}
# Lengths of a pair are similar if the shorter answer has this share of the longer one's characters.
SIMILAR = 0.9


def outcomes(matches: Sequence[Match], rows: Mapping[str, Mapping]) -> np.ndarray:
    """What A got of each prompt: 1, 1/2 or 0.

    Args:
        matches (`Sequence[Match]`): The prompts.
        rows (`Mapping[str, Mapping]`): Lines of the verdicts' file by key; both orders of every match, at least of
            those whose answers differ.

    Shapes: (M,).
    """
    return np.array([(np.sign(sum(_worth(match, rows)) - 1.0) + 1.0) / 2.0 for match in matches])


def win_rate_interval(
    outcome_M: np.ndarray, *, confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the win rate over prompts (Efron and Tibshirani 1993, section 13.3).

    A resample draws M of the M prompts with replacement. Only how many of them are wins, ties and losses counts, and
    these numbers are multinomial, so they are drawn at once.

    Shapes: outcome_M (M,) of 1, 1/2 and 0.

    Raises:
        ValueError: If there are no prompts, or an option is out of range.
    """
    if not len(outcome_M):
        raise ValueError("there is no judged prompt to take an interval of")
    check_bootstrap(confidence, num_resamples)
    num_prompts = len(outcome_M)
    shares = [np.mean(outcome_M == value) for value in (1.0, 0.5, 0.0)]
    draws_R3 = np.random.default_rng(seed).multinomial(num_prompts, shares, size=num_resamples)
    rates_R = (draws_R3[:, 0] + draws_R3[:, 1] / 2) / num_prompts
    low, high = np.quantile(rates_R, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def check_bootstrap(confidence: float, num_resamples: int) -> None:
    """Refuse options of the interval before anything is spent on what it is of.

    Raises:
        ValueError: If the confidence is not between 0 and 1, or there are no resamples.
    """
    if not 0 < confidence < 1 or num_resamples < 1:
        raise ValueError(
            f"confidence {confidence} and num_resamples {num_resamples}: expected between 0 and 1, and at least 1"
        )


def position_bias(matches: Sequence[Match], rows: Mapping[str, Mapping]) -> dict:
    """How often the verdict follows the place: in both orders for what was shown first, or for what came second.

    Over prompts with two readable verdicts; `share` is None where there are none.
    """
    counts = Counter()
    for match in matches:
        verdicts = dict(zip(SIDES, _verdicts(match, rows), strict=True))
        if match.is_identical or UNPARSABLE in verdicts.values():
            continue
        counts["prompts"] += 1
        counts["first"] += all(winner == leader for leader, winner in verdicts.items())
        counts["second"] += set(verdicts.values()) == set(SIDES) and verdicts["A"] == "B"
    follows = counts["first"] + counts["second"]
    return {
        "prompts": counts["prompts"],
        "follows_first": counts["first"],
        "follows_second": counts["second"],
        "share": follows / counts["prompts"] if counts["prompts"] else None,
    }


def by_order(matches: Sequence[Match], rows: Mapping[str, Mapping]) -> dict[str, float]:
    """Mean worth of the verdicts for A where A, and where B, was shown first."""
    worths = np.array([_worth(match, rows) for match in matches])
    return {f"{side}_first": float(mean) for side, mean in zip(SIDES, worths.mean(0), strict=True)}


def lengths(matches: Sequence[Match], outcome_M: np.ndarray) -> dict:
    """Mean lengths in characters and words, the win rate among pairs of similar length, and that of longer answers.

    `similar` is A's win rate over pairs whose shorter answer has at least 0.9 of the longer one's characters, `longer`
    how often the longer answer of the other pairs wins (ties count half): far from 1/2, length may be what is judged.
    """
    sizes_M2 = np.array([[len(match.answers[side]) for side in SIDES] for match in matches])
    words_M2 = np.array([[len(match.answers[side].split()) for side in SIDES] for match in matches])
    similar_M = sizes_M2.min(1) >= SIMILAR * sizes_M2.max(1)
    longer_M = np.where(sizes_M2[:, 0] > sizes_M2[:, 1], outcome_M, 1 - outcome_M)[~similar_M]
    return {
        "characters": dict(zip(SIDES, sizes_M2.mean(0).tolist(), strict=True)),
        "words": dict(zip(SIDES, words_M2.mean(0).tolist(), strict=True)),
        "similar": _mean(outcome_M[similar_M]),
        "longer": _mean(longer_M),
    }


def numbers(matches: Sequence[Match], rows: Mapping[str, Mapping]) -> dict[str, dict[str, float]]:
    """Means of what a scoring judge tells, by side and name."""
    found: dict[str, dict[str, list[float]]] = {side: {} for side in SIDES}
    for match in matches:
        told = rows.get(Showing(match, "A").key, {}).get("numbers", {})
        for side, values in told.items():
            for name, value in values.items():
                found[side].setdefault(name, []).append(value)
    return {side: {name: float(np.mean(values)) for name, values in found[side].items()} for side in SIDES}


def summarise(
    matches: Sequence[Match],
    rows: Mapping[str, Mapping],
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> dict:
    """All of the above for the summary file; see [`RULE`] for what wins.

    Raises:
        ValueError: As [`win_rate_interval`].
    """
    outcome_M = outcomes(matches, rows)
    interval = win_rate_interval(outcome_M, confidence=confidence, num_resamples=num_resamples, seed=seed)
    judged = [match for match in matches if not match.is_identical]
    return {
        "rule": RULE,
        "prompts": len(matches),
        "wins": int((outcome_M == 1).sum()),
        "ties": int((outcome_M == 0.5).sum()),
        "losses": int((outcome_M == 0).sum()),
        "win_rate": float(outcome_M.mean()),
        "interval": list(interval),
        "bootstrap": {"confidence": confidence, "num_resamples": num_resamples, "seed": seed},
        "identical": len(matches) - len(judged),
        "verdicts": dict(Counter(verdict for match in judged for verdict in _verdicts(match, rows))),
        "by_order": by_order(matches, rows),
        "position_bias": position_bias(matches, rows),
        "lengths": lengths(matches, outcome_M),
        "numbers": numbers(matches, rows),
    }


def _verdicts(match: Match, rows: Mapping[str, Mapping]) -> list[str]:
    """The verdict with A first and the one with B first."""
    if match.is_identical:
        return [TIE, TIE]
    return [rows[Showing(match, leader).key]["verdict"] for leader in SIDES]


def _worth(match: Match, rows: Mapping[str, Mapping]) -> list[float]:
    return [WORTH[verdict] for verdict in _verdicts(match, rows)]


def _mean(values: np.ndarray) -> dict:
    return {"prompts": len(values), "win_rate": float(values.mean()) if len(values) else None}
