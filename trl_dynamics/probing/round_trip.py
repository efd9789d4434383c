"""Whether scored tokens are the answer: they must decode to what the tokenizer makes of the answer and back.

A tokenizer may lose letters, case or accents; it loses the same ones in both, so only true differences count. White
space never counts, since tokenizers move it between a prompt and its answer.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Wanted:
    """What is to be scored.

    Args:
        answer (`str`): The answer's text.
        framed (`str`): The answer with what may be scored before it: what a chat template writes.
        starts (`Sequence[int]`): Tokens at which it may start, the best one first.
        ends (`frozenset[int]`): Token ids that end any answer.
        closing (`frozenset[int]`): Token ids that close this one if they follow it.
        tail (`str`, *optional*): What a chat template writes behind the answer.
    """

    answer: str
    framed: str
    starts: Sequence[int]
    ends: frozenset[int]
    closing: frozenset[int] = frozenset()
    tail: str | None = None


@dataclass(frozen=True)
class Found:
    """Where the answer is among the tokens of prompt and answer.

    Args:
        start (`int`): Its first token.
        end (`int`): The first token behind it.
        eos_id (`int`, *optional*): The token that ends it; None if none does.
        cut (`bool`): Whether that token is inside the answer, the rest of which is not scored.
        added (`str`): What is scored before it, without white space.
    """

    start: int
    end: int
    eos_id: int | None
    cut: bool
    added: str


class RoundTrip:
    """Texts through a tokenizer and back.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer

    def of(self, text: str) -> str:
        """What is left of a text, without white space."""
        return self.decode(self._tokenizer(text=text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens as text, special ones too, without white space."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return "".join(text.split())

    def find(self, ids: Sequence[int], wanted: Wanted) -> Found | None:
        """Where the answer is among the tokens of prompt and answer; None if these are another text."""
        for answer, framed in self._readings(wanted):
            for start in wanted.starts:
                for end in _ends(ids, start, wanted.ends | wanted.closing):
                    lead = self._lead(ids[:start], ids[start:end], answer, framed)
                    if lead is not None:
                        return self._ended(ids, start, end, lead, wanted)
                if wanted.tail is not None and (found := self._before_text(ids, start, answer, framed, wanted.tail)):
                    return found
        return None

    def _readings(self, wanted: Wanted) -> Iterator[tuple[str, str]]:
        """What is left of the answer, and of it with its frame: some tokenizers read white space as unknown letters,
        which outer white space may have or not."""
        for text, framed in dict.fromkeys(
            (change(wanted.answer), wanted.framed[: len(wanted.framed) - len(wanted.answer)] + change(wanted.answer))
            for change in (str, str.strip, str.lstrip, str.rstrip)
        ):
            answer = self.of(text)
            yield answer, answer if framed == text else self.of(framed)

    def _before_text(self, ids: Sequence[int], start: int, answer: str, framed: str, tail: str) -> Found | None:
        """An answer that a template closes with text: the fewest tokens that hold it."""
        number = bisect.bisect_left(
            range(len(ids) - start), True, key=lambda number: answer in self.decode(ids[start : start + number])
        )
        end = start + number
        lead = self._lead(ids[:start], ids[start:end], answer, framed)
        if lead is None or self.decode(ids[end:]) != self.of(tail):
            return None
        return Found(start, end, None, False, self.decode(ids[start:end])[:lead])

    def _lead(self, before: Sequence[int], ids: Sequence[int], answer: str, framed: str) -> int | None:
        """How many letters of the template these tokens hold before the answer; None if they hold anything else."""
        text = self.decode(ids)
        if text != answer:
            # Some tokens read otherwise behind others: pieces that continue a word.
            whole, head = self.decode([*before, *ids]), self.decode(before)
            text = whole[len(head) :] if whole.startswith(head) else text
        known = text == answer or (len(text) > len(answer) and framed.endswith(text))
        return len(text) - len(answer) if known else None

    def _ended(self, ids: Sequence[int], start: int, end: int, lead: int, wanted: Wanted) -> Found:
        """The answer up to the first token that ends it."""
        last = set(ids[end : end + 1]) & (wanted.ends | wanted.closing)
        ends, added = wanted.ends | last, self.decode(ids[start:end])[:lead]
        for index in range(start, end):
            if ids[index] in ends and len(self.decode(ids[start:index])) >= lead:
                lost = self.decode([token for token in ids[index:end] if token not in ends])
                return Found(start, index, ids[index], bool(lost), added)
        return Found(start, end, last.pop() if last else None, False, added)


def _ends(ids: Sequence[int], start: int, ends: frozenset[int]) -> Iterator[int]:
    """Where an answer may end: at the first token that can end it, else at later ones, the last first."""
    found = [index for index in range(start, len(ids)) if ids[index] in ends] + [len(ids)]
    yield found[0]
    yield from reversed(found[1:])
