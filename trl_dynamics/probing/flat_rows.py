"""Flat rows as a probe set: which columns hold answers, what is left out, what is dropped and what is refused.

A column holds answers if it has the name of a response type or is declared to: by `types`, or by the card of a
folder. Others, such as a source or a score, are named once and left out. The published layout of "Learning Dynamics
of LLM Finetuning" is recognised by its column names.
"""

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trl_dynamics.probing.schema import (
    REQUIRED_TYPES,
    RESERVED_FIELDS,
    Probe,
    ProbeSet,
    is_blank,
    is_known_type,
)

logger = logging.getLogger(__name__)

# Column names of the published helpful-base and UltraFeedback probing files, and ours.
PUBLISHED_NAMES = {
    "chosen": "chosen",
    "rejected": "rejected",
    "chosen_initial": "chosen_initial",
    "chosen_selfr": "chosen_self_rephrase",
    "chosen_gptsemantic": "chosen_rephrase_semantic",
    "chosen_gptformat": "chosen_rephrase_format",
    "reject_gptsemantic": "rejected_rephrase_semantic",
    "reject_gptformat": "rejected_rephrase_format",
    "irr_train": "other_train",
    "irr_test": "other_test",
    "irr_hum": "human_unrelated",
    "random_permute": "chosen_permuted",
    "random_nonhum": "other_test_permuted",
}
_PUBLISHED_ONLY = frozenset(PUBLISHED_NAMES) - frozenset(PUBLISHED_NAMES.values())
_SELF_REPHRASE_LABEL = re.compile(
    r"^(original sentence|rephras\w*|rewritten sentence)[ \t]*(:\s*|\n\s*|$)", re.IGNORECASE
)
_NEXT_TURN = re.compile(r"\n\n(?:A|Human|Assistant):")


def from_rows(
    rows: Sequence[Mapping],
    *,
    name: str = "probes",
    required_types: tuple[str, ...] | None = None,
    types: Sequence[str] = (),
) -> ProbeSet:
    """Flat rows as a probe set.

    A blank optional response drops that response; a row whose chosen or rejected is blank is dropped when the rows
    are in the published layout. Both are counted in `metadata["dropped"]`, columns that hold no answers are listed in
    `metadata["columns_left_out"]`, and each is reported by one warning.

    Args:
        rows (`Sequence[Mapping]`): One per probe: `prompt`, `probe_id` if it has one, and a column per response type.
        name (`str`, *optional*): Of the set.
        required_types (`tuple[str, ...]`, *optional*): Types that every probe must have. None: chosen and rejected, or
            chosen alone where no row has a rejected answer.
        types (`Sequence[str]`, *optional*): Columns that hold answers besides those named like a response type.

    Raises:
        ValueError: If the rows are not a valid probe set, or a column of answers holds something else than text.
    """
    columns = {column for row in rows for column in row}
    if rows and "prompt" not in columns:
        raise ValueError(f"probe set {name!r} has no column 'prompt'; found {sorted(columns)}")
    reader = _Reader(name, bool(columns & _PUBLISHED_ONLY), frozenset(types))
    has_rejected = any(not _is_missing(row.get("rejected")) for row in rows)
    required = (REQUIRED_TYPES if has_rejected else ("chosen",)) if required_types is None else required_types
    for response_type in required:
        if rows and response_type not in columns:
            raise ValueError(
                f"probe set {name!r} has no response type {response_type!r}; found columns {sorted(columns)}: add "
                "that column to the probe data, or rename the one that holds it"
            )
    left_out = sorted(column for column in columns if not reader.holds_answers(column))
    probes = [probe for index, row in enumerate(rows) if (probe := reader.probe(index, row)) is not None]
    if reader.dropped:
        listed = ", ".join(f"{what}: {count}" for what, count in sorted(reader.dropped.items()))
        _warn("probe set %r: blank responses were dropped (%s)", name, listed)
    if left_out:
        _warn(
            "probe set %r: left out %s, which no response type is named like. A column of answers is named with "
            "probe_types (--probe_types %s), or trl-dynamics probes import --columns %s=TYPE",
            name,
            ", ".join(left_out),
            left_out[0],
            left_out[0],
        )
    metadata = {"dropped": dict(sorted(reader.dropped.items()))} if reader.dropped else {}
    metadata |= {"columns_left_out": left_out} if left_out else {}
    return ProbeSet(tuple(probes), name, metadata, tuple(required))


def clean_self_rephrase(text: str) -> str:
    """The rephrase inside the raw output of the published self-rephrase prompt; empty if there is none.

    That output separates attempts by `@@@`, may label them, and may run on into an invented next turn.
    """
    for part in re.split(r"@{3,}", text):
        part = _NEXT_TURN.split(part)[0].strip()
        part = _SELF_REPHRASE_LABEL.sub("", part).strip()
        if part:
            return part
    return ""


@dataclass
class _Reader:
    """Rows of one layout to probes; counts the blank responses that it drops."""

    name: str
    published: bool
    types: frozenset[str]
    dropped: Counter = field(default_factory=Counter)

    def holds_answers(self, column: str) -> bool:
        """Whether a column is read; `prompt`, `probe_id` and `metadata` are, as what they are."""
        known = column in RESERVED_FIELDS or column in self.types or is_known_type(column)
        return known or (self.published and column in PUBLISHED_NAMES)

    def probe(self, index: int, row: Mapping) -> Probe | None:
        """The probe of a row; None where the published layout leaves its chosen or rejected blank.

        Raises:
            ValueError: If a column of answers holds no text.
        """
        responses, blank = {}, []
        for column, text in row.items():
            if column in RESERVED_FIELDS or not self.holds_answers(column) or _is_missing(text):
                continue
            if not isinstance(text, str):
                raise ValueError(
                    f"probe set {self.name!r}, row {index}: response {column!r} is {text!r:.60}; expected text. "
                    "Rename a column that holds no answers; trl-dynamics probes import --columns COLUMN=TYPE gives a "
                    "column of answers its name, and probes build reads chats"
                )
            response_type = PUBLISHED_NAMES.get(column, column) if self.published else column
            text = _clean_published(column, text) if self.published else text
            if is_blank(text) and (self.published or response_type not in REQUIRED_TYPES):
                blank.append(response_type)
            else:
                responses[response_type] = text
        unusable = [name for name in REQUIRED_TYPES if name in blank]
        if unusable:
            self.dropped[f"rows with a blank {unusable[0]}"] += 1
            return None
        self.dropped.update(blank)
        probe_id = row.get("probe_id")
        return Probe(str(index if probe_id is None else probe_id), row.get("prompt"), responses)


def _warn(message: str, *values: str) -> None:
    """A warning, by one process of a launch."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message, *values)


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _clean_published(column: str, text: str) -> str:
    # Some published columns start with the space that follows "Assistant:", others do not: all get exactly one.
    text = (clean_self_rephrase(text) if column == "chosen_selfr" else text).strip()
    return f" {text}" if text else ""
