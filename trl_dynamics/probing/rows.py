"""Training data in TRL's formats as pairs of one prompt with its answers, whatever way the rows were written.

Understood: `prompt` + `chosen` + `rejected`, the same with the prompt inside both answers (with or without a `prompt`
column), `prompt` + `completion`, and `messages`; each as plain text or as chat messages.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from trl.data_utils import extract_prompt

from trl_dynamics.probing.schema import Prompt, is_blank, is_unicode

# Prompts of the HH-RLHF family are dialogues in plain text; the answer begins after the last of these.
DIALOGUE_MARKER = "\n\nAssistant:"
_MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio")
_TOOL_COLUMNS = ("tools", "tool_calls", "functions")


@dataclass(frozen=True)
class Pair:
    """One prompt with its answers as text.

    Args:
        prompt (`str` or `list[dict[str, str]]`): Plain text, or chat messages that end with the user's turn.
        chosen (`str`): The preferred answer, or the completion of data without preferences.
        rejected (`str`, *optional*): The dispreferred answer.
        extra (`dict[str, str]`, *optional*): Response type to text, from columns of the user's own.
        where (`str`, *optional*): Row of the source, for messages.
    """

    prompt: Prompt
    chosen: str
    rejected: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)
    where: str = ""

    @property
    def key(self) -> str:
        """SHA-256 over prompt and answers: what a row is, at any index."""
        content = json.dumps([self.prompt, self.chosen, self.rejected], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def probe_id(self) -> str:
        return self.key[:16]


def read_pairs(
    rows: Iterable[Mapping], *, source: str = "dataset", extra_columns: Mapping[str, str] | None = None
) -> Iterator[Pair | str]:
    """Each row as a [`Pair`], or as the reason why this one cannot be used, such as a blank answer.

    Args:
        rows (`Iterable[Mapping]`): Rows of one dataset; read once, one at a time.
        source (`str`, *optional*): What messages call the data.
        extra_columns (`Mapping[str, str]`, *optional*): Column to the response type that it becomes.

    Raises:
        ValueError: If a row is in no known format, or holds images, tools or tool calls; row and field are named.
    """
    for index, row in enumerate(rows):
        where = f"{source}, row {index}"
        try:
            yield _read_pair(row, where, extra_columns or {})
        except _Unusable as reason:
            yield f"row {index} has {reason}"


def read_prompts(rows: Iterable[Mapping], *, source: str = "dataset") -> tuple[list[Prompt], list[str]]:
    """The prompts of rows, which need no answers, in their order; and reasons for rows that have no usable one.

    Raises:
        ValueError: As [`read_pairs`].
    """
    prompts, reasons = [], []
    for index, row in enumerate(rows):
        where = f"{source}, row {index}"
        try:
            prompts.append(_read_prompt(row, where))
        except _Unusable as reason:
            reasons.append(f"row {index} has {reason}")
    return prompts, reasons


def count_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """Reasons of [`read_pairs`] counted by kind, without their row numbers."""
    return dict(Counter(reason.split(" has ", 1)[1] for reason in reasons))


class _Unusable(Exception):
    """A row that is no pair by its content, which large data sets have a few of."""


def _read_pair(row: Mapping, where: str, extra_columns: Mapping[str, str]) -> Pair:
    _refuse_media_and_tools(row, where)
    prompt, chosen, rejected = _split(row, where)
    prompt = _prompt(prompt, where)
    texts = {"chosen": _text(chosen, "chosen", where)}
    if rejected is not None:
        texts["rejected"] = _text(rejected, "rejected", where)
    for name, text in (({"prompt": prompt} if isinstance(prompt, str) else {}) | texts).items():
        if is_blank(text):
            raise _Unusable(f"a blank {name}")
    for name, value in {"prompt": prompt, **texts}.items():
        if not is_unicode(value):
            raise _Unusable(f"broken Unicode (a lone surrogate) in {name}")
    return Pair(prompt, texts["chosen"], texts.get("rejected"), _extra(row, extra_columns, where), where)


def _read_prompt(row: Mapping, where: str) -> Prompt:
    _refuse_media_and_tools(row, where)
    has_answers = any(row.get(name) is not None for name in ("chosen", "rejected", "completion", "messages"))
    if not has_answers and row.get("prompt") is None:
        raise ValueError(f"{where} has no prompt; found the columns {sorted(row)}, expected 'prompt'")
    prompt = _prompt(_split(row, where)[0] if has_answers else row["prompt"], where)
    if isinstance(prompt, str) and is_blank(prompt):
        raise _Unusable("a blank prompt")
    if not is_unicode(prompt):
        raise _Unusable("broken Unicode (a lone surrogate) in prompt")
    return prompt


def _split(row: Mapping, where: str) -> tuple[object, object, object | None]:
    """Prompt, chosen and rejected of a row unchanged."""
    has = {name for name in ("prompt", "chosen", "rejected", "completion", "messages") if row.get(name) is not None}
    others = {"prompt", "completion"} <= has or "messages" in has
    if others and not isinstance(row.get("chosen"), str | list):
        has -= {"chosen", "rejected"}  # left over from elsewhere, such as scores
    if {"prompt", "chosen"} <= has and _repeats_prompt(row["prompt"], row["chosen"]):
        return _split_implicit(row, where) if "rejected" in has else (row["chosen"][:-1], row["chosen"][-1:], None)
    if {"prompt", "chosen"} <= has:
        return row["prompt"], row["chosen"], row.get("rejected")
    if {"prompt", "completion"} <= has:
        if row.get("label") is False:
            raise _Unusable("a dispreferred completion (label false)")
        return row["prompt"], row["completion"], None
    if {"chosen", "rejected"} <= has and "prompt" not in row:
        return _split_implicit(row, where)
    if "messages" in has:
        messages = row["messages"]
        if not isinstance(messages, list) or len(messages) < 2:
            raise ValueError(f"{where}, field 'messages': expected at least a user's and an assistant's message")
        return messages[:-1], messages[-1:], None
    nulls = [name for name in ("prompt", "chosen", "rejected", "completion") if name in row and row[name] is None]
    if nulls:
        raise ValueError(f"{where}, field {nulls[0]!r} is null; fill it in or remove the row")
    raise ValueError(
        f"{where} has the columns {sorted(row)}; expected prompt+chosen+rejected, chosen+rejected, prompt+completion "
        "or messages: rename the columns of your data (datasets' rename_column) to these"
    )


def _repeats_prompt(prompt: object, chosen: object) -> bool:
    """Whether the answer is a whole chat that has the prompt in it, as UltraFeedback's rows have."""
    if not isinstance(chosen, list) or len(chosen) < 2 or not all(isinstance(m, Mapping) for m in chosen):
        return False
    turns = [message.get("content") for message in chosen[:-1]]
    return prompt in turns if isinstance(prompt, str) else prompt == chosen[:-1]


