"""Probe sets as token ids: the prompt/response boundary, the end-of-turn token and length limits.

Rows are tokenised as TRL's trainers tokenise training data: a plain response continues the prompt's text and ends with
the EOS token, a chat goes through the chat template; the response starts where the tokens of prompt and of prompt +
response part.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from trl_dynamics.probing.schema import Probe, ProbeSet, order_types


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
    """One response of one probe as token ids; `eos_id` is None where the end was cut or the template has none."""

    probe_id: str
    response_type: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    eos_id: int | None
    prompt_cut: bool
    response_cut: bool

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
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's; chat prompts need its chat template.
        limits ([`LengthLimits`], *optional*): What to cut and what to refuse.
        end_ids (`Sequence[int]`, *optional*): End-of-turn token ids besides the tokenizer's EOS, such as those of the
            model's generation config.

    Raises:
        ValueError: If a row is longer than the model's context, a limit leaves no response token, or a chat prompt
            meets a tokenizer without a chat template; the row is named.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, which ends every scored response; set tokenizer.eos_token")
    ends = {tokenizer.eos_token_id, *end_ids}
    return EncodedProbes(
        tuple(
            encode_response(probe, response_type, tokenizer, limits, ends)
            for probe in probe_set
            for response_type in order_types(probe.responses)
        )
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
    encoded = []
    for probe in probe_set:
        response_type = order_types(probe.responses)[0]
        ids = list(_both_ids(probe, response_type, tokenizer)[0])
        # Some tokenizers close every text with EOS, behind which nothing is left to say.
        if not probe.is_conversational and ids and ids[-1] == tokenizer.eos_token_id:
            ids.pop()
        if not ids:
            raise ValueError(f"the prompt of probe {probe.probe_id!r} has no token, so it cannot be answered")
        kept = cut_prompt(ids, limits.max_prompt_length, tokenizer.bos_token_id)
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


@dataclass(frozen=True)
class Seam:
    """Tokens that join a prompt's end to a response's start: the prompt's alone, and those in their place with the
    response behind it."""

    prompt_tokens: tuple[str, ...]
    joined_tokens: tuple[str, ...]


def find_seam(probe: Probe, response_type: str, tokenizer: PreTrainedTokenizerBase) -> Seam | None:
    """Where the prompt's tokens change when the response follows; None if they stay, as they should."""
    prompt_ids, full_ids = _both_ids(probe, response_type, tokenizer)
    start = common_prefix_length(prompt_ids, full_ids)
    if start == len(prompt_ids):
        return None
    end = min(len(prompt_ids), start + 5)
    joined = full_ids[start : start + max(1, end - start)]
    return Seam(
        tuple(tokenizer.decode([token]) for token in prompt_ids[start:end]),
        tuple(tokenizer.decode([token]) for token in joined),
    )


def encode_response(
    probe: Probe, response_type: str, tokenizer: PreTrainedTokenizerBase, limits: LengthLimits, ends: set[int]
) -> EncodedResponse:
    """One response of one probe; see [`encode`]. `ends` holds all end-of-turn token ids.

    Raises:
        ValueError: As [`encode`]; and if a chat template renders the prompt differently once a response follows.
    """
    where = f"probe {probe.probe_id!r}, response {response_type!r}"
    prompt_ids, full_ids = _both_ids(probe, response_type, tokenizer)
    start = common_prefix_length(prompt_ids, full_ids)
    if probe.is_conversational and start < len(prompt_ids):
        seam = find_seam(probe, response_type, tokenizer)
        raise ValueError(
            f"{where}: the chat template changes the prompt when a response follows, so the response's start cannot "
            f"be told: token {start} begins {''.join(seam.prompt_tokens)!r} without and "
            f"{''.join(seam.joined_tokens)!r} with the response. Use a template that only appends (trl ships such "
            "training templates for common models)"
        )
    prompt, response = list(full_ids[:start]), list(full_ids[start:])
    end = _end_of_turn(response, ends, tokenizer if probe.is_conversational else None)
    eos_id = response[end] if end < len(response) else None
    response = response[:end]
    if not prompt or not response:
        raise ValueError(f"{where} has {len(prompt)} prompt and {len(response)} response tokens; both need at least 1")

    kept = cut_prompt(prompt, limits.max_prompt_length, tokenizer.bos_token_id)
    length = len(kept) + len(response) + (eos_id is not None)
    response_cut = limits.max_length is not None and length > limits.max_length
    if response_cut:
        response, eos_id = response[: limits.max_length - len(kept)], None
        if len(kept) >= limits.max_length:
            raise ValueError(
                f"{where}: the prompt's {len(kept)} tokens leave no room for a response within probe_max_length="
                f"{limits.max_length}; set probe_max_prompt_length below it"
            )
        length = limits.max_length
    if limits.context_length is not None and length > limits.context_length:
        raise ValueError(
            f"{where} has {length} tokens, more than the model's context of {limits.context_length}; set "
            "probe_max_length (cuts the response's end) and probe_max_prompt_length (keeps the prompt's last tokens)"
        )
    return EncodedResponse(
        probe.probe_id, response_type, tuple(kept), tuple(response), eos_id, len(kept) < len(prompt), response_cut
    )


def _both_ids(probe: Probe, response_type: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of the prompt alone and of prompt + response."""
    text = probe.responses[response_type]
    if probe.is_conversational:
        return _chat_ids(probe.prompt, text, tokenizer, f"probe {probe.probe_id!r}, response {response_type!r}")
    return _plain_ids(probe.prompt, text, tokenizer)


def _plain_ids(prompt: str, response: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    eos = "" if response.endswith(tokenizer.eos_token) else tokenizer.eos_token
    return tokenizer(text=prompt)["input_ids"], tokenizer(text=prompt + response + eos)["input_ids"]


def _chat_ids(
    prompt: list[dict], response: str, tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], list[int]]:
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where} is a chat, but the tokenizer has no chat template; use plain text prompts or set one"
        )
    whole = [*prompt, {"role": "assistant", "content": response}]
    prompt_ids = tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=True, add_generation_prompt=True)
    full_ids = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=True)
    return prompt_ids["input_ids"], full_ids["input_ids"]


def _end_of_turn(response: list[int], ends: set[int], chat_tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Index of the first end-of-turn token; the length where there is none.

    A chat template may close a turn with a special token that is nobody's EOS, so that counts as well.
    """
    for index, token in enumerate(response):
        if token in ends:
            return index
    if chat_tokenizer is not None:
        special = set(chat_tokenizer.all_special_ids) - {chat_tokenizer.unk_token_id}
        for index, token in enumerate(response):
            if token in special and index > 0:
                return index
    return len(response)


def cut_prompt(prompt: list[int], limit: int | None, bos_id: int | None) -> list[int]:
    """The last `limit` tokens of a prompt, of which a BOS token at its start stays one."""
    if limit is None or len(prompt) <= limit:
        return prompt
    if prompt[0] == bos_id and limit > 1:
        return [prompt[0], *prompt[len(prompt) - limit + 1 :]]
    return prompt[len(prompt) - limit :]
