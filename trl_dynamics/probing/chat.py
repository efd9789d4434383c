"""Chats as a template writes them: which form of content it reads, and where in its text the answer is."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, ProcessorMixin

# Letters of a text that a message shows.
MOST_LETTERS = 50
# An answer that shows what a template writes around every answer.
_STAND_IN = "Plain words"
# A list of parts that a template wrote as if it were text.
_LISTING = re.compile(rf"""['"]text['"]: *['"]{_STAND_IN}""")
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)


def tokenizer_of(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer of a processor; a tokenizer is its own."""
    return getattr(processing_class, "tokenizer", processing_class)


@dataclass(frozen=True)
class Frame:
    """What a template writes around any answer to one prompt.

    Args:
        parts (`bool`): Whether the template reads contents as lists of parts; else it reads text.
        history (`str`): The prompt's messages.
        opening (`str`): The generation prompt, which follows the messages and asks for an answer.
        before (`str`, *optional*): What comes between messages and answer; None if the template leaves answers out.
        after (`str`, *optional*): What follows an answer; None if the template leaves answers out.
        special (`tuple[str, ...]`): Special and added tokens, the longest first; those behind an answer may differ.
    """

    parts: bool
    history: str
    opening: str
    before: str | None
    after: str | None
    special: tuple[str, ...] = ()

    def locate(self, answer: str, chat: str) -> tuple[int, int] | None:
        """Start and end of an answer in the text of prompt and answer, with what is left of its outer white space.

        None if the answer is not there as it is, or if there is more than answer and frame.
        """
        rest, text = chat[len(self.history) :], answer.strip()
        after, start = self._bare(self.after or ""), len(rest)
        while text and (start := rest.rfind(text, 0, start + len(text) - 1)) >= 0:
            # An answer may itself bring the last words of what the template writes before it.
            fits = any((before or "").startswith(rest[:start].rstrip()) for before in (self.before, self.opening))
            end = start + len(text)
            if fits and self._bare(rest[end:]) == after:
                return len(self.history) + self._first(rest, start), len(self.history) + self._last(rest, end)
        return None

    def _first(self, rest: str, start: int) -> int:
        """Where white space starts that belongs to an answer at `start`."""
        before = len(self.before or "")
        return before if before < start and not rest[before:start].strip() else start

    def _last(self, rest: str, end: int) -> int:
        """Where white space ends that belongs to an answer up to `end`."""
        last = len(rest) - len(self.after or "")
        return last if end < last and not rest[end:last].strip() else end

    def written(self, chat: str) -> str:
        """What the template made of an answer."""
        rest = chat[len(self.history) :]
        whole = self.before is not None and rest.startswith(self.before)
        rest = rest.removeprefix(self.before if whole else os.path.commonprefix([rest, self.opening]))
        rest = rest.strip().removesuffix((self.after or "").strip()).strip()
        while last := next((token for token in self.special if rest.endswith(token)), None):
            rest = rest.removesuffix(last).strip()
        return rest

    def _bare(self, text: str) -> str:
        """A text without special tokens and white space."""
        for token in self.special:
            text = text.replace(token, "")
        return "".join(text.split())

    def difference(self, answer: str, chat: str) -> str:
        """What the template did to an answer that [`locate`] does not find, in words."""
        text, found = answer.strip(), self.written(chat)
        same = len(os.path.commonprefix([text, found]))
        text, found = text[same:], found[same:]
        same = len(os.path.commonprefix([text[::-1], found[::-1]]))
        lost, put = text[: len(text) - same], found[: len(found) - same]
        if not put:
            return f"leaves out {shorten(lost)}"
        return f"writes {shorten(put)} in place of {shorten(lost)}" if lost else f"adds {shorten(put)}"


class Chats:
    """Chats through the template of a tokenizer or processor, as TRL's trainers write them.

    A template of a processor is given contents as lists of parts, and one of a tokenizer text; if that loses the text
    and the other form keeps it, then the other form.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]): The model's.

    Raises:
        ValueError: From all methods, if the template refuses the messages.
    """

    def __init__(self, processing_class):
        has_own = getattr(processing_class, "chat_template", None)
        self._writer = processing_class if has_own else tokenizer_of(processing_class)
        self._is_processor = isinstance(self._writer, ProcessorMixin)
        tokenizer = tokenizer_of(processing_class)
        added = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} if self.has_template else ()
        self._special = tuple(sorted(added, key=len, reverse=True))

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template at all."""
        return bool(getattr(self._writer, "chat_template", None))

    def text(self, messages: Sequence[dict], parts: bool, opening: bool = False) -> str:
        """The chat as text; with `opening` it ends with the generation prompt."""
        return self._apply(messages, parts, tokenize=False, add_generation_prompt=opening)

    def ids(self, messages: Sequence[dict], parts: bool, opening: bool = False) -> list[int]:
        """The chat as token ids."""
        ids = self._apply(messages, parts, tokenize=True, return_dict=True, add_generation_prompt=opening)["input_ids"]
        # Processors answer with a batch, even to one chat.
        return list(ids[0]) if len(ids) and not isinstance(ids[0], int) else list(ids)

    def frame(self, prompt: Sequence[dict]) -> Frame:
        """What the template writes around answers to this prompt."""
        tried = {}
        for parts in (True, False) if self._is_processor else (False, True):
            try:
                tried[parts] = self.text([*prompt, answer_message(_STAND_IN)], parts)
            except ValueError:
                continue
            if _keeps(tried[parts], [*prompt[-1:], answer_message(_STAND_IN)]):
                return self._frame(prompt, parts, tried[parts])
        kept = [parts for parts, chat in tried.items() if _keeps(chat, [answer_message(_STAND_IN)])]
        parts = kept[0] if kept else self._is_processor
        return self._frame(prompt, parts, tried.get(parts, ""))

    def _frame(self, prompt: Sequence[dict], parts: bool, chat: str) -> Frame:
        asked = self.text(prompt, parts, opening=True)
        try:
            history = os.path.commonprefix([asked, self.text(prompt, parts)])
        except ValueError:
            history = asked
        # The generation prompt may begin with letters that the template writes at the end of a chat as well.
        shared, last = os.path.commonprefix([history, chat]), _text(prompt[-1]).strip()
        if last and history.rfind(last) + len(last) <= len(shared) and last in history:
            history = shared
        opening, rest = asked[len(history) :], chat[len(history) :]
        found = re.search(_STAND_IN, rest, re.IGNORECASE) if chat.startswith(history) else None
        around = (found and rest[: found.start()], found and rest[found.end() :])
        return Frame(parts, history, opening, *around, special=self._special)

    def _apply(self, messages: Sequence[dict], parts: bool, **options):
        try:
            return self._writer.apply_chat_template(_as_parts(messages) if parts else list(messages), **options)
        except _TEMPLATE_ERRORS as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"the chat template refuses the messages: {reason:.200}") from error


def answer_message(text: str) -> dict[str, str]:
    """An answer as the message of the assistant."""
    return {"role": "assistant", "content": text}


def shorten(text: str) -> str:
    """A text for a message: quoted, and cut if it is long."""
    return repr(text) if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]!r}..."


def _keeps(chat: str, messages: Sequence[dict]) -> bool:
    """Whether a chat holds the text of these messages, in whatever case, and as text."""
    texts = (_text(message).strip().casefold() for message in messages)
    return not _LISTING.search(chat) and all(text in chat.casefold() for text in texts)


def _text(message: dict) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _as_parts(messages: Sequence[dict]) -> list[dict]:
    return [
        message | {"content": [{"type": "text", "text": message["content"]}]} if _text(message) else message
        for message in messages
    ]
