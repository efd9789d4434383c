"""The response types that a model has to write: its own answers, and rephrases by it or by another model."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from trl_dynamics.probing.builders import like
from trl_dynamics.probing.cache import AnswerCache, answer_all
from trl_dynamics.probing.generate import Generator, Request, Sampling, seed_of
from trl_dynamics.probing.quality import Gate
from trl_dynamics.probing.rephrase import REPHRASES, GeneratedRephraser, Job, Rephraser
from trl_dynamics.probing.rows import Pair
from trl_dynamics.probing.schema import SAMPLED

logger = logging.getLogger(__name__)

# Own answers with their temperature; sampled_1, sampled_2, ... are drawn like chosen_initial.
OWN_ANSWERS: dict[str, float] = {"chosen_initial": 1.0, "greedy": 0.0}
# Where the next turn of a dialogue in plain text begins, so where an answer ends.
DIALOGUE_TURN = "\n\nHuman:"
# Why a text has no rephrase: asking again does not help, and a cut text is another text.
TOO_LONG = "too long for the model's context"


@dataclass(frozen=True)
class Rejected:
    """A response that was made and not kept; a later attempt may have taken its place."""

    probe_id: str
    response_type: str
    reason: str
    text: str


@dataclass
class GeneratedResponses:
    """Texts by (pair key, response type), what was not kept, and how the build went."""

    texts: dict[tuple[str, str], str] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)
    about: dict = field(default_factory=dict)


@dataclass
class Generation:
    """Who writes the responses that cannot be taken from the data.

    Args:
        model ([`Generator`], *optional*): The model to be tracked: its own answers and self-rephrases.
        rephraser ([`Rephraser`], *optional*): All other rephrases.
        cache ([`AnswerCache`], *optional*): Keeps every answer; by default in memory.
        gate ([`Gate`], *optional*): What a rephrase has to keep to.
        sampling ([`Sampling`], *optional*): For own answers; its temperature and seed are set by type and pair.
        self_sampling ([`Sampling`], *optional*): For self-rephrases.
        attempts (`int`, *optional*): Rephrases to ask for until one passes the gate.
        allow_failures (`bool`, *optional*): Leave out what got no answer instead of stopping.
        progress (`Callable[[int, int], None]`, *optional*): Called with the requests done and in all of each round.
    """

    model: Generator | None = None
    rephraser: Rephraser | None = None
    cache: AnswerCache = field(default_factory=AnswerCache)
    gate: Gate = Gate()
    sampling: Sampling = Sampling()
    self_sampling: Sampling = Sampling(temperature=0.7)
    attempts: int = 3
    allow_failures: bool = False
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self):
        if self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts}, expected at least 1")

    def missing_for(self, response_type: str) -> str | None:
        """What has to be given before that type can be written; None if nothing is missing."""
        kind = REPHRASES.get(response_type)
        if kind is None or kind.by_itself:
            return "the model to be tracked: pass --model" if self.model is None else None
        return (
            "someone who rephrases: pass --rephraser (a server, a file or a model)" if self.rephraser is None else None
        )


def is_generated(response_type: str) -> bool:
    """Whether a model has to write responses of this type."""
    return response_type in OWN_ANSWERS or response_type in REPHRASES or bool(SAMPLED.fullmatch(response_type))


def generate_responses(
    pairs: Sequence[Pair], types: Sequence[str], generation: Generation, seed: int
) -> GeneratedResponses:
    """Responses of the generated `types` for every pair; each depends on the seed, its type and its pair alone.

    Raises:
        ValueError: If a request got no answer; the others are in the cache, so the next run asks for the rest only.
    """
    result = GeneratedResponses()
    own = [name for name in types if name not in REPHRASES]
    rephrased = [name for name in types if name in REPHRASES]
    if own:
        _answer_own(pairs, own, generation, seed, result)
    for rephraser, names in _by_rephraser(rephrased, generation, seed):
        _rephrase(pairs, names, rephraser, generation, result)
    if result.rejected:
        counts = Counter(f"{item.response_type}: {item.reason}" for item in result.rejected)
        result.about["rejected"] = dict(sorted(counts.items()))
    return result


def _answer_own(
    pairs: Sequence[Pair], types: Sequence[str], generation: Generation, seed: int, result: GeneratedResponses
) -> None:
    requests: dict[tuple[str, str], Request] = {}
    for pair, name in ((pair, name) for pair in pairs for name in types):
        stops = generation.sampling.stop
        if isinstance(pair.prompt, str) and DIALOGUE_TURN in pair.prompt:
            stops = (*stops, DIALOGUE_TURN)
        temperature = OWN_ANSWERS.get(name, OWN_ANSWERS["chosen_initial"])
        # A greedy answer has no draws, so it is the same answer under any seed.
        own_seed = seed_of(seed, name, pair.key) if temperature else 0
        sampling = replace(generation.sampling, temperature=temperature, seed=own_seed, stop=stops)
        requests[pair.key, name] = Request.of(pair.prompt, sampling)
    found = answer_all(generation.model, requests.values(), generation.cache, generation.progress)
    cut: Counter[str] = Counter()
    failures = {}
    by_key = {pair.key: pair for pair in pairs}
    for (key, name), request in requests.items():
        probe_id = by_key[key].probe_id
        if request in found.failures:
            failures[probe_id, name] = found.failures[request]
            continue
        answer = found.answers[request]
        if answer.text.strip():
            result.texts[key, name] = answer.text
            cut[name] += answer.finish == "length"
        else:
            result.rejected.append(Rejected(probe_id, name, "empty", ""))
    _stop_on(failures, len(requests), generation, result)
    result.about["own_answers"] = {
        "model": generation.model.name,
        "types": list(types),
        "max_new_tokens": generation.sampling.max_new_tokens,
        "max_prompt_length": generation.sampling.max_prompt_length,
        "cut_at_max_new_tokens": {name: count for name, count in sorted(cut.items()) if count},
        "from_cache": found.num_cached,
        "generated": found.num_generated,
    }


def _by_rephraser(
    types: Sequence[str], generation: Generation, seed: int
) -> Iterator[tuple[Rephraser, Sequence[str]]]:
    itself = [name for name in types if REPHRASES[name].by_itself]
    others = [name for name in types if name not in itself]
    if itself:
        yield GeneratedRephraser(generation.model, replace(generation.self_sampling, seed=seed)), itself
    if others:
        yield generation.rephraser, others


def _rephrase(
    pairs: Sequence[Pair],
    types: Sequence[str],
    rephraser: Rephraser,
    generation: Generation,
    result: GeneratedResponses,
) -> None:
    by_key = {pair.key: pair for pair in pairs}
    jobs = [Job(pair.key, name, _source(pair, name)) for pair in pairs for name in types]
    num_jobs = len(jobs)
    failures: dict[tuple[str, str], str] = {}
    num_cached = num_generated = 0
    for attempt in range(generation.attempts if rephraser.may_retry else 1):
        found = rephraser.rephrase(jobs, generation.cache, generation.progress)
        num_cached, num_generated = num_cached + found.num_cached, num_generated + found.num_generated
        again = []
        for job in jobs:
            probe_id = by_key[job.key].probe_id
            if job in found.impossible:
                result.rejected.append(Rejected(probe_id, job.response_type, TOO_LONG, ""))
                continue
            if job in found.failures:
                failures[probe_id, job.response_type] = found.failures[job]
                continue
            answer = found.answers[job]
            reason = generation.gate.reject(job.text, answer, job.kind)
            if reason is None:
                result.texts[job.key, job.response_type] = like(job.text, answer.text)
            else:
                result.rejected.append(Rejected(probe_id, job.response_type, reason, answer.text))
                again.append(replace(job, attempt=attempt + 1))
        jobs = again
        if not jobs:
            break
    _stop_on(failures, num_jobs, generation, result)
    kinds = {REPHRASES[name].kind for name in types}
    result.about.setdefault("rephrases", []).append(
        {
            "by": rephraser.name,
            "types": list(types),
            "prompts": {kind: prompt for kind, prompt in rephraser.prompts.items() if kind in kinds},
            "from_cache": num_cached,
            "generated": num_generated,
        }
    )


def _stop_on(
    failures: dict[tuple[str, str], str], num_asked: int, generation: Generation, result: GeneratedResponses
) -> None:
    if not failures:
        return
    (probe_id, name), reason = next(iter(failures.items()))
    listed = f"{len(failures)} of {num_asked} responses got no answer, first probe {probe_id!r}, {name!r}: {reason}"
    if not generation.allow_failures:
        kept = "" if generation.cache.path is None else f" The answers so far are in {generation.cache.path}:"
        raise ValueError(
            f"{listed}.{kept} run the same command again to ask for the rest only, or pass --allow_failures to leave "
            "these responses out"
        )
    logger.warning("%s; they are left out", listed)
    counts = Counter(f"{name}: {reason}" for (_, name), reason in failures.items())
    result.about["failures"] = result.about.get("failures", {}) | dict(sorted(counts.items()))


def _source(pair: Pair, response_type: str) -> str:
    return pair.chosen if REPHRASES[response_type].source == "chosen" else pair.rejected
