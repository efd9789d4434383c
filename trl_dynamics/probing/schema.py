"""What a probe set is: one prompt with many kinds of response, and the rules every such set obeys.

Plain data, no model, no torch. Response types follow the probing study of "Learning Dynamics of LLM Finetuning"
(arXiv 2407.10490, section 4); a user may add types of their own, which fall into the group `custom`.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

IN_DISTRIBUTION, REPHRASE, IRRELEVANT, RANDOM, CUSTOM = "in_distribution", "rephrase", "irrelevant", "random", "custom"
GROUPS = (IN_DISTRIBUTION, REPHRASE, IRRELEVANT, RANDOM, CUSTOM)


@dataclass(frozen=True)
class ResponseType:
    """A kind of response to a prompt: its group, whether it is fluent text, and what it is in one phrase."""

    name: str
    group: str
    description: str


RESPONSE_TYPES: dict[str, ResponseType] = {
    kind.name: kind
    for kind in (
        ResponseType("chosen", IN_DISTRIBUTION, "the preferred response (y+)"),
        ResponseType("rejected", IN_DISTRIBUTION, "the dispreferred response (y-)"),
        ResponseType("chosen_initial", IN_DISTRIBUTION, "the starting model's own answer"),
        ResponseType("greedy", IN_DISTRIBUTION, "the model's own free-running greedy answer"),
        ResponseType("chosen_self_rephrase", REPHRASE, "the model's own rephrase of chosen"),
        ResponseType("chosen_rephrase_semantic", REPHRASE, "chosen in other words, same meaning"),
        ResponseType("chosen_rephrase_format", REPHRASE, "chosen's form with another meaning"),
        ResponseType("rejected_rephrase_semantic", REPHRASE, "rejected in other words, same meaning"),
        ResponseType("rejected_rephrase_format", REPHRASE, "rejected's form with another meaning"),
        ResponseType("other_train", IRRELEVANT, "the chosen response of another training prompt"),
        ResponseType("other_test", IRRELEVANT, "the chosen response of a held-out prompt"),
        ResponseType("human_unrelated", IRRELEVANT, "fluent text that has nothing to do with the prompt"),
        ResponseType("chosen_permuted", RANDOM, "chosen's words in random order"),
        ResponseType("other_test_permuted", RANDOM, "other_test's words in random order"),
        ResponseType("random_words", RANDOM, "words drawn from a dictionary, as many as chosen has"),
    )
}
# Several answers that the model sampled: sampled_1, sampled_2, ...
SAMPLED = re.compile(r"sampled_[1-9]\d*")
REQUIRED_TYPES = ("chosen", "rejected")
# What a set whose prompts have no rejected answer is good for.
WITHOUT_REJECTED = (
    "enough for SFT and GRPO; a DPO run is tracked, but for its margin, drained mass and whatever else is read off "
    "rejected answers"
)
# Names of columns that are not responses; a custom response type may not take one of them.
RESERVED_FIELDS = ("probe_id", "prompt", "metadata")

Prompt = str | list[dict[str, str]]


def group_of(response_type: str) -> str:
    """Group of a response type; `sampled_1`, ... are in-distribution, any other unknown one is `custom`."""
    known = RESPONSE_TYPES.get(response_type)
    if known:
        return known.group
    return IN_DISTRIBUTION if SAMPLED.fullmatch(response_type) else CUSTOM


def is_known_type(name: str) -> bool:
    """Whether a column of this name holds answers without being declared: our types, `sampled_1`, ... included."""
    return name in RESPONSE_TYPES or SAMPLED.fullmatch(name) is not None


def order_types(names: Iterable[str]) -> list[str]:
    """`names` without repetition in the order used everywhere: the known types first, then custom ones by name."""
    rank = {name: index for index, name in enumerate(RESPONSE_TYPES)}
    return sorted(set(names), key=lambda name: (rank.get(name, len(rank)), name))


def is_blank(text: str | None) -> bool:
    """Whether a response holds no text at all."""
    return text is None or not text.strip()


def is_unicode(value: Prompt) -> bool:
    """Whether a text, or the contents of messages, can be written as UTF-8: JSON may bring lone surrogates."""
    texts = [value] if isinstance(value, str) else [message["content"] for message in value]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Probe:
    """One prompt and its responses by type.

    Args:
        probe_id (`str`): Unique in its set.
        prompt (`str` or `list[dict[str, str]]`): Plain text, or chat messages with `role` and `content`.
        responses (`dict[str, str]`): Response type to text. With a chat prompt each is one assistant message.
    """

    probe_id: str
    prompt: Prompt
    responses: dict[str, str]

    @property
    def is_conversational(self) -> bool:
        return not isinstance(self.prompt, str)

    def to_row(self) -> dict:
        """The probe as one flat row: `probe_id`, `prompt` and a column per response type."""
        return {"probe_id": self.probe_id, "prompt": self.prompt, **self.responses}


@dataclass(frozen=True)
class ProbeSet:
    """A validated, ordered set of probes.

    Args:
        probes (`tuple[Probe, ...]`): At least one; every one has the required types.
        name (`str`): Shown in reports.
        metadata (`dict`): Origin, licence, counts of what an import dropped; not part of the fingerprint.
        required_types (`tuple[str, ...]`): Types every probe must have.

    Raises:
        ValueError: If the set is empty, an id repeats, a required type is missing or a response is blank.
    """

    probes: tuple[Probe, ...]
    name: str = "probes"
    metadata: dict = field(default_factory=dict)
    required_types: tuple[str, ...] = REQUIRED_TYPES

    def __post_init__(self):
        object.__setattr__(self, "probes", tuple(self.probes))
        self._validate()

    def __len__(self) -> int:
        return len(self.probes)

    def __iter__(self) -> Iterator[Probe]:
        return iter(self.probes)

    @property
    def response_types(self) -> list[str]:
        """All types that occur, in the order used everywhere."""
        return order_types(name for probe in self.probes for name in probe.responses)

    @property
    def counts(self) -> dict[str, int]:
        """Number of probes that have each response type."""
        counts = Counter(name for probe in self.probes for name in probe.responses)
        return {name: counts[name] for name in self.response_types}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over ids, prompts and responses in order: equal if and only if the same things are scored."""
        rows = [[p.probe_id, p.prompt, sorted(p.responses.items())] for p in self.probes]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False, sort_keys=True).encode()).hexdigest()

    def select(self, num_probes: int) -> "ProbeSet":
        """The first `num_probes` probes as a set of their own."""
        if num_probes < 1:
            raise ValueError(f"num_probes is {num_probes}, expected at least 1")
        return ProbeSet(self.probes[:num_probes], self.name, self.metadata, self.required_types)

    def sample(self, amount: float) -> "ProbeSet":
        """A part of the set, in its order: the probes whose ids hash lowest, so that the rest may change.

        Args:
            amount (`float`): A share below 1, or a number of probes.
        """
        check_amount(amount)
        count = max(1, round(amount * len(self.probes))) if amount < 1 else int(amount)

        def rank(probe: Probe) -> bytes:
            return hashlib.sha256(probe.probe_id.encode()).digest()

        wanted = {probe.probe_id for probe in sorted(self.probes, key=rank)[:count]}
        kept = tuple(probe for probe in self.probes if probe.probe_id in wanted)
        return ProbeSet(kept, self.name, self.metadata, self.required_types)

    def narrow(self, max_probes: int | None, subset: float | None) -> "ProbeSet":
        """What a run with these options scores: [`select`], then [`sample`].

        The result remembers the options, so that the copy which a run keeps is not narrowed a second time when it is
        given again with them.

        Args:
            max_probes (`int` or `None`): Only the first so many. None: all.
            subset (`float` or `None`): Only this share or number of those. None: all.
        """
        options = {"probe_max_probes": max_probes, "probe_subset": subset}
        if (max_probes is None and subset is None) or self.selection == options:
            return self
        kept = self if max_probes is None else self.select(max_probes)
        kept = kept if subset is None else kept.sample(subset)
        return ProbeSet(kept.probes, self.name, self.metadata | {"selection": options}, self.required_types)

    @property
    def selection(self) -> dict:
        """The options that [`narrow`] made this set with; none where it is whole."""
        return self.metadata.get("selection", {})

    @classmethod
    def from_jsonl(cls, path: str | Path, name: str | None = None, types: Sequence[str] = ()) -> "ProbeSet":
        """Read a .jsonl file, in this package's layout or the published one; see [`probing.io.read_jsonl`]."""
        from trl_dynamics.probing.io import read_jsonl

        return read_jsonl(path, name=name, types=types)

    @classmethod
    def load(cls, source: object, types: Sequence[str] = ()) -> "ProbeSet":
        """Read a probe set from a folder, a file, a `datasets.Dataset`, a list of rows or a hub name.

        Columns of answers are those named like a response type, and the `types` that you name; see
        [`probing.io.load`].
        """
        from trl_dynamics.probing.io import load

        return load(source, types=types)

    def save(self, folder: str | Path) -> None:
        """Write `data.jsonl` and `probe.yaml` into `folder`; see [`probing.io.save`]."""
        from trl_dynamics.probing.io import save

        save(self, folder)

    def _validate(self) -> None:
        if not self.probes:
            raise ValueError(f"probe set {self.name!r} has no probes; expected at least one row")
        repeated = [probe_id for probe_id, n in Counter(p.probe_id for p in self.probes).items() if n > 1]
        if repeated:
            raise ValueError(f"probe set {self.name!r} repeats probe_id {repeated[0]!r}; every id must be unique")
        for index, probe in enumerate(self.probes):
            self._validate_probe(index, probe)

    def _validate_probe(self, index: int, probe: Probe) -> None:
        where = f"probe set {self.name!r}, row {index} (probe_id {probe.probe_id!r})"
        missing = [name for name in self.required_types if name not in probe.responses]
        if missing:
            raise ValueError(
                f"{where} has no response type {missing[0]!r}; found {order_types(probe.responses)}. The squeezing "
                f"metrics need {' and '.join(self.required_types)}: add that column to the probe data, for every "
                "row; a set without any rejected answers has required_types=('chosen',)"
            )
        for name, text in probe.responses.items():
            if name in RESERVED_FIELDS:
                raise ValueError(f"{where}: {name!r} cannot be a response type, the name is reserved")
            if not isinstance(text, str):
                raise ValueError(f"{where}: response {name!r} is {text!r:.80}; expected text")
            if is_blank(text):
                raise ValueError(f"{where}: response {name!r} is blank; leave the type out or give it text")
            if not is_unicode(text):
                raise ValueError(f"{where}: response {name!r} is broken Unicode (a lone surrogate); correct the text")
        _validate_prompt(where, probe.prompt)


def check_amount(amount: float) -> None:
    """Refuse what is neither a share nor a number of probes.

    Raises:
        ValueError: If it is not above 0, or a fraction of more than one probe.
    """
    if not 0 < amount < math.inf or (amount > 1 and amount != int(amount)):
        raise ValueError(
            f"probe_subset is {amount}, expected a share above 0 and below 1, or a whole number of probes from 1 on"
        )


def _validate_prompt(where: str, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        if is_blank(prompt):
            raise ValueError(f"{where}: the prompt is blank")
        return
    valid = (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in prompt)
    )
    if not valid:
        raise ValueError(f"{where}: prompt is {prompt!r:.120}; expected text or a list of role/content messages")
    if prompt[-1]["role"] == "assistant":
        raise ValueError(f"{where}: the prompt ends with an assistant message; end it with the user's turn")
