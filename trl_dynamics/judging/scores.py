"""Judges that score each answer by itself: the better score wins, whatever the order."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from trl_dynamics.judging.match import FIRST, SECOND, SIDES, TIE, Match, Showing, Verdict
from trl_dynamics.probing.generate import Failure
from trl_dynamics.probing.schema import Prompt

# Matches that are scored before their verdicts are kept: an interruption costs at most these.
CHUNK = 64


@dataclass(frozen=True)
class Score:
    """What an answer is worth; `numbers` are what is told of it, by name."""

    value: float
    numbers: Mapping[str, float] = field(default_factory=dict)


class Scorer(Protocol):
    """Scores answers to prompts; `about` is all that a score depends on besides them."""

    about: dict

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[Score | Failure]: ...


class ScoreJudge:
    """The answer of the higher score wins; equal scores are a tie.

    Args:
        scorer ([`Scorer`]): Asked once for each answer; both orders share it.
        margin (`float`, *optional*): Scores that differ by so much or less are a tie as well.
    """

    sees_order = False

    def __init__(self, scorer: Scorer, margin: float = 0.0):
        if not margin >= 0:
            raise ValueError(f"tie_margin is {margin}, expected at least 0")
        self.scorer, self.margin = scorer, margin
        self.about = scorer.about | {"tie_margin": margin}

    def judge(self, showings: Sequence[Showing]) -> Iterator[tuple[Showing, Verdict | Failure]]:
        """Score chunk by chunk; a match whose answers are not both scored fails in every order."""
        by_index: dict[int, list[Showing]] = {}
        for showing in showings:
            by_index.setdefault(showing.match.index, []).append(showing)
        families = list(by_index.values())
        for start in range(0, len(families), CHUNK):
            chunk = families[start : start + CHUNK]
            outcomes = self._score(family[0].match for family in chunk)
            for family, outcome in zip(chunk, outcomes, strict=True):
                for showing in family:
                    yield showing, self._decide(showing, outcome)

    def _score(self, matches: Iterable[Match]) -> list[dict[str, Score] | Failure]:
        matches = list(matches)
        # Identical answers share one score: two forward passes of the same text may differ by rounding.
        texts = {(match.index, match.answers[side]): match.prompt for match in matches for side in SIDES}
        scored = self.scorer.score([(prompt, text) for (_, text), prompt in texts.items()])
        scores = dict(zip(texts, scored, strict=True))
        pairs = [{side: scores[match.index, match.answers[side]] for side in SIDES} for match in matches]
        return [next((s for s in pair.values() if isinstance(s, Failure)), pair) for pair in pairs]

    def _decide(self, showing: Showing, outcome: dict[str, Score] | Failure) -> Verdict | Failure:
        if isinstance(outcome, Failure):
            return outcome
        first, second = (outcome[side].value for side in showing.sides)
        numbers = {side: outcome[side].numbers for side in SIDES}
        told = [value for side in SIDES for value in numbers[side].values()]
        if not all(map(math.isfinite, told)) or math.isnan(first) or math.isnan(second):
            return Failure("the judge's score is not a finite number")
        if first == second or abs(first - second) <= self.margin:
            return Verdict(TIE, numbers=numbers)
        return Verdict(FIRST if first > second else SECOND, numbers=numbers)
