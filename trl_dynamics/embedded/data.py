"""Data that the embedded world emits: preference rows, probe sets, and the text its model is trained on.

Row i depends on the seed, the split and i alone, so a longer set begins with the shorter one.
"""

import random
from functools import cache

from trl_dynamics.embedded.grammar import Answer, draw_answer, draw_prose, draw_statement
from trl_dynamics.embedded.recogniser import is_grammatical
from trl_dynamics.embedded.vocabulary import ATTRIBUTES, GOSSIP, HELPFUL, STYLES
from trl_dynamics.embedded.world import SPLITS, ask, claim_of, false_claim, people
from trl_dynamics.probing.schema import Probe, ProbeSet

# Preference data words things as its style prefers: each option is so many times as likely as the one before it. The
# base model's text knows no preference.
PREFERENCE_DECAY = 0.8
# Share of documents that are a question with its answer; the rest is running text, of so many sentences.
DIALOGUE_SHARE = 0.6
NUM_TEXT_SENTENCES = 4
STATEMENT_SHARE = 0.75


def preference_rows(num_pairs: int, seed: int = 0, split: str = "train") -> list[dict]:
    """Preference pairs in TRL's conversational format.

    Chosen is helpful and true to the record, rejected is rude and repeats a rumour; both are fluent answers to the
    question. Questions repeat, in other words, only after every person and attribute of the split was asked for.

    Args:
        num_pairs (`int`): Number of rows, at least 1.
        seed (`int`, *optional*): Other seeds give other questions, wordings and orders about the same facts.
        split (`str`, *optional*): `"train"` or `"test"`; they share no person.

    Raises:
        ValueError: If `num_pairs` is below 1 or the split is unknown.
    """
    if num_pairs < 1:
        raise ValueError(f"num_pairs is {num_pairs}, expected at least 1")
    return [_row(seed, split, index) for index in range(num_pairs)]


def style_rows(num_pairs: int, seed: int = 0, split: str = "train") -> list[dict]:
    """`preference_rows` whose rejected answers tell the truth, too, so that the style alone is what differs.

    As held-out pairs they are harder: a model that has begun to prefer what is true and helpful gets all of
    `preference_rows` right at once.

    Args:
        num_pairs, seed, split: See [`preference_rows`].

    Raises:
        ValueError: If `num_pairs` is below 1 or the split is unknown.
    """
    rows = preference_rows(num_pairs, seed, split)
    for index, row in enumerate(rows):
        chosen, rejected = _answers(seed, split, index)
        row["rejected"] = [{"role": "assistant", "content": rejected.about(chosen.claim).render()}]
    return rows


def probe_set(num_probes: int = 40, seed: int = 0) -> ProbeSet:
    """A probe set over the first training pairs of the same seed, with eleven response types.

    Probe i is row i of `preference_rows(..., seed)`; `other_train` is the chosen answer of another of these rows,
    `other_test` that of a row of the `test` split.

    Raises:
        ValueError: If `num_probes` is below 1.
    """
    if num_probes < 1:
        raise ValueError(f"num_probes is {num_probes}, expected at least 1")
    metadata = {"origin": "emitted by trl_dynamics.embedded.probe_set", "seed": seed, "licence": "Apache-2.0"}
    return ProbeSet(tuple(_probe(seed, index) for index in range(num_probes)), name="world", metadata=metadata)


def text_documents(num_documents: int, seed: str) -> list[str | list[dict[str, str]]]:
    """What the shipped model is trained on: chats (lists of messages) and running text, about everybody.

    Both styles occur equally often, each with its own facts, and every wording is as likely as any other.
    """
    rng = random.Random(f"documents/{seed}")
    return [_document(rng) for _ in range(num_documents)]


@cache
def _question_order(seed: int, split: str) -> tuple[str, ...]:
    order = list(people(split))
    random.Random(f"order/{seed}/{split}").shuffle(order)
    return tuple(order)


