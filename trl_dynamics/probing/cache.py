"""Answers on disk, one line each, written the moment they arrive: an interrupted build never asks twice."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from trl_dynamics.probing.generate import Answer, Failure, Generator, Request, unique
from trl_dynamics.probing.journal import Journal


class AnswerCache:
    """An append-only .jsonl file of answers by request key; `path` None keeps them in memory.

    Each answer is flushed to the disk before the next one is handled. A last line that was torn by a crash is dropped;
    anything else that is no answer is an error, since the file then is not a cache.

    Raises:
        ValueError: If the file exists and is not a cache, or its folder cannot be written.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = None if path is None else Path(path)
        self._answers: dict[str, Answer] = {}
        self._journal = None
        if self.path is not None:
            self._journal = Journal(
                self.path,
                self._read,
                file_is="the cache of answers",
                row_is="a cached answer",
                remedy="remove the line, or use another file",
            )

    def __len__(self) -> int:
        return len(self._answers)

    def __enter__(self) -> "AnswerCache":
        return self

    def __exit__(self, *error) -> None:
        if self._journal is not None:
            self._journal.close()

    def get(self, key: str) -> Answer | None:
        """The answer to the request of that key."""
        return self._answers.get(key)

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer; it is on the disk when this returns."""
        self._answers[key] = answer
        if self._journal is not None:
            self._journal.append({"key": key, "text": answer.text, "finish": answer.finish})

    def _read(self, row: dict) -> None:
        self._answers[row["key"]] = Answer(row["text"], row["finish"])


@dataclass
class Answers:
    """What became of a batch of requests: answers and reasons of failure by request, and where they came from."""

    answers: dict[Request, Answer] = field(default_factory=dict)
    failures: dict[Request, str] = field(default_factory=dict)
    num_cached: int = 0
    num_generated: int = 0


def answer_all(
    generator: Generator,
    requests: Iterable[Request],
    cache: AnswerCache,
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """Answer every request once, from the cache where it has the answer.

    Args:
        generator ([`Generator`]): Asked for what the cache lacks.
        requests (`Iterable[Request]`): May repeat.
        cache ([`AnswerCache`]): Grows with every answer that arrives; failures are not kept, so that they are asked
            again the next time.
        progress (`Callable[[int, int], None]`, *optional*): Called with the number of requests done and in all.
    """
    wanted = unique(requests)
    result = Answers()
    missing = []
    for request in wanted:
        answer = cache.get(request.key(generator.name))
        if answer is None:
            missing.append(request)
        else:
            result.answers[request] = answer
    result.num_cached = len(result.answers)
    for request, outcome in generator.generate(missing) if missing else ():
        if isinstance(outcome, Failure):
            result.failures[request] = outcome.reason
        else:
            cache.put(request.key(generator.name), outcome)
            result.answers[request] = outcome
            result.num_generated += 1
        if progress is not None:
            progress(len(result.answers) + len(result.failures), len(wanted))
    return result
