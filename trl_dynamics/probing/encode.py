"""Probe sets as token ids: the prompt/response boundary, the end-of-turn token and length limits.

Rows are tokenised as TRL's trainers tokenise training data: a plain response continues the prompt's text and ends with
the EOS token, a chat goes through the chat template; the response starts where the tokens of prompt and of prompt +
response part. Tokens that are not the response are refused: see `probing.round_trip`.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from trl_dynamics.probing.chat import shorten
from trl_dynamics.probing.prompts import Prompts, Seam, SharedTokenError, UnscorableError, where_of
from trl_dynamics.probing.round_trip import RoundTrip, Wanted
from trl_dynamics.probing.schema import Probe, ProbeSet, order_types

logger = logging.getLogger(__name__)

# Probes that one error about many responses names.
MOST_NAMED = 3
NO_EOS = (
    "the tokenizer has no EOS token, which ends every scored response; set tokenizer.eos_token to the token that ends "
    "an answer, and save the tokenizer with the model for the command line"
)
_KEEP_APART = "begin the responses, or end the prompts, with white space that the tokenizer keeps apart"


@dataclass(frozen=True)
class LengthLimits:
    """How long a scored sequence may be, in tokens.

    Args:
        max_prompt_length (`int`, *optional*): A longer prompt keeps its last tokens (and its BOS token).
        max_length (`int`, *optional*): A longer prompt + response loses the response's end.
        context_length (`int`, *optional*): What the model can take; a longer row is an error, never cut silently.
    """

    max_prompt_length: int | None = None
    max_length: int | None = None
    context_length: int | None = None

    def __post_init__(self):
        for name, least in (("max_prompt_length", 1), ("max_length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"probe_{name} is {value}, expected at least {least} tokens or no limit")


@dataclass(frozen=True)
class EncodedResponse:
    """One response of one probe as token ids.

    `eos_id` is None where the end was cut or the template has none. A response that goes on behind an end-of-turn
    token is scored up to that one, its `eos_id`, and is cut as well. `added` is what the chat template wrote before
    the response and is scored with it, without white space.
    """

    probe_id: str
    response_type: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    eos_id: int | None
    prompt_cut: bool
    response_cut: bool
    added: str = ""

    @property
    def input_ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.response_ids + (() if self.eos_id is None else (self.eos_id,))


@dataclass(frozen=True)
class EncodedProbes:
    """All responses of a probe set as token ids, in the set's order."""

    items: tuple[EncodedResponse, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the token ids: equal if and only if the same tokens are scored."""
        ids = [[i.probe_id, i.response_type, i.prompt_ids, i.response_ids, i.eos_id] for i in self.items]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()

    @property
    def cuts(self) -> dict[str, dict[str, int]]:
        """Per response type: rows whose prompt was cut, whose response was cut, and rows in all."""
        return {
            name: {
                "prompt": sum(i.prompt_cut for i in self.items if i.response_type == name),
                "response": sum(i.response_cut for i in self.items if i.response_type == name),
                "of": sum(i.response_type == name for i in self.items),
            }
            for name in order_types(i.response_type for i in self.items)
        }


def encode(
    probe_set: ProbeSet,
    tokenizer: PreTrainedTokenizerBase,
    limits: LengthLimits = LengthLimits(),
    end_ids: Sequence[int] = (),
) -> EncodedProbes:
    """Tokenise every response of every probe.

    Args:
        probe_set ([`ProbeSet`]): What to score.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]): The model's; chat
            prompts need its chat template.
        limits ([`LengthLimits`], *optional*): What to cut and what to refuse.
        end_ids (`Sequence[int]`, *optional*): End-of-turn token ids besides the tokenizer's EOS, such as those of the
            model's generation config.

    Raises:
        ValueError: If there is no EOS token, or no chat template for a chat. Or one error for all responses that
            cannot be scored, with their number and the first ones: the tokens are not the response, the row is longer
            than the model's context, or a limit leaves no response token.
    """
    encoder, items, refused = Encoder(tokenizer, limits, end_ids), [], []
    for probe in probe_set:
        for response_type in order_types(probe.responses):
            try:
                items.append(encoder.response(probe, response_type))
            except UnscorableError as error:
                refused.append((probe.probe_id, error))
    if refused:
        raise ValueError(_refusal(refused, len(items) + len(refused)))
    bos_id = encoder.tokenizer.bos_token_id
    if doubled := len({item.probe_id for item in items if doubled_bos(item.prompt_ids, bos_id)}):
        logger.warning(
            "%d of %d prompts start with two BOS tokens: the tokenizer adds one to that of the text; leave %r out of "
            "the prompts",
            doubled,
            len(probe_set),
            encoder.tokenizer.bos_token,
        )
    return EncodedProbes(tuple(items))


def _refusal(refused: list[tuple[str, UnscorableError]], total: int) -> str:
    """All refused responses in one line: how many, the first of each of the first probes, and what to do."""
    if len(refused) == 1:
        return f"1 of {total} responses cannot be scored: {refused[0][1]}"
    first: dict[str, UnscorableError] = {}
    for probe_id, error in refused:
        if len(first) < MOST_NAMED:
            first.setdefault(probe_id, error)
    cases = "; ".join(error.case for error in first.values())
    remedies = "; ".join(dict.fromkeys(error.remedy for error in first.values()))
    return (
        f"{len(refused)} of {total} responses cannot be scored; the first: {cases}. What to do: {remedies}. "
        "`trl-dynamics probes check` lists all"
    )


@dataclass(frozen=True)
class EncodedPrompt:
    """The prompt of one probe as token ids, for the model to answer."""

    probe_id: str
    input_ids: tuple[int, ...]
    cut: bool


def encode_prompts(
    probe_set: ProbeSet, tokenizer: PreTrainedTokenizerBase, limits: LengthLimits = LengthLimits()
) -> tuple[EncodedPrompt, ...]:
    """Tokenise every prompt alone, as a user who waits for an answer would; see [`encode`] for the arguments.

    Raises:
        ValueError: If a chat prompt meets a tokenizer without a chat template, or a prompt has no token.
    """
    encoded, prompts = [], Prompts(tokenizer)
    bos_id, eos_id = prompts.tokenizer.bos_token_id, prompts.tokenizer.eos_token_id
    for probe in probe_set:
        where = f"the prompt of probe {probe.probe_id!r}"
        ids = list(prompts.ids(probe.prompt, where))
        # Some tokenizers close every text with EOS, behind which nothing is left to say.
        if not probe.is_conversational and ids and ids[-1] == eos_id:
            ids.pop()
        if not ids:
            raise ValueError(f"{where} has no token, so it cannot be answered")
        kept = cut_prompt(ids, limits.max_prompt_length, bos_id)
        encoded.append(EncodedPrompt(probe.probe_id, tuple(kept), len(kept) < len(ids)))
    return tuple(encoded)


def answer_text(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> str:
    """The text of an answer without special tokens.

    It is decoded behind its prompt, because some tokenizers drop the space before the first token of a text.
    """
    before = tokenizer.decode(list(prompt_ids), skip_special_tokens=True)
    text = tokenizer.decode([*prompt_ids, *answer_ids], skip_special_tokens=True)
    alone = not text.startswith(before)
    return tokenizer.decode(list(answer_ids), skip_special_tokens=True) if alone else text[len(before) :]


def token_texts(tokenizer: PreTrainedTokenizerBase, item: EncodedResponse) -> list[str]:
    """What each token of a response adds to the text before it.

    Together they are the response, except for characters that are split over tokens: each of these tokens shows as
    replacement characters (U+FFFD).
    """
    texts, before = [], item.prompt_ids[-1]
    for token in item.response_ids:
        alone, both = (tokenizer.decode(ids) for ids in ([before], [before, token]))
        texts.append(both[len(alone) :] if both.startswith(alone) else tokenizer.decode([token]))
        before = token
    return texts


def find_seam(probe: Probe, response_type: str, tokenizer: PreTrainedTokenizerBase) -> Seam | None:
    """Where the prompt's tokens change when the response follows; see [`Prompts.seam`]."""
    return Prompts(tokenizer).seam(probe, response_type)


