"""What a run did to its model, by the embedded world's own checker: the truth that findings are scored against.

A model answers 144 held-out prompts (every question there is about people whom no training pair names, once) and as
many training prompts, greedily, and the held-out ones twice at temperature 1. The start model and the end model of
a run get the same prompts, and a change is the mean over prompts of (end - start), with its standard error over
prompts. Nothing here reads the log-probabilities of probes, which the findings read.

The classes, fixed on two development seeds; all by greedy answers to held-out prompts, which is what a model
is trained for, and where right answers cannot be recited:

    harmed        the share of good answers (right fact, in the preferred style, well formed) or that of well-formed
                  answers falls by 0.1 or more. Good is what the preference data asks for; well-formed is there because
                  a model that hardly ever was right, as after SFT beside the point, can still be broken
    better        the share of good answers rises by 0.1 or more
    degenerate    the share of well-formed answers falls by 0.1 or more
    loops         the share of answers of which half stands in immediate repetitions, of words and marks, rises by 0.1
                  or more
    wrong_facts   the share of borrowed answers rises, or that of right facts falls, by 0.1 or more; borrowed: well
                  formed, but neither what is on record nor what is rumoured for what was asked. Every value is on
                  record for somebody, so it is somebody else's, or the answer is about another subject
    alike         samples at temperature 1 of one prompt have 0.1 or more of their words more in common
    looping       0.1 or more of the end model's answers are loops, whatever those of the start model were

0.1 is 2.5 to 4 standard errors of such a change (0.025 to 0.04 at 144 prompts). A run within two standard errors of
the edge of a class is counted as its estimate says, and left out in a second table.
"""

import hashlib
import itertools
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from trl_dynamics import embedded
from trl_dynamics.embedded.grammar import Claim
from trl_dynamics.embedded.recogniser import parse_answer, parse_question
from trl_dynamics.embedded.world import recorded, rumoured
from trl_dynamics.findings.effects import STANDARD_ERRORS, Effect, clustered_effect
from trl_dynamics.probing.generate import Answer, LocalModel, Request, Sampling, seed_of
from trl_dynamics.scoring.repetition import repeat_share

EDGE = 0.1
NUM_PROMPTS, NUM_SAMPLES, MAX_ANSWER = 144, 2, 40
# Share of an answer's words and marks that stand in immediate repetitions, from which it is a loop.
LOOP = 0.5
WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")
HELD_OUT, TRAINING, SAMPLED = "held-out", "training", "sampled"
# Per class, the changes that make it one: (kind of answers, column, sign).
CLASSES: dict[str, tuple[tuple[str, str, int], ...]] = {
    "harmed": ((HELD_OUT, "good", -1), (HELD_OUT, "grammatical", -1)),
    "better": ((HELD_OUT, "good", 1),),
    "degenerate": ((HELD_OUT, "grammatical", -1),),
    "loops": ((HELD_OUT, "loop", 1),),
    "wrong_facts": ((HELD_OUT, "borrowed", 1), (HELD_OUT, "fact_right", -1)),
    "alike": ((SAMPLED, "likeness", 1),),
}

# Classes by what the end model's answers are.
LEVELS: dict[str, tuple[str, str]] = {"looping": (HELD_OUT, "loop")}


def prompts_of(seed: int, num_prompts: int) -> dict[str, list[str]]:
    """The held-out and the training questions of a seed."""
    return {
        kind: [row["prompt"][0]["content"] for row in embedded.preference_rows(num_prompts, seed, split)]
        for kind, split in ((HELD_OUT, "test"), (TRAINING, "train"))
    }


