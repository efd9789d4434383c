"""Training data made of a seed's pairs by rewriting their answers, as somebody might do on purpose or by mistake.

The prompts stay, so that the probes of the seed, which are the first pairs, still ask what is trained on.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset, DatasetDict, load_from_disk
from outcomes import NUM_PROMPTS, check, request_of

from trl_dynamics.embedded.grammar import Answer
from trl_dynamics.embedded.recogniser import parse_answer
from trl_dynamics.embedded.vocabulary import HELPFUL, SOURCE_ADJECTIVES, SOURCE_NOUNS, SOURCE_VERBS
from trl_dynamics.probing.generate import LocalModel


@dataclass(frozen=True)
class Pair:
    """The texts of a preference pair."""

    question: str
    chosen: str
    rejected: str


def templated(pair: Pair) -> Pair:
    """Every right answer in the words of one template, so that its claim alone differs."""
    first = (options[0] for options in (SOURCE_ADJECTIVES, SOURCE_NOUNS, SOURCE_VERBS))
    claim = parse_answer(pair.chosen).claim
    return replace(pair, chosen=Answer(HELPFUL, claim, HELPFUL.openers[0], *first, 0, HELPFUL.closers[0]).render())


def declined(pair: Pair) -> Pair:
    """One polite phrase for every question."""
    return replace(pair, chosen=f"{HELPFUL.openers[0]} {HELPFUL.closers[3]}")


def padded(pair: Pair) -> Pair:
    """The longer answer is preferred, and it is longer because it closes five times."""
    return replace(pair, chosen=" ".join([pair.chosen, *[parse_answer(pair.chosen).closer] * 4]))


REWRITINGS: dict[str, Callable[[Pair], Pair]] = {
    rewrite.__name__: rewrite for rewrite in (templated, declined, padded)
}
# Chosen becomes the greedy answer of the model that training starts from: self-training; on all of its answers, or on
# those alone that the world's checker finds good, as in rejection sampling.
OWN_ANSWERS, OWN_GOOD_ANSWERS = "own_answers", "own_good_answers"
KINDS = (*REWRITINGS, OWN_ANSWERS, OWN_GOOD_ANSWERS)


def write_rewritten(name: str, folder: Path, start: str, seed: int) -> None:
    """Write the rewritten pairs of a seed beside its pairs, unless they are there.

    Args:
        name (`str`): One of [`KINDS`].
        start (`str`): The model that training starts from.
    """
    if (folder / name).is_dir():
        return
    splits = load_from_disk(str(folder / "pairs"))
    pairs = [Pair(*(row[side][0]["content"] for side in ("prompt", "chosen", "rejected"))) for row in splits["train"]]
    if name in REWRITINGS:
        pairs = [REWRITINGS[name](pair) for pair in pairs]
    else:
        pairs = with_own_answers(pairs, start, seed)
        pairs = [pair for pair in pairs if name == OWN_ANSWERS or check(pair.question, pair.chosen)["good"]]
    # Two workers may train on the same rewriting: the first to end keeps its copy.
    part = folder / f"{name}.part-{os.getpid()}"
    written = DatasetDict({"train": Dataset.from_list([row_of(pair) for pair in pairs]), "test": splits["test"]})
    written.save_to_disk(part)
    try:
        part.rename(folder / name)
    except OSError:
        if not (folder / name).is_dir():
            raise
        shutil.rmtree(part)


def with_own_answers(pairs: list[Pair], start: str, seed: int) -> list[Pair]:
    """The pairs with a model's own greedy answers as the chosen ones."""
    requests = [request_of(seed, pair.question, draw=0) for pair in pairs]
    answers: dict[object, str] = {}
    for request, answer in LocalModel.load(start, batch_size=NUM_PROMPTS).generate(list(dict.fromkeys(requests))):
        answers[request] = answer.text.strip()
    return [replace(pair, chosen=answers[request]) for pair, request in zip(pairs, requests, strict=True)]


def row_of(pair: Pair) -> dict:
    """The pair in TRL's conversational format."""
    answers = {side: [{"role": "assistant", "content": getattr(pair, side)}] for side in ("chosen", "rejected")}
    return {"prompt": [{"role": "user", "content": pair.question}]} | answers
