"""The answers of one side: written by a model, batch by batch and kept, or read from a file."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from trl_dynamics.judging.match import prompt_text
from trl_dynamics.probing.cache import AnswerCache, answer_all
from trl_dynamics.probing.generate import Generator, Request, Sampling, seed_of
from trl_dynamics.probing.generated import DIALOGUE_TURN
from trl_dynamics.probing.io import read_rows
from trl_dynamics.probing.schema import Prompt, is_unicode


@dataclass
class SideAnswers:
    """Answers and reasons for missing ones by the prompt's number; `num_cut` reached the token limit."""

    texts: dict[int, str] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    num_cut: int = 0


class ModelSide:
    """A model that answers.

    Args:
        load (`Callable[[], Generator]`): Called when the answers are wanted, so that one model is in memory at a time.
        sampling ([`Sampling`]): With a temperature above 0, each side and prompt draws from a seed of its own.
        side (`str`): `"A"` or `"B"`.
    """

    def __init__(self, load: Callable[[], Generator], sampling: Sampling, side: str):
        self._load, self.sampling, self.side = load, sampling, side

    def open(self) -> dict:
        """Load the model; returns all that its answers depend on besides the prompts."""
        self.generator = self._load()
        sampling = asdict(self.sampling)
        if not self.sampling.temperature:
            del sampling["seed"], sampling["top_p"]
        return {"model": self.generator.name, "sampling": sampling | {"stop": list(self.sampling.stop)}}

    def answers(
        self, prompts: Sequence[Prompt], cache: AnswerCache, progress: Callable[[int, int], None] | None = None
    ) -> SideAnswers:
        """An answer to each prompt, from the cache where it has one; the model is let go afterwards."""
        requests = [self._request(prompt) for prompt in prompts]
        found = answer_all(self.generator, requests, cache, progress)
        del self.generator
        result = SideAnswers()
        for index, request in enumerate(requests):
            if request in found.failures:
                result.failures[index] = found.failures[request]
            else:
                result.texts[index] = found.answers[request].text
                result.num_cut += found.answers[request].finish == "length"
        return result

    def _request(self, prompt: Prompt) -> Request:
        sampling = self.sampling
        if isinstance(prompt, str) and DIALOGUE_TURN in prompt:
            sampling = replace(sampling, stop=(*sampling.stop, DIALOGUE_TURN))
        seed = seed_of(sampling.seed, self.side, Request.of(prompt, sampling).prompt_json)
        return Request.of(prompt, replace(sampling, seed=seed if sampling.temperature else 0))


class FileSide:
    """Ready answers: rows with `prompt` and `response`.

    A chat of one user's message and that message as text are the same prompt.

    Args:
        path (`str` or `Path`): A .jsonl file.

    Raises:
        ValueError: If a row lacks a field, or answers a prompt in two ways.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._texts: dict[str, str] = {}
        for number, row in enumerate(read_rows(self.path), start=1):
            where = f"{self.path}, answer {number}"
            prompt, text = row.get("prompt"), row.get("response")
            if not isinstance(prompt, str | list) or not isinstance(text, str):
                raise ValueError(f"{where} has the fields {sorted(row)}; expected 'prompt' and 'response', a text")
            if not is_unicode(text):
                raise ValueError(f"{where} is broken Unicode (a lone surrogate); correct the text")
            if self._texts.setdefault(_key(prompt), text) != text:
                raise ValueError(f"{where} answers a prompt that another row answers differently; keep one of them")

    def open(self) -> dict:
        """What the answers are, whatever the file is called."""
        content = repr(sorted(self._texts.items())).encode("utf-8", "surrogatepass")
        return {"file": self.path.name, "sha256": hashlib.sha256(content).hexdigest()}

    def answers(
        self, prompts: Sequence[Prompt], cache: AnswerCache, progress: Callable[[int, int], None] | None = None
    ) -> SideAnswers:
        """The answer to each prompt that the file has."""
        result = SideAnswers()
        for index, prompt in enumerate(prompts):
            if _key(prompt) in self._texts:
                result.texts[index] = self._texts[_key(prompt)]
            else:
                result.failures[index] = f"{self.path} has no answer to {prompt_text(prompt)!r:.60}"
        return result


def _key(prompt: Prompt) -> str:
    if isinstance(prompt, list) and len(prompt) == 1 and prompt[0].get("role") == "user":
        prompt = prompt[0].get("content")
    return Request.of(prompt, Sampling()).prompt_json
