"""The grammar of the embedded world, recognised: text back to what it says, exactly as [`grammar`] renders it."""

import re
from collections.abc import Iterable
from functools import cache

from trl_dynamics.embedded.grammar import Answer, Claim
from trl_dynamics.embedded.vocabulary import (
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
    SOURCE_ADJECTIVES,
    SOURCE_NOUNS,
    SOURCE_VERBS,
    STYLES,
    Attribute,
)


def parse_answer(text: str) -> Answer | None:
    """The answer that `text` is, or None."""
    for style in STYLES:
        match = _answer_pattern(style.openers, style.closers).fullmatch(text)
        parsed = parse_clause(match["clause"]) if match else None
        if parsed:
            claim, form = parsed
            return Answer(
                style, claim, match["opener"], match["adjective"], match["noun"], match["verb"], form, match["closer"]
            )
    return None


def parse_clause(text: str) -> tuple[Claim, int] | None:
    """The claim that a clause makes and the number of its form, or None."""
    for attribute in ATTRIBUTES:
        for form, pattern in enumerate(_clause_patterns(attribute)):
            match = pattern.fullmatch(text)
            if match:
                return Claim(match["person"], attribute.name, match["value"]), form
    return None


def parse_question(text: str) -> tuple[str, str] | None:
    """The person and the attribute that a question asks for, or None."""
    for attribute in ATTRIBUTES:
        match = _question_pattern(attribute).fullmatch(text)
        if match:
            return next(person for person in match.groups() if person), attribute.name
    return None


def is_grammatical(text: str) -> bool:
    """Whether the whole text is an answer, a question, or statements and prose of the world; truth does not matter."""
    return bool(parse_answer(text) or parse_question(text) or _text_pattern().fullmatch(text))


def _one_of(options: Iterable[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, options))})"


@cache
def _clause_patterns(attribute: Attribute) -> tuple[re.Pattern, ...]:
    slots = {"person": f"(?P<person>{_one_of(PEOPLE)})", "value": f"(?P<value>{_one_of(attribute.values)})"}
    return tuple(re.compile(clause.format(**slots)) for clause in attribute.clauses)


@cache
def _answer_pattern(openers: tuple[str, ...], closers: tuple[str, ...]) -> re.Pattern:
    return re.compile(
        f"(?P<opener>{_one_of(openers)}) The (?P<adjective>{_one_of(SOURCE_ADJECTIVES)}) "
        f"(?P<noun>{_one_of(SOURCE_NOUNS)}) (?P<verb>{_one_of(SOURCE_VERBS)}) that (?P<clause>[^.]+)\\. "
        f"(?P<closer>{_one_of(closers)})"
    )


@cache
def _question_pattern(attribute: Attribute) -> re.Pattern:
    person = f"({_one_of(PEOPLE)})"
    clauses = _any_clause([attribute], person)
    forms = [_filled(question, person=person) for question in attribute.questions]
    forms += [_filled(request, indirect=attribute.indirect.format(person=person)) for request in REQUESTS]
    forms += [_filled(check, clause=clauses) for check in CHECKS]
    return re.compile(f"(?:{_one_of(GREETINGS)} )?(?:{'|'.join(forms)})")


@cache
def _text_pattern() -> re.Pattern:
    statement = f"{_one_of(style.statement for style in STYLES)} {_any_clause(ATTRIBUTES, _one_of(PEOPLE))}"
    slots = (PROSE_ADJECTIVES, PROSE_THINGS, PROSE_MOVES, PROSE_PREPOSITIONS, PROSE_STATES, PROSE_PLACES, PROSE_TIMES)
    words = [_one_of(options) for options in slots]
    prose = " ".join(["The", *words[:4], "the", *words[4:]])
    sentence = f"(?:{statement}|{prose})\\."
    return re.compile(f"{sentence}(?: {sentence})*")


def _any_clause(attributes: Iterable[Attribute], person: str) -> str:
    clauses = [
        clause.format(person=person, value=_one_of(attribute.values))
        for attribute in attributes
        for clause in attribute.clauses
    ]
    return f"(?:{'|'.join(clauses)})"


def _filled(template: str, **slots: str) -> str:
    """A pattern that matches a template literally and its slots by the patterns given."""
    pattern = re.escape(template)
    for name, slot in slots.items():
        pattern = pattern.replace(re.escape(f"{{{name}}}"), slot)
    return pattern
