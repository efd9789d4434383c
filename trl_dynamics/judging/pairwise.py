"""A language model as judge: it sees prompt and both answers, and says A, B or tie."""

import hashlib
import re
from collections.abc import Iterator, Sequence

from trl_dynamics.judging.match import FIRST, SECOND, TIE, UNPARSABLE, Showing, Verdict, prompt_text
from trl_dynamics.probing.generate import Answer, Failure, Generator, Request, Sampling

# In its words, A is the answer that is shown first and B the other one, whichever side they are of.
INSTRUCTION = """\
Compare two answers to the same prompt. Which one is better: more correct, more helpful, better written? Neither the \
order in which they are shown nor their length counts.

[Prompt]
{prompt}
[End of prompt]

[Answer A]
{first}
[End of answer A]

[Answer B]
{second}
[End of answer B]

End with a line that holds nothing but your verdict: A, B or tie."""
_SLOT = re.compile(r"\{(prompt|first|second)\}")
_VERDICT = re.compile(r"[\W_]*(?:(?:final\W+)?(?:verdict|answer)[\W_]+)?(a|b|tie)[\W_]*", re.IGNORECASE)
_CHOICES = {"a": FIRST, "b": SECOND, "tie": TIE}


class PairwiseJudge:
    """A model that compares, such as [`probing.server.OpenAIServer`].

    Args:
        generator ([`Generator`]): Who is asked; takes chat messages.
        instruction (`str`, *optional*): The question, with `{prompt}`, `{first}` and `{second}`.
        max_new_tokens (`int`, *optional*): Room for the judge's reasons and its verdict; one that is cut has none.

    Raises:
        ValueError: If the instruction lacks a slot.
    """

    sees_order = True

    def __init__(self, generator: Generator, instruction: str = INSTRUCTION, max_new_tokens: int = 512):
        lacking = {"prompt", "first", "second"} - set(_SLOT.findall(instruction))
        if lacking:
            raise ValueError(f"the judge's instruction has no {{{min(lacking)}}}; it needs prompt, first and second")
        self.generator, self.instruction = generator, instruction
        self.sampling = Sampling(max_new_tokens)
        self.about = {
            "model": generator.name,
            "instruction": hashlib.sha256(instruction.encode()).hexdigest(),
            "max_new_tokens": max_new_tokens,
        }

    def judge(self, showings: Sequence[Showing]) -> Iterator[tuple[Showing, Verdict | Failure]]:
        """Ask for each showing; see [`parse`] for what counts as a verdict."""
        # Answers that differ in the space around them alone make one question of both orders.
        asked: dict[Request, list[Showing]] = {}
        for showing in showings:
            asked.setdefault(self._request(showing), []).append(showing)
        for request, outcome in self.generator.generate(list(asked)):
            for showing in asked[request]:
                yield showing, outcome if isinstance(outcome, Failure) else parse(outcome)

    def _request(self, showing: Showing) -> Request:
        slots = dict(zip(("first", "second"), showing.texts, strict=True)) | {
            "prompt": prompt_text(showing.match.prompt)
        }
        # In one pass: an answer may hold what looks like a slot.
        question = _SLOT.sub(lambda slot: slots[slot[1]].strip(), self.instruction)
        return Request.of([{"role": "user", "content": question}], self.sampling)


def parse(answer: Answer) -> Verdict:
    """The verdict that stands alone on the last line: `A`, `B` or `tie`, in any case, with or without punctuation
    around it and the word verdict or answer before it. All else, a refusal or a cut answer is unparsable."""
    lines = answer.text.strip().splitlines()
    found = _VERDICT.fullmatch(lines[-1]) if lines and answer.finish == "stop" else None
    return Verdict(_CHOICES[found[1].lower()] if found else UNPARSABLE, answer.text)