def _split_implicit(row: Mapping, where: str) -> tuple[object, object, object]:
    chosen, rejected = row["chosen"], row["rejected"]
    for name, other in (("chosen", rejected), ("rejected", chosen)):
        if not row[name] or not isinstance(row[name], str | list) or type(row[name]) is not type(other):
            raise ValueError(
                f"{where}, field {name!r} is {row[name]!r:.80}; expected text or messages, like the other answer, "
                "that begin with the prompt, or a 'prompt' column"
            )
    if isinstance(chosen, str) and DIALOGUE_MARKER in chosen:
        end = chosen.rindex(DIALOGUE_MARKER) + len(DIALOGUE_MARKER)
        if rejected[:end] != chosen[:end]:
            raise _Unusable("a chosen and a rejected that do not answer the same prompt")
        return chosen[:end], chosen[end:], rejected[end:]
    split = extract_prompt({"chosen": chosen, "rejected": rejected})
    if not split["prompt"]:
        raise _Unusable("a chosen and a rejected with no beginning in common, and no prompt column")
    return split["prompt"], split["chosen"], split["rejected"]


def _prompt(prompt: object, where: str) -> Prompt:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"{where}, field 'prompt' is {prompt!r:.80}; expected text or a list of messages")
    messages = [_message(message, "prompt", where) for message in prompt]
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{where}, field 'prompt' ends with an assistant message; move it into the answers")
    return messages


def _text(answer: object, name: str, where: str) -> str:
    if isinstance(answer, str):
        return answer
    if not isinstance(answer, list) or len(answer) != 1:
        raise ValueError(
            f"{where}, field {name!r} is {answer!r:.80}; expected text or one assistant message (put earlier turns "
            "into 'prompt')"
        )
    message = _message(answer[0], name, where)
    if message["role"] != "assistant":
        raise ValueError(f"{where}, field {name!r} is a message of role {message['role']!r}; expected 'assistant'")
    return message["content"]


def _message(message: object, name: str, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise ValueError(f"{where}, field {name!r} holds {message!r:.80}; expected messages with 'role' and 'content'")
    if message.get("tool_calls") or message["role"] == "tool":
        raise ValueError(f"{where}, field {name!r} holds tool calls, which probe sets do not support; remove the row")
    if not isinstance(message["content"], str):
        raise ValueError(
            f"{where}, field {name!r} holds content that is not text ({message['content']!r:.60}); probe sets are "
            "text only"
        )
    return {"role": message["role"], "content": message["content"]}


def _refuse_media_and_tools(row: Mapping, where: str) -> None:
    for names, what in ((_MEDIA_COLUMNS, "images, video or sound"), (_TOOL_COLUMNS, "tools")):
        found = [name for name in names if row.get(name)]
        if found:
            raise ValueError(
                f"{where}, field {found[0]!r}: probe sets do not support {what}; remove the column if the answers do "
                "not depend on it"
            )


def _extra(row: Mapping, columns: Mapping[str, str], where: str) -> dict[str, str]:
    extra = {}
    for column, response_type in columns.items():
        if column not in row:
            raise ValueError(f"{where} has no column {column!r}; found {sorted(row)}")
        if row[column] is not None:
            text = _text(row[column], column, where)
            if not is_blank(text):
                extra[response_type] = text
    return extra