def doubled_bos(ids: Sequence[int], bos_id: int | None) -> bool:
    """Whether token ids start with two BOS tokens."""
    return bos_id is not None and list(ids[:2]) == [bos_id, bos_id]


def encode_response(
    probe: Probe, response_type: str, tokenizer: PreTrainedTokenizerBase, limits: LengthLimits, ends: set[int]
) -> EncodedResponse:
    """One response of one probe; see [`encode`]. `ends` holds all end-of-turn token ids.

    Raises:
        ValueError: As [`encode`].
    """
    return Encoder(tokenizer, limits, ends).response(probe, response_type)


class Encoder:
    """Responses as token ids, one after the other; see [`encode`] for the arguments.

    Raises:
        ValueError: If the tokenizer has no EOS token.
    """

    def __init__(self, processing_class, limits: LengthLimits = LengthLimits(), end_ids: Iterable[int] = ()):
        self.prompts, self._limits = Prompts(processing_class), limits
        self.tokenizer = self.prompts.tokenizer
        if self.tokenizer.eos_token_id is None:
            raise ValueError(NO_EOS)
        self._trip = RoundTrip(self.tokenizer)
        self._ends = frozenset({self.tokenizer.eos_token_id, *end_ids} - {None})

    def response(self, probe: Probe, response_type: str) -> EncodedResponse:
        """One response of one probe.

        Raises:
            UnscorableError: If it cannot be scored as it is.
            ValueError: If it answers a chat and there is no chat template.
        """
        where = where_of(probe, response_type)
        prompt_ids, full_ids = self.prompts.ids(probe.prompt, where), self.prompts.full_ids(probe, response_type)
        start = common_prefix_length(prompt_ids, full_ids)
        wanted = self._wanted(probe, response_type, start)
        seam = self.prompts.seam(probe, response_type) if start < len(prompt_ids) else None
        if seam and not seam.is_blank:
            raise SharedTokenError(f"{where}: ", seam.text, _KEEP_APART)
        found = self._trip.find(full_ids, wanted)
        if found is None:
            raise self._misread(probe, response_type, wanted.answer, full_ids[start:])
        # A turn that ends before the answer is the prompt's: the template wrote its end in another way.
        if any(text and text in found.added for text in map(self._trip.decode, ([end] for end in self._ends))):
            end = shorten(found.added)
            changed = f": the chat template ends the prompt in another way, with {end}, before a response"
            raise UnscorableError(where, changed, "set a template that writes a turn alike wherever it is")
        prompt, response = full_ids[: found.start], full_ids[found.start : found.end]
        if not prompt or not response:
            lengths = f" has {len(prompt)} prompt and {len(response)} response tokens"
            raise UnscorableError(where, lengths, "both need at least 1")
        item = EncodedResponse(
            *(probe.probe_id, response_type, tuple(prompt), tuple(response), found.eos_id),
            prompt_cut=False,
            response_cut=found.cut,
            added=found.added,
        )
        return self._limited(item, where)

    def _wanted(self, probe: Probe, response_type: str, start: int) -> Wanted:
        """What is to be scored, and at which tokens it may start: at `start`, or else near it.

        Raises:
            UnscorableError: If the chat template does not write prompt and response as they are.
        """
        answer, prompts, where = probe.responses[response_type], self.prompts, where_of(probe, response_type)
        if not probe.is_conversational:
            return Wanted(answer, answer, range(start, start + 1), self._ends)
        frame, chat = prompts.frame(probe.prompt, where), prompts.full_text(probe, response_type)
        if not chat.startswith(frame.history):
            raise _changed_prompt(where, prompts.seam(probe, response_type), start)
        span = frame.locate(answer, chat)
        if span is None:
            remedy = f"write it as the template does, {shorten(frame.written(chat))}, or set a template that keeps it"
            raise UnscorableError(where, f": the chat template {frame.difference(answer, chat)}", remedy)
        answer, framed, starts = chat[slice(*span)], chat[len(frame.history) : span[1]], range(start, start + 1)
        if not frame.opening.strip():
            # A template without a generation prompt: what it writes before an answer asks for it.
            header = chat[len(frame.history) : span[0]]
            framed, starts = answer, range(start, start + len(header.encode()) + 1)
        elif len(os.path.commonprefix([frame.history + frame.opening, chat])) > span[0]:
            # The generation prompt holds the start of the answer, which is to be scored as well.
            starts = range(start, max(0, start - len(framed)), -1)
        return Wanted(answer, framed, starts, self._ends, prompts.special_ids, chat[span[1] :])

    def _misread(self, probe: Probe, response_type: str, answer: str, ids: list[int]) -> UnscorableError:
        """Why the tokens behind a prompt are not the answer."""
        where, tokenizer = where_of(probe, response_type), self.tokenizer
        if tokenizer.eos_token_id not in tokenizer(text=tokenizer.eos_token, add_special_tokens=False)["input_ids"]:
            found = f": the tokenizer does not read its EOS token {tokenizer.eos_token!r} as one token"
            return UnscorableError(where, found, "add it to the tokenizer as a special token")
        read, alone = shorten(self._trip.decode(ids)), shorten(self._trip.of(answer))
        found = f": its tokens read {read}, the response alone {alone} (both without white space)"
        return UnscorableError(where, found, "leave it out, or take the tokenizer that the model has")

    def _limited(self, item: EncodedResponse, where: str) -> EncodedResponse:
        """What the limits leave of it.

        Raises:
            UnscorableError: If they leave no response token, or the row is longer than the model's context.
        """
        limits, response, eos_id = self._limits, item.response_ids, item.eos_id
        kept = tuple(cut_prompt(list(item.prompt_ids), limits.max_prompt_length, self.tokenizer.bos_token_id))
        length = len(kept) + len(response) + (eos_id is not None)
        response_cut = limits.max_length is not None and length > limits.max_length
        if response_cut:
            if len(kept) >= limits.max_length:
                raise UnscorableError(
                    where,
                    f": the prompt's {len(kept)} tokens leave no room for a response within probe_max_length="
                    f"{limits.max_length}",
                    "set probe_max_prompt_length below it",
                )
            response, eos_id, length = response[: limits.max_length - len(kept)], None, limits.max_length
        if limits.context_length is not None and length > limits.context_length:
            raise UnscorableError(
                where,
                f" has {length} tokens, more than the model's context of {limits.context_length}",
                "set probe_max_length (cuts the response's end) and probe_max_prompt_length (keeps the prompt's last "
                "tokens)",
            )
        return replace(
            item,
            prompt_ids=kept,
            response_ids=response,
            eos_id=eos_id,
            prompt_cut=len(kept) < len(item.prompt_ids),
            response_cut=response_cut or item.response_cut,
        )


def _changed_prompt(where: str, seam: Seam | None, start: int) -> UnscorableError:
    changed = "".join(seam.prompt_tokens) if seam else "", "".join(seam.joined_tokens) if seam else ""
    return UnscorableError(
        where,
        ": the chat template changes the prompt when a response follows, so the response's start is not known: "
        f"token {start} begins {changed[0]!r} without and {changed[1]!r} with the response",
        "end the prompts with the first user turn, or set a template that writes earlier turns alike",
    )


def cut_prompt(prompt: list[int], limit: int | None, bos_id: int | None) -> list[int]:
    """The last `limit` tokens of a prompt, of which a BOS token at its start stays one."""
    if limit is None or len(prompt) <= limit:
        return prompt
    if prompt[0] == bos_id and limit > 1:
        return [prompt[0], *prompt[len(prompt) - limit + 1 :]]
    return prompt[len(prompt) - limit :]
