"""The grammar of the embedded world: questions, answers, statements and prose, rendered and recognised.

answer     OPENER The village records show that CLAUSE. CLOSER        (either style)
question   [GREETING] direct question | request | check of a clause
text       statements "The village records show that CLAUSE." and prose sentences, in any number
"""

import random
import re
from dataclasses import dataclass, replace
from functools import cache

from trl_dynamics.embedded.vocabulary import (
    ATTRIBUTE_BY_NAME,
    ATTRIBUTES,
    CHECKS,
    GREETINGS,
    PEOPLE,
    PROSE_ADJECTIVES,
    PROSE_MOVES,
    PROSE_PLACES,
    PROSE_PREPOSITIONS,
    PROSE_STATES,
    PROSE_THINGS,
    PROSE_TIMES,
    REQUESTS,
    STYLES,
    Style,
)


@dataclass(frozen=True)
class Claim:
    """What is said of whom: the meaning of a clause."""

    person: str
    attribute: str
    value: str


@dataclass(frozen=True)
class Statement:
    """A claim in words: the index of its clause form, and its source `determiner adjective noun verb`."""

    claim: Claim
    style: str
    adjective: str
    noun: str
    verb: str
    form: int

    def render(self) -> str:
        """The sentence."""
        determiner = style_named(self.style).determiner
        return f"{determiner} {self.adjective} {self.noun} {self.verb} that {render_clause(self.claim, self.form)}."


@dataclass(frozen=True)
class Answer:
    """A statement between an opener and a closer of its style."""

    statement: Statement
    opener: str
    closer: str

    @property
    def style(self) -> str:
        return self.statement.style

    @property
    def claim(self) -> Claim:
        return self.statement.claim

    def render(self) -> str:
        """The text."""
        return f"{self.opener} {self.statement.render()} {self.closer}"

    def rephrased(self, rng: random.Random) -> "Answer":
        """The same claim in the same style with every other choice made differently."""
        style, old = style_named(self.style), self.statement
        forms = range(len(ATTRIBUTE_BY_NAME[self.claim.attribute].clauses))
        statement = Statement(
            self.claim,
            self.style,
            _other(rng, style.adjectives, old.adjective),
            _other(rng, style.nouns, old.noun),
            _other(rng, style.verbs, old.verb),
            _other(rng, forms, old.form),
        )
        return Answer(statement, _other(rng, style.openers, self.opener), _other(rng, style.closers, self.closer))

    def about(self, claim: Claim) -> "Answer":
        """The same opener, source, clause number and closer with another claim in it."""
        return replace(self, statement=replace(self.statement, claim=claim))


def style_named(name: str) -> Style:
    """The style of this name."""
    return {style.name: style for style in STYLES}[name]


def render_clause(claim: Claim, form: int) -> str:
    """A claim as a clause without a full stop."""
    return ATTRIBUTE_BY_NAME[claim.attribute].clauses[form].format(person=claim.person, value=claim.value)


def draw_statement(rng: random.Random, style: Style, claim: Claim) -> Statement:
    """A statement of `claim`, every choice uniform."""
    form = rng.randrange(len(ATTRIBUTE_BY_NAME[claim.attribute].clauses))
    source = rng.choice(style.adjectives), rng.choice(style.nouns), rng.choice(style.verbs)
    return Statement(claim, style.name, *source, form)


def draw_answer(rng: random.Random, style: Style, claim: Claim) -> Answer:
    """An answer that says `claim`, every choice uniform."""
    return Answer(draw_statement(rng, style, claim), rng.choice(style.openers), rng.choice(style.closers))


def draw_question(rng: random.Random, person: str, attribute: str, heard: str) -> str:
    """A question about an attribute of a person: direct, a request, or whether `heard` is the value; equally often."""
    wording = ATTRIBUTE_BY_NAME[attribute]
    kind = rng.choice(("direct", "request", "check"))
    if kind == "direct":
        question = rng.choice(wording.questions).format(person=person)
    elif kind == "request":
        question = rng.choice(REQUESTS).format(indirect=wording.indirect.format(person=person))
    else:
        form = rng.randrange(len(wording.clauses))
        question = rng.choice(CHECKS).format(clause=render_clause(Claim(person, attribute, heard), form))
    return f"{rng.choice(GREETINGS)} {question}" if rng.random() < 0.5 else question


