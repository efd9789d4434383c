"""Rephrases: what is asked for each response type, and where the answers come from, a generator or a file.

After the probing data of "Learning Dynamics of LLM Finetuning" (arXiv 2407.10490, section 4): a semantic rephrase
keeps the meaning in other words, a format rephrase keeps the form and changes the meaning.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from trl_dynamics.probing.cache import AnswerCache, Answers, answer_all
from trl_dynamics.probing.generate import Answer, Generator, Request, Sampling, seed_of
from trl_dynamics.probing.io import read_rows

SEMANTIC, FORMAT = "semantic", "format"
PLACEHOLDER = "{text}"
INSTRUCTIONS: dict[str, str] = {
    SEMANTIC: (
        "Say the following text in different words. Its meaning, its language and its length should stay as they are. "
        "Answer with the new text alone.\n\nText:\n{text}"
    ),
    FORMAT: (
        "Write a text that looks like the following one but says something entirely different: the same language, "
        "layout, kind of sentences and number of words, on another subject. Answer with the new text alone.\n\n"
        "Text:\n{text}"
    ),
}
# Behind the instruction for a model that only continues text, which also ends where it would begin the next task.
PLAIN_LEAD, PLAIN_STOPS = "\n\nNew text:\n", ("\n\nText:", "\n\nNew text:", "\n\n\n")
# Where the server does not take it out; one that was cut leaves no answer at all.
_REASONING = re.compile(r"^\s*<think>.*?(</think>|\Z)", re.DOTALL)
_LABEL = re.compile(
    r"^(here(?:'s| is)[^\n:]{0,80}|(?:the )?(?:new|rewritten|rephrased|reworded|paraphrased)(?: text| version)?):\s*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class RephraseType:
    """A response type made by rephrasing: what it rephrases, how, and whether the tracked model itself does it."""

    source: str
    kind: str
    by_itself: bool = False


REPHRASES: dict[str, RephraseType] = {
    "chosen_self_rephrase": RephraseType("chosen", SEMANTIC, by_itself=True),
    "chosen_rephrase_semantic": RephraseType("chosen", SEMANTIC),
    "chosen_rephrase_format": RephraseType("chosen", FORMAT),
    "rejected_rephrase_semantic": RephraseType("rejected", SEMANTIC),
    "rejected_rephrase_format": RephraseType("rejected", FORMAT),
}


@dataclass(frozen=True)
class Job:
    """One text to rephrase; `key` is its pair's, `attempt` counts from 0."""

    key: str
    response_type: str
    text: str
    attempt: int = 0

    @property
    def kind(self) -> str:
        return REPHRASES[self.response_type].kind


@dataclass
class Rephrased:
    """Answers and failures by job, what cannot be asked at all, and how many answers the cache had."""

    answers: dict[Job, Answer]
    failures: dict[Job, str]
    impossible: dict[Job, str] = field(default_factory=dict)
    num_cached: int = 0
    num_generated: int = 0


class Rephraser(Protocol):
    """Something that rephrases; `name` and `prompts` go into the set's card, `may_retry` is false where asking again
    gives the same answer."""

    name: str
    prompts: Mapping[str, str]
    may_retry: bool

    def rephrase(
        self, jobs: Sequence[Job], cache: AnswerCache, progress: Callable[[int, int], None] | None = None
    ) -> Rephrased: ...


