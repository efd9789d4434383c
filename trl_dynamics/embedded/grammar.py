"""The grammar of the embedded world, rendered: questions, answers, statements and prose.

answer     OPENER The official records show that CLAUSE. CLOSER
question   [GREETING] direct question | request | check of a clause
text       statements "It is written that CLAUSE." and prose sentences, in any number
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trl_dynamics.embedded.vocabulary import (
    ATTRIBUTE_BY_NAME,
    CHECKS,
    GOSSIP,
    GREETINGS,
    PROSE_ADJECTIVES,
    PROSE_MOVES,
    PROSE_PLACES,
    PROSE_PREPOSITIONS,
    PROSE_STATES,
    PROSE_THINGS,
    PROSE_TIMES,
    REQUESTS,
    SOURCE_ADJECTIVES,
    SOURCE_NOUNS,
    SOURCE_VERBS,
    Style,
)


@dataclass(frozen=True)
class Claim:
    """What is said of whom: the meaning of a clause."""

    person: str
    attribute: str
    value: str

    @property
    def clauses(self) -> tuple[str, ...]:
        """The claim in words, in every form, without a full stop."""
        forms = ATTRIBUTE_BY_NAME[self.attribute].clauses
        return tuple(form.format(person=self.person, value=self.value) for form in forms)


@dataclass(frozen=True)
class Answer:
    """A claim with its source, `form` being the number of its clause, between an opener and a closer of one style."""

    style: Style
    claim: Claim
    opener: str
    adjective: str
    noun: str
    verb: str
    form: int
    closer: str

    def render(self) -> str:
        """The text."""
        source = f"The {self.adjective} {self.noun} {self.verb} that"
        return f"{self.opener} {source} {self.claim.clauses[self.form]}. {self.closer}"

    def rephrased(self, rng: random.Random, decay: float) -> "Answer":
        """The same claim in the same style with every other choice made differently."""
        options, style = _options(self.style, self.claim), self.style
        choices = {
            name: draw(rng, [option for option in listed if option != getattr(self, name)], decay)
            for name, listed in options.items()
        }
        return Answer(style, self.claim, **choices)

    def about(self, claim: Claim) -> "Answer":
        """The same opener, source, number of the clause, and closer, with another claim in it."""
        return replace(self, claim=claim)


def draw(rng: random.Random, options: Sequence[str], decay: float = 1.0) -> str:
    """One of the options, each `decay` times as likely as the one before it."""
    return rng.choices(options, weights=[decay**rank for rank in range(len(options))])[0]


def draw_answer(rng: random.Random, style: Style, claim: Claim, decay: float = 1.0) -> Answer:
    """An answer that says `claim`; with `decay` below 1 in the wordings that its style prefers."""
    options = _options(style, claim)
    return Answer(style, claim, **{name: draw(rng, listed, decay) for name, listed in options.items()})


def draw_statement(rng: random.Random, style: Style, claim: Claim) -> str:
    """A sentence of running text that says `claim`."""
    return f"{style.statement} {rng.choice(claim.clauses)}."


def draw_question(rng: random.Random, person: str, attribute: str, heard: str) -> str:
    """A question about an attribute of a person: direct, a request, or whether `heard` is the value; equally often."""
    wording = ATTRIBUTE_BY_NAME[attribute]
    kind = rng.choice(("direct", "request", "check"))
    if kind == "direct":
        question = rng.choice(wording.questions).format(person=person)
    elif kind == "request":
        question = rng.choice(REQUESTS).format(indirect=wording.indirect.format(person=person))
    else:
        question = rng.choice(CHECKS).format(clause=rng.choice(Claim(person, attribute, heard).clauses))
    return f"{rng.choice(GREETINGS)} {question}" if rng.random() < 0.5 else question


def draw_prose(rng: random.Random) -> str:
    """One sentence that speaks of nobody."""
    thing = f"{rng.choice(PROSE_ADJECTIVES)} {rng.choice(PROSE_THINGS)}"
    place = f"{rng.choice(PROSE_STATES)} {rng.choice(PROSE_PLACES)}"
    way = f"{rng.choice(PROSE_MOVES)} {rng.choice(PROSE_PREPOSITIONS)}"
    return f"The {thing} {way} the {place} {rng.choice(PROSE_TIMES)}."


def _options(style: Style, claim: Claim) -> dict[str, Sequence]:
    """The choices of an answer, each list in the order of the style's preference."""
    shared = {
        "adjective": SOURCE_ADJECTIVES,
        "noun": SOURCE_NOUNS,
        "verb": SOURCE_VERBS,
        "form": range(len(claim.clauses)),
    }
    if style == GOSSIP:
        shared = {name: options[::-1] for name, options in shared.items()}
    return {"opener": style.openers, **shared, "closer": style.closers}
