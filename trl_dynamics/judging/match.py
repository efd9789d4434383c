"""What is judged: two answers to a prompt, in both orders; and what may come of it."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from trl_dynamics.probing.generate import Failure
from trl_dynamics.probing.schema import Prompt

SIDES = ("A", "B")
FIRST, SECOND, TIE, UNPARSABLE = "first", "second", "tie", "unparsable"


@dataclass(frozen=True)
class Match:
    """One prompt with the answers of both sides; `index` is the prompt's number."""

    index: int
    prompt: Prompt
    answers: Mapping[str, str]

    @property
    def is_identical(self) -> bool:
        return self.answers["A"] == self.answers["B"]


@dataclass(frozen=True)
class Showing:
    """A match in one order: the answer of side `leader` is shown first."""

    match: Match
    leader: str

    @property
    def sides(self) -> tuple[str, str]:
        return (self.leader, "B" if self.leader == "A" else "A")

    @property
    def texts(self) -> tuple[str, str]:
        first, second = self.sides
        return self.match.answers[first], self.match.answers[second]

    @property
    def key(self) -> str:
        """SHA-256 of all that a judge sees, and of who is shown first."""
        content = json.dumps([self.match.prompt, *self.texts, self.leader], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class Verdict:
    """What a judge decided on a showing.

    Args:
        choice (`str`): `"first"`, `"second"`, `"tie"` or `"unparsable"`.
        said (`str`, *optional*): The judge's words.
        numbers (`Mapping[str, Mapping[str, float]]`, *optional*): Of a judge that scores, by side and name.
    """

    choice: str
    said: str = ""
    numbers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class Judge(Protocol):
    """Something that decides between answers.

    `about` is all that its verdicts depend on; `sees_order` says whether the order can count at all; `judge` yields
    each showing with its verdict as soon as there is one, in any order.
    """

    about: dict
    sees_order: bool

    def judge(self, showings: Sequence[Showing]) -> Iterator[tuple[Showing, Verdict | Failure]]: ...


def both_orders(matches: Sequence[Match]) -> list[Showing]:
    """Every match with A's answer first, and with B's."""
    return [Showing(match, leader) for match in matches for leader in SIDES]


def prompt_text(prompt: Prompt) -> str:
    """A prompt as text: a chat of one message is that message, a longer one has its roles in front of its turns."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)
