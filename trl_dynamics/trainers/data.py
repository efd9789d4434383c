"""Training data in TRL's formats: preference rows as SFT rows, blank answers, over-long prompts."""

from collections import Counter, deque
from collections.abc import Callable

from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from trl import maybe_extract_prompt

from trl_dynamics.probing.schema import is_blank
from trl_dynamics.trainers.sides import SIDE_COLUMN

logger = get_logger(__name__)

ANSWER_COLUMNS = ("chosen", "rejected", "completion")
# What the rows of one pair answer, in order, by the value of `sft_on`.
SFT_ON = {
    "chosen": ("chosen",),
    "both": ("chosen", "rejected"),
    "chosen_twice": ("chosen", "chosen"),
    "chosen_and_other": ("chosen", "other"),
}
# Columns besides prompt and answer that change how TRL tokenises a row.
_KEPT_COLUMNS = ("tools", "chat_template_kwargs")
# Streams are looked into several times before training, one batch at a time.
_STREAM_BATCH = 16


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Names of the columns; a stream that does not know its own is asked for its first row, and starts anew."""
    names = getattr(dataset, "column_names", None)
    return list(next(iter(dataset)).keys()) if names is None else names


def sides_of(sft_on: str) -> tuple[str, ...]:
    """The sides that SFT tells apart, in order; none where all rows are chosen answers."""
    sides = tuple(dict.fromkeys(SFT_ON[sft_on]))
    return sides if len(sides) > 1 else ()


def preference_to_completion(dataset: Dataset | IterableDataset, sft_on: str) -> Dataset | IterableDataset:
    """Rows with chosen answers as prompt/completion rows, those of one pair next to each other.

    Where the rows have several sides, `SIDE_COLUMN` holds which one a row is: 1, 2, ... as in `sides_of`.

    Args:
        dataset: Rows with chosen and rejected, with an explicit or an implicit prompt; without rejected where
            `sft_on` needs none, with an explicit prompt.
        sft_on (`str`): A key of `SFT_ON`. `"chosen"` gives one row per pair; `"both"` two, chosen first; the others
            are controls of `"both"`, with as many rows: `"chosen_twice"` gives chosen twice, `"chosen_and_other"` the
            chosen answer, then another prompt's chosen answer as `other_rows` says.

    Raises:
        ValueError: If rows have images or lack an answer that `sft_on` needs, a prompt is text and answers are chats
            without it, or `"chosen_and_other"` is asked for of a stream or of data without enough other prompts.
    """
    names = column_names(dataset)
    if {"image", "images"} & set(names):
        raise ValueError(
            f"sft_on={sft_on!r} makes SFT rows of text pairs, and these pairs have images; make prompt/completion "
            "rows of them beforehand"
        )
    if sft_on == "chosen_and_other" and not isinstance(dataset, Dataset):
        raise ValueError(
            "sft_on='chosen_and_other' pairs each prompt with another one's answer and needs all rows at once, but "
            "the data is a stream; load it without streaming"
        )
    answers, sides = SFT_ON[sft_on], sides_of(sft_on)
    if "rejected" in answers and "rejected" not in names:
        raise ValueError(
            f"sft_on={sft_on!r} needs chosen and rejected answers; found the columns {sorted(names)}. "
            "sft_on='chosen' trains on the chosen ones"
        )
    kept = [name for name in _KEPT_COLUMNS if name in names]

    def split(batch: dict[str, list]) -> dict[str, list]:
        pairs = range(len(batch["prompt"]))
        rows = {name: [batch[name][index] for index in pairs for _ in answers] for name in ("prompt", *kept)}
        rows["completion"] = [batch[answer][index] for index in pairs for answer in answers]
        if sides:
            rows[SIDE_COLUMN] = [sides.index(answer) + 1 for _ in pairs for answer in answers]
        return rows

    with PartialState().main_process_first():
        if "prompt" in names and next(iter(dataset))["prompt"] is None:
            dataset = dataset.remove_columns("prompt")
            names = [name for name in names if name != "prompt"]
        if "prompt" not in names or _repeats_prompt(next(iter(dataset))):
            dataset = dataset.map(maybe_extract_prompt if "rejected" in names else _split_chat)
        if "other" in answers:
            dataset = _with_other(dataset)
        # Sorted: the fingerprint by which prepared data is found again, also by other processes, holds the order.
        used = sorted({*names, "prompt", *answers} - set(kept))
        batch_size = 1000 if isinstance(dataset, Dataset) else _STREAM_BATCH
        return dataset.map(split, batched=True, batch_size=batch_size, remove_columns=used)


def other_rows(prompts: list, answers: list) -> list[int]:
    """For each row another row, with another prompt and another answer; each row once, always the same ones.

    The rows half of the data away; where one of these has the same prompt or answer, rows hand theirs on in a circle,
    most often two that swap.

    Unless a prompt or an answer makes up more than half of the rows, there is a solution. By Hall's theorem it is
    enough that any rows S and the rows X, none of which fits any of S, are together no more than all rows. Call P and
    A the rows with some prompt and those with some answer, each at most half. If S shares a prompt, and not an answer,
    both S and X lie in its P. If S is of one kind, S lies in P and in A, X in one of them. Otherwise X is of one kind,
    with X and S the other way round, or X and S are of two kinds each and have no row in common.

    Raises:
        ValueError: If a prompt or an answer makes up more than half of the rows.
    """
    num_rows, prompts, answers = len(prompts), _numbered(prompts), _numbered(answers)
    for kind, of_rows in (("prompt", prompts), ("chosen answer", answers)):
        for value, count in Counter(of_rows).most_common(1):
            if 2 * count > num_rows:
                raise ValueError(
                    f"sft_on='chosen_and_other' cannot give every row an answer of another prompt: the {kind} of row "
                    f"{of_rows.index(value)} is that of {count} of {num_rows} rows; it needs data of which no prompt "
                    "and no chosen answer makes up more than half"
                )
    others = [(index + num_rows // 2) % num_rows for index in range(num_rows)]

    def fits(row: int, other: int) -> bool:
        return prompts[row] != prompts[other] and answers[row] != answers[other]

    for row in range(num_rows):
        if not fits(row, others[row]):
            circle = _circle(row, others, fits)
            handed_on = [others[giver] for giver in [*circle[1:], row]]
            for taker, other in zip(circle, handed_on, strict=True):
                others[taker] = other
    return others


def _circle(row: int, others: list[int], fits: Callable[[int, int], bool]) -> list[int]:
    """The fewest rows, `row` first, each of which fits the other of the next one, the last that of `row`.

    There is one wherever there is a solution: follow each row to the one that now has what it gets there.
    """
    taker_of, queue, num_rows = {row: row}, deque([row]), len(others)
    while True:
        taker = queue.popleft()
        for giver in ((row + step) % num_rows for step in range(1, num_rows)):
            if giver in taker_of or not fits(taker, others[giver]):
                continue
            taker_of[giver] = taker
            if fits(giver, others[row]):
                circle = [giver]
                while circle[-1] != row:
                    circle.append(taker_of[circle[-1]])
                return circle[::-1]
            queue.append(giver)


def _numbered(values: list) -> list[int]:
    """Numbers that are equal where the values, texts or chats, are."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(repr(value), len(numbers)) for value in values]