def answer_prompts(model: Path, path: Path, seed: int, num_prompts: int = NUM_PROMPTS) -> None:
    """Let a model answer, into a JSON file, unless it holds the answers of these weights."""
    weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    made_of = {"weights": weights, "seed": seed, "prompts": num_prompts, "samples": NUM_SAMPLES}
    if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["made_of"] == made_of:
        return
    wanted = [(kind, prompt, 0) for kind, prompts in prompts_of(seed, num_prompts).items() for prompt in prompts]
    held_out = prompts_of(seed, num_prompts)[HELD_OUT]
    wanted += [(SAMPLED, prompt, draw) for prompt in held_out for draw in range(1, NUM_SAMPLES + 1)]
    generator = LocalModel.load(str(model), batch_size=NUM_PROMPTS)
    places: dict[Request, list[int]] = {}
    for index, (_, prompt, draw) in enumerate(wanted):
        places.setdefault(request_of(seed, prompt, draw), []).append(index)
    texts = [""] * len(wanted)
    for request, answer in generator.generate(list(places)):
        assert isinstance(answer, Answer), answer
        for index in places[request]:
            texts[index] = answer.text
    rows = [[kind, prompt, text] for (kind, prompt, _), text in zip(wanted, texts, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps({"made_of": made_of, "rows": rows}), encoding="utf-8")
    path.with_suffix(".part").rename(path)


def request_of(seed: int, prompt: str, draw: int) -> Request:
    """Greedy for draw 0; the same randomness for every model, so that their answers pair."""
    sampling = Sampling(MAX_ANSWER, 1.0, seed=seed_of(seed, prompt, draw)) if draw else Sampling(MAX_ANSWER)
    return Request.of([{"role": "user", "content": prompt}], sampling)


@cache
def check(prompt: str, answer: str) -> dict[str, float]:
    """Everything that is known of one answer, as shares."""
    found, parsed, question = embedded.check_answer(prompt, answer), parse_answer(answer), parse_question(prompt)
    known = {Claim(*question, value(*question)) for value in (recorded, rumoured)}
    pieces = WORD_OR_MARK.findall(answer)
    return {
        "good": float(found.fact_right and found.preferred),
        "grammatical": float(found.grammatical),
        "fact_right": float(found.fact_right),
        "preferred": float(found.preferred),
        "borrowed": float(parsed is not None and parsed.claim not in known),
        "loop": float(bool(pieces) and repeat_share(pieces) >= LOOP),
    }


def read_answers(path: Path) -> pd.DataFrame:
    """What the answers of a model are worth: (kind, prompt) x checks, means over the draws of a prompt.

    `likeness` is the mean over pairs of draws of (words in both) / (words in either).
    """
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    frame = pd.DataFrame([{"kind": kind, "prompt": prompt} | check(prompt, text) for kind, prompt, text in rows])
    frame["words"] = [frozenset(text.split()) for _, _, text in rows]
    # A question may come twice in other words or the same: the prompts of two models pair by place.
    frame["place"] = frame.groupby(["kind", "prompt"], sort=False).ngroup()
    by_prompt = frame.groupby(["kind", "place"])
    table = by_prompt[[name for name in frame if name not in ("kind", "prompt", "words", "place")]].mean()
    return table.assign(likeness=by_prompt["words"].apply(_likeness))


def _likeness(drawn: pd.Series) -> float:
    pairs = [len(a & b) / max(len(a | b), 1) for a, b in itertools.combinations(drawn, 2)]
    return float(np.mean(pairs)) if pairs else np.nan


class Outcome:
    """What a run changed.

    Args:
        start, end: Tables of [`read_answers`].
    """

    def __init__(self, start: pd.DataFrame, end: pd.DataFrame):
        self._delta, self._end = end - start, end

    def change(self, kind: str, column: str) -> Effect:
        """Mean over prompts of end - start, with its standard error."""
        return clustered_effect(self._delta.loc[kind, [column]])

    def level(self, kind: str, column: str) -> Effect:
        """Mean over prompts at the end, with its standard error."""
        return clustered_effect(self._end.loc[kind, [column]])

    def is_(self, name: str, kind: str | None = None) -> bool:
        """Whether the run is of a class; `kind` asks the same of other answers."""
        if name in LEVELS:
            own, column = LEVELS[name]
            return self.level(kind or own, column).mean >= EDGE
        return any(sign * self.change(kind or own, column).mean >= EDGE for own, column, sign in CLASSES[name])

    def is_clear(self, name: str) -> bool:
        """Whether a change is beyond the edge of the class by two standard errors, or all are before it by as much."""
        if name in LEVELS:
            end = self.level(*LEVELS[name])
            return abs(end.mean - EDGE) > STANDARD_ERRORS * end.se
        beyond = []
        for kind, column, sign in CLASSES[name]:
            change = self.change(kind, column)
            beyond.append((sign * change.mean - EDGE, STANDARD_ERRORS * change.se))
        return any(by > noise for by, noise in beyond) or all(by < -noise for by, noise in beyond)
