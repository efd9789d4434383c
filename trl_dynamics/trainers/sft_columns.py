"""Which columns SFT trains on: TRL's own where its SFTTrainer can train on them, else the answers of pairs.

Follows `trl.SFTTrainer._prepare_dataset`, which looks at the first row: tokens, then prompt and completion, then
messages, then the text field. A prompt without a completion is an error there, whatever else a row has. With images,
its collator looks for messages, then the text field, then prompt and completion.
"""

from collections.abc import Mapping

from datasets import Dataset, IterableDataset
from trl.data_utils import is_conversational_from_value

# TRL takes any one of these, in no fixed order, to tell chats from plain text.
_CHAT_OR_TEXT = ("prompt", "chosen", "rejected", "completion", "messages")
_IMAGES = ("image", "images")


def first_row(dataset: Dataset | IterableDataset) -> Mapping | None:
    """The row that decides, as in TRL; None where there is none, or where TRL refuses the data anyway."""
    if not isinstance(dataset, Dataset | IterableDataset):
        return None
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        return None
    return next(iter(dataset), None)


def own_columns(row: Mapping, text_field: str = "text") -> tuple[str, ...]:
    """The columns that TRL's SFTTrainer trains on in data whose first row is this; none where it cannot train.

    Args:
        row (`Mapping`): The first row.
        text_field (`str`, *optional*): `dataset_text_field` of the trainer's arguments.
    """
    if "input_ids" in row:
        return ("input_ids",)
    if _has_images(row):
        layouts = (("messages",), (text_field,), ("prompt", "completion"))
        return next((names for names in layouts if all(row.get(name) is not None for name in names)), ())
    if "prompt" in row:
        return ("prompt", "completion") if _is_answered(row) else ()
    if is_conversational_from_value(row):
        return ("conversations",)
    if is_chat(row.get("messages")):
        return ("messages",)
    if not isinstance(row.get(text_field), str):
        return ()
    # Where all that could be chats are chats, TRL looks for messages.
    kinds = {is_chat(row[name]) for name in _CHAT_OR_TEXT if name in row}
    return () if kinds == {True} else (text_field,)


def left_over_columns(row: Mapping, own: tuple[str, ...]) -> list[str]:
    """Columns that TRL does not train on but might take `own` for chats by, or for plain text: those of other kind."""
    if own == ("input_ids",) or _has_images(row):
        return []
    chats = own == ("conversations",) or is_chat(row[own[-1]])
    return [name for name in _CHAT_OR_TEXT if name in row and name not in own and is_chat(row[name]) != chats]


def has_answers(row: Mapping) -> bool:
    """Whether a row has a chosen answer, as text or chat, and a prompt: a column of its own, or in both answers."""
    return _is_text(row.get("chosen")) and (_is_text(row.get("prompt")) or _is_text(row.get("rejected")))


def is_chat(value: object) -> bool:
    """Whether this is a list of messages with roles."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def _is_text(value: object) -> bool:
    return isinstance(value, str) or is_chat(value)


def _has_images(row: Mapping) -> bool:
    return any(name in row for name in _IMAGES)


def _is_answered(row: Mapping) -> bool:
    prompt, completion = row["prompt"], row.get("completion")
    return _is_text(prompt) and _is_text(completion) and is_chat(prompt) == is_chat(completion)