def _with_other(dataset: Dataset) -> Dataset:
    """Rows with one more column: another row's chosen answer."""
    others = other_rows(dataset["prompt"][:], dataset["chosen"][:])
    column = dataset.select(others).select_columns(["chosen"]).rename_column("chosen", "other")
    without = dataset.remove_columns("other") if "other" in dataset.column_names else dataset
    return concatenate_datasets([without, column], axis=1)


def _repeats_prompt(row: dict) -> bool:
    """Whether there is a prompt as text besides chats that begin with it.

    Raises:
        ValueError: If they do not begin with it.
    """
    prompt, chosen = row["prompt"], row["chosen"]
    if isinstance(chosen, list) and isinstance(prompt, str) and len(chosen) < 2:
        raise ValueError(
            f"training data has a prompt that is text ({prompt!r:.60}) and chosen answers that are one message; make "
            "both text, or both lists of messages"
        )
    return isinstance(prompt, str) and isinstance(chosen, list)


def _split_chat(row: dict) -> dict:
    """The prompt and the answer of a whole chat, which is all that `maybe_extract_prompt` finds in two of them."""
    return {"prompt": row["chosen"][:-1], "chosen": row["chosen"][-1:]}


def check_answers(dataset: Dataset, *, drop_invalid_rows: bool, columns: tuple[str, ...] = ANSWER_COLUMNS) -> Dataset:
    """Refuse rows whose chosen, rejected or completion is blank, or drop them when asked to.

    Args:
        dataset: Rows of strings or chats.
        drop_invalid_rows (`bool`): Drop them.
        columns (`tuple[str, ...]`, *optional*): What must not be blank, where the data has it.

    Raises:
        ValueError: If a row is blank and `drop_invalid_rows` is not set, or a column holds no text; the first such row
            is named.
    """
    columns = tuple(name for name in columns if name in dataset.column_names)
    blank = [
        (index, name)
        for name in columns
        for index, answer in enumerate(dataset[name])
        if _is_blank_answer(answer, index, name)
    ]
    if not blank:
        return dataset
    rows = {index for index, _ in blank}
    if not drop_invalid_rows:
        index, name = min(blank)
        raise ValueError(
            f"training data row {index} has a blank {name!r} ({len(rows)} such rows of {len(dataset)}); fix the data "
            "or pass --drop_invalid_rows"
        )
    logger.warning(f"dropped {len(rows)} of {len(dataset)} training rows with a blank {' or '.join(columns)}")
    return dataset.select([index for index in range(len(dataset)) if index not in rows])