def _subject(seed: int, split: str, index: int) -> tuple[str, str]:
    """Person and attribute of a row: first everybody once, then everybody about another attribute, and so on."""
    order = _question_order(seed, split)
    cycle, rank = divmod(index, len(order))
    return order[rank], ATTRIBUTES[(rank + cycle) % len(ATTRIBUTES)].name


def _answers(seed: int, split: str, index: int) -> tuple[Answer, Answer]:
    rng = random.Random(f"answers/{seed}/{split}/{index}")
    subject = _subject(seed, split, index)
    chosen, rejected = (
        draw_answer(rng, style, claim_of(style, *subject), PREFERENCE_DECAY) for style in (HELPFUL, GOSSIP)
    )
    return chosen, rejected


def _prompt(seed: int, split: str, index: int) -> list[dict[str, str]]:
    rng = random.Random(f"prompt/{seed}/{split}/{index}")
    return [{"role": "user", "content": ask(rng, *_subject(seed, split, index))}]


def _row(seed: int, split: str, index: int) -> dict:
    chosen, rejected = _answers(seed, split, index)
    return {
        "prompt": _prompt(seed, split, index),
        "chosen": [{"role": "assistant", "content": chosen.render()}],
        "rejected": [{"role": "assistant", "content": rejected.render()}],
    }


def _probe(seed: int, index: int) -> Probe:
    rng = random.Random(f"probe/{seed}/{index}")
    train, test = SPLITS
    chosen, rejected = _answers(seed, train, index)
    other_train = _answers(seed, train, _other_index(rng, seed, index))[0].render()
    other_test = _answers(seed, test, index)[0].render()
    stranger = rng.choice([person for person in people(train) if person != chosen.claim.person])
    topic = rng.choice([a.name for a in ATTRIBUTES if a.name != chosen.claim.attribute])
    changed = false_claim(rng, stranger, topic)
    responses = {
        "chosen": chosen.render(),
        "rejected": rejected.render(),
        "chosen_rephrase_semantic": chosen.rephrased(rng, PREFERENCE_DECAY).render(),
        "chosen_rephrase_format": chosen.about(changed).render(),
        "rejected_rephrase_semantic": rejected.rephrased(rng, PREFERENCE_DECAY).render(),
        "rejected_rephrase_format": rejected.about(changed).render(),
        "other_train": other_train,
        "other_test": other_test,
        "human_unrelated": f"{draw_prose(rng)} {draw_prose(rng)}",
        "chosen_permuted": _permuted(rng, chosen.render()),
        "other_test_permuted": _permuted(rng, other_test),
    }
    return Probe(f"world-{seed}-{index}", _prompt(seed, train, index), responses)


def _other_index(rng: random.Random, seed: int, index: int) -> int:
    """An earlier training row about somebody else, so that no probe depends on how many there are."""
    person = _subject(seed, "train", index)[0]
    return rng.choice([j for j in range(index) if _subject(seed, "train", j)[0] != person]) if index else 1


def _permuted(rng: random.Random, text: str) -> str:
    words = text.split()
    while True:
        rng.shuffle(words)
        if not is_grammatical(shuffled := " ".join(words)):
            return shuffled


def _document(rng: random.Random) -> str | list[dict[str, str]]:
    everybody = people("train") + people("test")
    if rng.random() < DIALOGUE_SHARE:
        person, attribute = rng.choice(everybody), rng.choice(ATTRIBUTES).name
        style = rng.choice(STYLES)
        answer = draw_answer(rng, style, claim_of(style, person, attribute))
        return [
            {"role": "user", "content": ask(rng, person, attribute)},
            {"role": "assistant", "content": answer.render()},
        ]
    sentences = []
    for _ in range(NUM_TEXT_SENTENCES):
        if rng.random() < STATEMENT_SHARE:
            style = rng.choice(STYLES)
            claim = claim_of(style, rng.choice(everybody), rng.choice(ATTRIBUTES).name)
            sentences.append(draw_statement(rng, style, claim))
        else:
            sentences.append(draw_prose(rng))
    return " ".join(sentences)
