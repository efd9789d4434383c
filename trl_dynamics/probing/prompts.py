"""Prompts, alone and with a response, as the token ids that TRL's trainers make of them."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trl.data_utils import common_prefix_length

from trl_dynamics.probing.chat import Chats, Frame, answer_message, tokenizer_of
from trl_dynamics.probing.schema import Probe, Prompt


class UnscorableError(ValueError):
    """A response that cannot be scored as it is.

    Args:
        where (`str`): Which response.
        found (`str`): What is wrong, as the rest of a sentence that starts with `where`.
        remedy (`str`): What to do.
    """

    def __init__(self, where: str, found: str, remedy: str):
        super().__init__(f"{where}{found}; {remedy}")
        self.case, self.remedy = f"{where}{found}", remedy


class SharedTokenError(UnscorableError):
    """A response that shares a token with its prompt."""


@dataclass(frozen=True)
class Seam:
    """Tokens that join a prompt's end to a response's start: the prompt's alone, and those in their place with the
    response behind it; `is_blank` if the prompt's are white space."""

    prompt_tokens: tuple[str, ...]
    joined_tokens: tuple[str, ...]
    is_blank: bool = False

    @property
    def text(self) -> str:
        """What joins, in words."""
        return (
            f"the prompt ends with the tokens {list(self.prompt_tokens)}, which become {list(self.joined_tokens)} "
            "when the response follows"
        )


class Prompts:
    """Token ids and texts of prompts; what the last prompt needed is kept for its other responses.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]): The model's.

    Raises:
        UnscorableError: From all methods, if the chat template refuses the messages.
        ValueError: From all methods, if a prompt is a chat and there is no chat template.
    """

    def __init__(self, processing_class):
        self.tokenizer = tokenizer_of(processing_class)
        self._chats = Chats(processing_class)
        self._prompt: Prompt | None = None
        self._kept: dict[Callable, object] = {}

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens, without that of unknown letters."""
        return frozenset(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}

    def ids(self, prompt: Prompt, where: str) -> list[int]:
        """The prompt alone, a chat with its generation prompt; `where` names it in errors."""
        return self._once(prompt, self._ids, where)

    def frame(self, prompt: Sequence[dict], where: str) -> Frame:
        """What the chat template writes around an answer to a chat."""
        return self._once(prompt, self._frame, where)

    def full_ids(self, probe: Probe, response_type: str) -> list[int]:
        """Prompt and response; a plain response ends with the EOS token."""
        response = probe.responses[response_type]
        if probe.is_conversational:
            return self._whole_chat(self._chats.ids, probe, response_type)
        eos = "" if response.endswith(self.tokenizer.eos_token) else self.tokenizer.eos_token
        return self.tokenizer(text=probe.prompt + response + eos)["input_ids"]

    def full_text(self, probe: Probe, response_type: str) -> str:
        """A chat prompt with its response as the template writes them."""
        return self._whole_chat(self._chats.text, probe, response_type)

    def seam(self, probe: Probe, response_type: str) -> Seam | None:
        """Where the prompt's tokens change when the response follows; None if they stay, as they should.

        A generation prompt that ends otherwise than what the template writes before an answer is no such change, nor
        are special tokens with which a tokenizer closes the prompt alone.
        """
        where = where_of(probe, response_type)
        prompt_ids, full_ids = self.ids(probe.prompt, where), self.full_ids(probe, response_type)
        start = common_prefix_length(prompt_ids, full_ids)
        if set(prompt_ids[start:]) <= self.special_ids:
            return None
        if probe.is_conversational:
            history = self.frame(probe.prompt, where).history
            if self.full_text(probe, response_type).startswith(history):
                return None
        end = min(len(prompt_ids), start + 5)
        joined = full_ids[start : start + max(1, end - start)]
        decode = self.tokenizer.decode
        changed = [token for token in prompt_ids[start:] if token not in self.special_ids]
        shown = (tuple(decode([token]) for token in ids) for ids in (prompt_ids[start:end], joined))
        return Seam(*shown, is_blank=not decode(changed).strip())

    def _ids(self, prompt: Prompt, where: str) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(text=prompt)["input_ids"]
        parts = self.frame(prompt, where).parts
        return _named(where, self._chats.ids, prompt, parts, opening=True)

    def _frame(self, prompt: Sequence[dict], where: str) -> Frame:
        if not self._chats.has_template:
            raise ValueError(
                f"{where} is a chat, but the tokenizer has no chat template; use plain text prompts or set one"
            )
        return _named(where, self._chats.frame, prompt)

    def _whole_chat(self, write: Callable, probe: Probe, response_type: str):
        where = where_of(probe, response_type)
        messages = [*probe.prompt, answer_message(probe.responses[response_type])]
        return _named(where, write, messages, self.frame(probe.prompt, where).parts)

    def _once(self, prompt: Prompt, make: Callable, where: str):
        if self._prompt is not prompt:
            self._prompt, self._kept = prompt, {}
        if make not in self._kept:
            self._kept[make] = make(prompt, where)
        return self._kept[make]


def where_of(probe: Probe, response_type: str) -> str:
    """Which response, for messages."""
    return f"probe {probe.probe_id!r}, response {response_type!r}"


def _named(where: str, write: Callable, *args, **options):
    try:
        return write(*args, **options)
    except ValueError as error:
        raise UnscorableError(f"{where}: ", str(error), "write prompts that it takes") from error