def draw_prose(rng: random.Random) -> str:
    """One sentence that speaks of nobody."""
    thing = f"{rng.choice(PROSE_ADJECTIVES)} {rng.choice(PROSE_THINGS)}"
    place = f"{rng.choice(PROSE_STATES)} {rng.choice(PROSE_PLACES)}"
    way = f"{rng.choice(PROSE_MOVES)} {rng.choice(PROSE_PREPOSITIONS)}"
    return f"The {thing} {way} the {place} {rng.choice(PROSE_TIMES)}."


def parse_answer(text: str) -> Answer | None:
    """The answer that `text` is, or None."""
    for style, pattern in _answer_patterns().items():
        match = pattern.fullmatch(text)
        clause = _parse_clause(match["clause"]) if match else None
        if clause:
            statement = Statement(clause[0], style, match["adjective"], match["noun"], match["verb"], clause[1])
            return Answer(statement, match["opener"], match["closer"])
    return None


def parse_question(text: str) -> tuple[str, str] | None:
    """The person and the attribute that a question asks for, or None."""
    for attribute, pattern in _question_patterns().items():
        match = pattern.fullmatch(text)
        if match:
            return next(person for person in match.groups() if person), attribute
    return None


def is_grammatical(text: str) -> bool:
    """Whether the whole text is an answer, a question, or statements and prose of the world; truth does not matter."""
    return bool(parse_answer(text) or parse_question(text) or _text_pattern().fullmatch(text))


def _other(rng: random.Random, options, current):
    return rng.choice([option for option in options if option != current])


def _any(options) -> str:
    return "|".join(re.escape(option) for option in options)


@cache
def _clause_patterns() -> dict[tuple[str, int], re.Pattern]:
    return {
        (attribute.name, form): re.compile(
            clause.format(person=f"(?P<person>{_any(PEOPLE)})", value=f"(?P<value>{_any(attribute.values)})")
        )
        for attribute in ATTRIBUTES
        for form, clause in enumerate(attribute.clauses)
    }


def _parse_clause(text: str) -> tuple[Claim, int] | None:
    for (attribute, form), pattern in _clause_patterns().items():
        match = pattern.fullmatch(text)
        if match:
            return Claim(match["person"], attribute, match["value"]), form
    return None


@cache
def _answer_patterns() -> dict[str, re.Pattern]:
    return {
        style.name: re.compile(
            f"(?P<opener>{_any(style.openers)}) {style.determiner} (?P<adjective>{_any(style.adjectives)}) "
            f"(?P<noun>{_any(style.nouns)}) (?P<verb>{_any(style.verbs)}) that (?P<clause>[^.]+)\\. "
            f"(?P<closer>{_any(style.closers)})"
        )
        for style in STYLES
    }


@cache
def _question_patterns() -> dict[str, re.Pattern]:
    person = f"({_any(PEOPLE)})"
    patterns = {}
    for attribute in ATTRIBUTES:
        heard = [c.format(person=person, value=f"(?:{_any(attribute.values)})") for c in attribute.clauses]
        forms = [re.escape(q).replace(r"\{person\}", person) for q in attribute.questions]
        indirect = attribute.indirect.format(person=person)
        forms += [re.escape(request).replace(r"\{indirect\}", indirect) for request in REQUESTS]
        forms += [re.escape(check).replace(r"\{clause\}", f"(?:{'|'.join(heard)})") for check in CHECKS]
        patterns[attribute.name] = re.compile(f"(?:(?:{_any(GREETINGS)}) )?(?:{'|'.join(forms)})")
    return patterns


@cache
def _text_pattern() -> re.Pattern:
    sources = "|".join(
        f"{s.determiner} (?:{_any(s.adjectives)}) (?:{_any(s.nouns)}) (?:{_any(s.verbs)})" for s in STYLES
    )
    clauses = "|".join(
        clause.format(person=f"(?:{_any(PEOPLE)})", value=f"(?:{_any(attribute.values)})")
        for attribute in ATTRIBUTES
        for clause in attribute.clauses
    )
    prose = " ".join(
        (
            f"The (?:{_any(PROSE_ADJECTIVES)}) (?:{_any(PROSE_THINGS)}) (?:{_any(PROSE_MOVES)})",
            f"(?:{_any(PROSE_PREPOSITIONS)}) the (?:{_any(PROSE_STATES)}) (?:{_any(PROSE_PLACES)}) (?:{_any(PROSE_TIMES)})",
        )
    )
    sentence = f"(?:(?:{sources}) that (?:{clauses})|{prose})\\."
    return re.compile(f"{sentence}(?: {sentence})*")