def limit_prompts(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int
) -> Dataset | IterableDataset:
    """Cut plain prompts to their last tokens, special tokens such as BOS included in the count.

    The cut is made in the text, where a token begins, so that TRL tokenises the row as it would any other.

    Raises:
        ValueError: If prompts are chats, which cannot be cut without breaking their template, or no text fits.
    """
    if "prompt" not in column_names(dataset) or not isinstance(next(iter(dataset))["prompt"], str):
        raise ValueError(
            "max_prompt_length cuts plain text prompts only; these rows have chat messages or no prompt column. "
            "Shorten or filter them beforehand, or leave max_prompt_length out"
        )
    with PartialState().main_process_first():
        return dataset.map(lambda row: {"prompt": _last_tokens(row["prompt"], tokenizer, max_prompt_length)})


def _last_tokens(text: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> str:
    encoded = tokenizer(text=text, return_offsets_mapping=True)
    num_tokens = len(encoded["input_ids"])
    if num_tokens <= limit:
        return text
    starts = [start for start, end in encoded["offset_mapping"][num_tokens - limit :] if end > start]
    # The cut text may have more tokens than were left of the whole: some tokenizers mark the beginning of a text,
    # and a character may be several tokens. So the cut moves on until the rest fits.
    for start in starts:
        if len(tokenizer(text=text[start:])["input_ids"]) <= limit:
            return text[start:]
    raise ValueError(f"max_prompt_length {limit} leaves no room for text of the prompt {text[-40:]!r}; raise it")


def _is_blank_answer(answer: object, index: int, name: str) -> bool:
    if isinstance(answer, list) and all(isinstance(message, dict) for message in answer):
        answer = " ".join(_message_text(message) for message in answer)
    if answer is not None and not isinstance(answer, str):
        raise ValueError(
            f"training data row {index} has {answer!r:.60} under {name!r}; expected text or messages: rename the "
            "column that holds them to it"
        )
    return is_blank(answer)


def _message_text(message: dict) -> str:
    """A message's text; content may come in parts, of which those without text are no blank answer either, as is a
    tool call."""
    content = message.get("content")
    if message.get("tool_calls"):
        return "tool call"
    if isinstance(content, list):
        return " ".join(part.get("text") or part["type"] for part in content)
    return content or ""