class GeneratedRephraser:
    """Rephrases by a [`Generator`]: a local model or a server.

    Args:
        generator ([`Generator`]): A model that takes messages gets the instruction as the user's turn, any other
            continues it as text.
        sampling ([`Sampling`], *optional*): Its seed is that of the build; each job draws from a seed of its own.
        instructions (`Mapping[str, str]`, *optional*): Instead of [`INSTRUCTIONS`], by kind; each holds `{text}`.
    """

    def __init__(
        self,
        generator: Generator,
        sampling: Sampling = Sampling(temperature=0.7),
        instructions: Mapping[str, str] | None = None,
    ):
        self.generator, self.sampling = generator, sampling
        self.prompts = INSTRUCTIONS | checked_instructions(instructions or {})
        self.name = generator.name
        self.may_retry = sampling.temperature > 0

    def rephrase(
        self, jobs: Sequence[Job], cache: AnswerCache, progress: Callable[[int, int], None] | None = None
    ) -> Rephrased:
        """Ask for every job that the cache has no answer to, and whose whole text the model has room for."""
        requests = {job: self._request(job) for job in jobs}
        too_long = getattr(self.generator, "too_long", lambda request: None)
        impossible = {job: reason for job, request in requests.items() if (reason := too_long(request)) is not None}
        requests = {job: request for job, request in requests.items() if job not in impossible}
        found: Answers = answer_all(self.generator, requests.values(), cache, progress)
        return Rephrased(
            {job: _cleaned(found.answers[r]) for job, r in requests.items() if r in found.answers},
            {job: found.failures[r] for job, r in requests.items() if r in found.failures},
            impossible,
            found.num_cached,
            found.num_generated,
        )

    def _request(self, job: Job) -> Request:
        text = self.prompts[job.kind].replace(PLACEHOLDER, job.text.strip())
        seed = seed_of(self.sampling.seed, job.response_type, job.key, job.attempt)
        if self.generator.is_chat:
            return Request.of([{"role": "user", "content": text}], replace(self.sampling, seed=seed))
        stops = self.sampling.stop or PLAIN_STOPS
        return Request.of(text + PLAIN_LEAD, replace(self.sampling, seed=seed, stop=stops))


class FileRephraser:
    """Ready rephrases: a .jsonl or .parquet file with the columns `text` (what was rephrased), `response_type` and
    `rephrase`.

    Raises:
        ValueError: If the file does not exist or a row lacks a column or names an unknown type.
    """

    may_retry = False

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.name, self.prompts = f"file {self.path.name}", {}
        self._rephrases: dict[tuple[str, str], str] = {}
        if not self.path.is_file():
            raise ValueError(f"file of rephrases {str(path)!r} does not exist; expected a .jsonl or .parquet file")
        for number, row in enumerate(read_rows(self.path), start=1):
            where = f"{self.path}, row {number}"
            for column in ("text", "response_type", "rephrase"):
                if not isinstance(row.get(column), str):
                    raise ValueError(f"{where}, field {column!r} is {row.get(column)!r:.60}; expected text")
            if row["response_type"] not in REPHRASES:
                raise ValueError(
                    f"{where}, field 'response_type' is {row['response_type']!r}; expected one of {list(REPHRASES)}"
                )
            self._rephrases[row["response_type"], row["text"].strip()] = row["rephrase"]

    def rephrase(
        self, jobs: Sequence[Job], cache: AnswerCache, progress: Callable[[int, int], None] | None = None
    ) -> Rephrased:
        """Look every job up; a text that the file lacks is a failure."""
        found = {job: self._rephrases.get((job.response_type, job.text.strip())) for job in jobs}
        return Rephrased(
            {job: Answer(text) for job, text in found.items() if text is not None},
            {job: f"{self.path} has no such rephrase" for job, text in found.items() if text is None},
        )


def checked_instructions(instructions: Mapping[str, str]) -> dict[str, str]:
    """Instructions of the user's own by kind.

    Raises:
        ValueError: If a kind is unknown or an instruction has no place for the text.
    """
    for kind, instruction in instructions.items():
        if kind not in INSTRUCTIONS:
            raise ValueError(f"there is no kind of rephrase {kind!r}; expected {' or '.join(INSTRUCTIONS)}")
        if not isinstance(instruction, str) or PLACEHOLDER not in instruction:
            raise ValueError(f"the instruction for {kind!r} does not contain {PLACEHOLDER!r}, where the text goes")
    return dict(instructions)


def _cleaned(answer: Answer) -> Answer:
    """Without the reasoning, the label or the quotes that chat models like to put before and around an answer."""
    text = _LABEL.sub("", _REASONING.sub("", answer.text).strip()).strip()
    if len(text) > 1 and text[0] + text[-1] in ('""', "“”") and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return replace(answer, text=text)
