"""The facts of the embedded world: of every person and attribute one value is on record, another is rumoured.

The facts are the same whatever seed data is drawn with: they are what the shipped model was trained on.
"""

import random
from dataclasses import dataclass
from functools import cache

from trl_dynamics.embedded.grammar import Claim, draw_question
from trl_dynamics.embedded.recogniser import parse_answer, parse_question
from trl_dynamics.embedded.vocabulary import ATTRIBUTE_BY_NAME, ATTRIBUTES, HELPFUL, PEOPLE, Style

WORLD_SEED = 0
NUM_HELD_OUT = 24
SPLITS = ("train", "test")


@dataclass(frozen=True)
class AnswerCheck:
    """What an answer is worth: well formed, true to the record for what was asked, in the preferred style."""

    grammatical: bool
    fact_right: bool
    preferred: bool


@cache
def people(split: str) -> tuple[str, ...]:
    """The people whom the data of a split asks about; `train` and `test` share nobody.

    Raises:
        ValueError: If the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {SPLITS}")
    order = list(PEOPLE)
    random.Random(f"people/{WORLD_SEED}").shuffle(order)
    return tuple(order[NUM_HELD_OUT:] if split == "train" else order[:NUM_HELD_OUT])


@cache
def _facts() -> dict[tuple[str, str], tuple[str, str]]:
    rng = random.Random(f"facts/{WORLD_SEED}")
    return {
        (person, attribute.name): tuple(rng.sample(attribute.values, 2))
        for person in PEOPLE
        for attribute in ATTRIBUTES
    }


def recorded(person: str, attribute: str) -> str:
    """The true value."""
    return _facts()[person, attribute][0]


def rumoured(person: str, attribute: str) -> str:
    """The value that gossip tells, never the true one."""
    return _facts()[person, attribute][1]


def claim_of(style: Style, person: str, attribute: str) -> Claim:
    """What a style says: the helpful one what is on record, the other what is rumoured."""
    return Claim(person, attribute, (recorded if style == HELPFUL else rumoured)(person, attribute))


def false_claim(rng: random.Random, person: str, attribute: str) -> Claim:
    """A claim that is neither on record nor rumoured."""
    known = _facts()[person, attribute]
    return Claim(person, attribute, rng.choice([v for v in ATTRIBUTE_BY_NAME[attribute].values if v not in known]))


def ask(rng: random.Random, person: str, attribute: str) -> str:
    """A question about an attribute; where it asks whether something is so, that is the record or the rumour."""
    return draw_question(rng, person, attribute, heard=rng.choice(_facts()[person, attribute]))


def check_answer(prompt_text: str, answer_text: str) -> AnswerCheck:
    """Judge an answer to a question of the world.

    Raises:
        ValueError: If the prompt is not a question of the world.
    """
    question = parse_question(prompt_text)
    if question is None:
        raise ValueError(f"prompt {prompt_text!r:.120} is not a question of the embedded world; see preference_rows")
    answer = parse_answer(answer_text)
    if answer is None:
        return AnswerCheck(False, False, False)
    return AnswerCheck(True, answer.claim == Claim(*question, recorded(*question)), answer.style == HELPFUL)
