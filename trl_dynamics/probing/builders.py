"""How each response type that needs no generator is made: one pure function per type, one dict entry.

A builder sees one pair and the material shared by all, and draws from a random generator that depends on the seed, the
type and the pair's content alone: not on the pair's position, nor on which process builds it. Definitions after the
probing data of "Learning Dynamics of LLM Finetuning" (arXiv 2407.10490, section 4).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from trl_dynamics.probing.rows import Pair

# How many draws a builder makes to get something else than what it must differ from.
MAX_DRAWS = 50


class CannotBuild(Exception):
    """A pair for which a response type does not exist; the message says why."""


@dataclass(frozen=True)
class Material:
    """What builders draw from besides the pair itself.

    Args:
        seed (`int`): Of every draw.
        train_answers (`Sequence[str]`): Chosen answers of the probed training pairs, distinct and sorted.
        held_out_answers (`Sequence[str]`): Chosen answers of held-out pairs, distinct and sorted.
        sentences (`Sequence[str]`, *optional*): Fluent, about nothing in particular; by default this package's.
        dictionary (`Sequence[str]`, *optional*): Words; by default this package's.
    """

    seed: int
    train_answers: Sequence[str] = ()
    held_out_answers: Sequence[str] = ()
    sentences: Sequence[str] = ()
    dictionary: Sequence[str] = ()


def chosen(pair: Pair, material: Material, rng: random.Random) -> str:
    """The pair's own."""
    return pair.chosen


def rejected(pair: Pair, material: Material, rng: random.Random) -> str:
    """The pair's own."""
    if pair.rejected is None:
        raise CannotBuild("the data has no rejected answers")
    return pair.rejected


def other_train(pair: Pair, material: Material, rng: random.Random) -> str:
    """The chosen answer of another probed training pair."""
    return _another(pair, material.train_answers, rng, "no other training pair has an answer of its own")


def other_test(pair: Pair, material: Material, rng: random.Random) -> str:
    """The chosen answer of a held-out pair."""
    return _another(pair, material.held_out_answers, rng, "there is no held-out answer")


def human_unrelated(pair: Pair, material: Material, rng: random.Random) -> str:
    """Whole sentences, about as many words in all as chosen has."""
    wanted = len(pair.chosen.split())
    sentences = list(material.sentences)
    rng.shuffle(sentences)
    text, num_words = [], 0
    for sentence in sentences * (1 + wanted // max(1, sum(len(s.split()) for s in sentences))):
        length = len(sentence.split())
        # A sentence more is kept where it brings the number of words nearer to chosen's.
        if text and abs(num_words + length - wanted) >= abs(num_words - wanted):
            break
        text.append(sentence)
        num_words += length
    return like(pair.chosen, " ".join(text))


def chosen_permuted(pair: Pair, material: Material, rng: random.Random) -> str:
    """The words of chosen in another order."""
    return like(pair.chosen, _permuted(pair.chosen, rng, "chosen"))


def other_test_permuted(pair: Pair, material: Material, rng: random.Random) -> str:
    """The words of this pair's other_test in another order."""
    source = build_one("other_test", pair, material)
    return like(pair.chosen, _permuted(source, rng, "other_test"))


def random_words(pair: Pair, material: Material, rng: random.Random) -> str:
    """Words of a dictionary, as many as chosen has."""
    return like(pair.chosen, " ".join(rng.choices(material.dictionary, k=len(pair.chosen.split()))))


Builder = Callable[[Pair, Material, random.Random], str]
BUILDERS: dict[str, Builder] = {
    builder.__name__: builder
    for builder in (
        chosen,
        rejected,
        other_train,
        other_test,
        human_unrelated,
        chosen_permuted,
        other_test_permuted,
        random_words,
    )
}
NEED_HELD_OUT = ("other_test", "other_test_permuted")


def build_one(response_type: str, pair: Pair, material: Material) -> str:
    """One response of one pair.

    Raises:
        CannotBuild: If the pair cannot have this type.
    """
    rng = random.Random(f"{material.seed}/{response_type}/{pair.key}")
    return BUILDERS[response_type](pair, material, rng)


@cache
def shipped_text(name: str) -> tuple[str, ...]:
    """Lines of a text file of this package: `"prose"` (fluent sentences) or `"words"` (a dictionary)."""
    text = files("trl_dynamics.probing").joinpath("text", f"{name}.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def _another(pair: Pair, answers: Sequence[str], rng: random.Random, otherwise: str) -> str:
    own = {text.strip() for text in (pair.chosen, pair.rejected) if text is not None}
    # Most draws succeed at once; the full search is for data in which nearly all answers are alike.
    for _ in range(MAX_DRAWS if answers else 0):
        if (answer := rng.choice(answers)) not in own:
            return like(pair.chosen, answer)
    others = [answer for answer in answers if answer not in own]
    if not others:
        raise CannotBuild(otherwise)
    return like(pair.chosen, rng.choice(others))


def has_permutation(text: str) -> bool:
    """Whether the words of a text have another order."""
    return len(set(text.split())) > 1


def _permuted(text: str, rng: random.Random, name: str) -> str:
    if not has_permutation(text):
        raise CannotBuild(f"{name} has no two different words to exchange")
    words = text.split()
    shuffled = list(words)
    while shuffled == words:
        rng.shuffle(shuffled)
    return " ".join(shuffled)


def like(model: str, text: str) -> str:
    """`text` behind the white space with which `model` begins, so that both meet the prompt alike."""
    return model[: len(model) - len(model.lstrip())] + text.strip()
