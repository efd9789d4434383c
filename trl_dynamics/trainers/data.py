"""Training data in TRL's formats: preference rows as SFT rows, blank answers, over-long prompts."""

from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import extract_prompt

from trl_dynamics.probing.schema import is_blank

logger = get_logger(__name__)

PREFERENCE_COLUMNS = ("chosen", "rejected")


def is_preference(dataset: Dataset | IterableDataset) -> bool:
    """Whether rows have chosen and rejected and are not tokenised yet."""
    columns = next(iter(dataset)).keys()
    return set(PREFERENCE_COLUMNS) <= set(columns) and "input_ids" not in columns


def preference_to_completion(dataset: Dataset | IterableDataset, sft_on: str) -> Dataset | IterableDataset:
    """Preference rows as prompt/completion rows.

    Args:
        dataset: Rows with chosen and rejected, with an explicit or an implicit prompt.
        sft_on (`str`): `"chosen"` gives one row per pair, `"both"` two, chosen first, rejected right after it.
    """
    first = next(iter(dataset))
    sides = ("chosen",) if sft_on == "chosen" else PREFERENCE_COLUMNS

    def split(batch: dict[str, list]) -> dict[str, list]:
        pairs = range(len(batch["prompt"]))
        return {
            "prompt": [batch["prompt"][index] for index in pairs for _ in sides],
            "completion": [batch[side][index] for index in pairs for side in sides],
        }

    with PartialState().main_process_first():
        if "prompt" not in first:
            dataset = dataset.map(extract_prompt)
        return dataset.map(split, batched=True, remove_columns=list(first.keys() | {"prompt"}))


def check_answers(
    dataset: Dataset, *, drop_invalid_rows: bool, columns: tuple[str, ...] = (*PREFERENCE_COLUMNS, "completion")
) -> Dataset:
    """Refuse rows whose chosen, rejected or completion is blank, or drop them when asked to.

    Args:
        dataset: Rows of strings or chats.
        drop_invalid_rows (`bool`): Drop them.
        columns (`tuple[str, ...]`, *optional*): What must not be blank, where the data has it.

    Raises:
        ValueError: If a row is blank and `drop_invalid_rows` is not set; the first such row is named.
    """
    columns = tuple(name for name in columns if name in dataset.column_names)
    blank = [
        (index, name)
        for name in columns
        for index, answer in enumerate(dataset[name])
        if is_blank(_answer_text(answer))
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


def limit_prompts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int) -> Dataset:
    """Cut plain prompts to their last tokens, special tokens such as BOS included in the count.

    The cut is made in the text, where a token begins, so that TRL tokenises the row as it would any other.

    Raises:
        ValueError: If prompts are chats, which cannot be cut without breaking their template, or no text fits.
    """
    if "prompt" not in dataset.column_names or not isinstance(dataset[0]["prompt"], str):
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


def _answer_text(answer: str | list[dict] | None) -> str | None:
    return " ".join(message["content"] or "" for message in answer) if isinstance(answer, list) else answer
