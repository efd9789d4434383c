"""Batch layouts: which responses share a forward, in which order and with how much padding, frozen for a run.

    B rows   T tokens of a row   N scored positions of a forward   G prompts of a group   P tokens of a prompt

A layout depends on the encoded probes and its own settings alone: not on the number of processes, the step or the
model's weights. So a response is always scored in the same company, and its numbers are comparable bit by bit.

Models with LongRoPE pick their factors by the longest row of a batch. Where a model has such `boundaries`, lengths
above which it computes otherwise, all rows of a batch lie on the same side of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from trl_dynamics.probing.encode import EncodedProbes, EncodedResponse

# A forward's keys reach over the prompts of all its rows; so many times the token budget bounds their number.
_KEYS_PER_TOKEN = 4
# Responses join a forward while they fill this share of its width, or it is still this share of the token budget.
_FILL, _SMALLEST_SHARE = 0.75, 0.125


@dataclass(frozen=True)
class ProbeBatch:
    """One forward's worth of responses.

    Shapes: `input_ids` (B, T), `attention_mask` (B, T), or (B, P + T) where rows continue prompts that ran before;
    `position_ids` (B, T) or None for the model's own numbering; `rows_N`, `cols_N` the positions whose prediction is
    scored, `target_N` the token scored there, `item_N` the index of the response it belongs to and `is_eos_mask_N`
    whether it is that response's end-of-turn token; `prompt_B` the prompt of its group that each row continues.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor | None
    rows_N: torch.Tensor
    cols_N: torch.Tensor
    target_N: torch.Tensor
    item_N: torch.Tensor
    is_eos_mask_N: torch.Tensor
    prompt_B: torch.Tensor | None = None


@dataclass(frozen=True)
class Prompts:
    """Prompts that run once for all their responses: `input_ids` and `attention_mask` (G, P), padded on the left."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    @property
    def position_ids(self) -> torch.Tensor:
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)


@dataclass(frozen=True)
class BatchGroup:
    """What one process scores in one turn: prompts, where they run apart, and then the batches one by one."""

    batches: tuple[ProbeBatch, ...]
    prompts: Prompts | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that run through the model, padding included."""
        prompts = self.prompts.input_ids.numel() if self.prompts else 0
        return prompts + sum(batch.input_ids.numel() for batch in self.batches)


class Layout(Protocol):
    """How responses are laid out in groups of batches; composition and order are fixed by the encoded probes alone."""

    name: str
    tokens_per_batch: int | None
    boundaries: tuple[int, ...]

    def groups(self, encoded: EncodedProbes) -> list[BatchGroup]: ...


def side_of(length: int, boundaries: Sequence[int]) -> tuple[bool, ...]:
    """On which side of each boundary a row of this length is: True above it."""
    return tuple(length > boundary for boundary in boundaries)


@dataclass(frozen=True)
class PaddedLayout:
    """One row per response, rows of similar length together, padded to the longest of their batch.

    Args:
        batch_size (`int`, *optional*): Most rows of a batch.
        pad_id (`int`, *optional*): Token id of the padding.
        padding_side (`str`, *optional*): `"right"` or `"left"`.
        tokens_per_batch (`int`, *optional*): Most tokens of a batch, padding included; a longer row is its own batch.
        boundaries (`tuple[int, ...]`, *optional*): Lengths above which the model computes otherwise.
    """

    batch_size: int | None = None
    pad_id: int = 0
    padding_side: str = "right"
    tokens_per_batch: int | None = None
    boundaries: tuple[int, ...] = ()
    name: str = field(default="padded", init=False)

    def __post_init__(self):
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, expected at least 1")
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {self.padding_side!r}, expected 'left' or 'right'")
        _check_budget(self.tokens_per_batch)

    def at_most(self, tokens: int | None) -> "PaddedLayout":
        """The same with at most so many tokens per batch; with None, as it is."""
        if tokens is None:
            return self
        return replace(self, tokens_per_batch=min(tokens, self.tokens_per_batch or tokens))

    def groups(self, encoded: EncodedProbes) -> list[BatchGroup]:
        """One group per batch."""
        return [BatchGroup((batch,)) for batch in self.batches(encoded)]

    def batches(self, encoded: EncodedProbes, indices: Sequence[int] | None = None) -> list[ProbeBatch]:
        """The frozen batches of a run, by ascending length; with `indices` those of some responses."""
        lengths = [len(item.input_ids) for item in encoded.items]
        order = sorted(range(len(lengths)) if indices is None else indices, key=lambda index: (lengths[index], index))
        cuts, start = [0], 0
        for position, index in enumerate(order):
            # Lengths ascend, so this row is as wide as the batch would be with it.
            rows = position - start + 1
            too_many = self.batch_size is not None and rows > self.batch_size
            too_wide = self.tokens_per_batch and rows * lengths[index] > self.tokens_per_batch
            apart = side_of(lengths[order[start]], self.boundaries) != side_of(lengths[index], self.boundaries)
            if rows > 1 and (too_many or too_wide or apart):
                cuts.append(position)
                start = position
        cuts.append(len(order))
        return [self._batch(encoded, order[a:b]) for a, b in zip(cuts, cuts[1:], strict=False) if b > a]

    def _batch(self, encoded: EncodedProbes, group: list[int]) -> ProbeBatch:
        rows = [encoded.items[index] for index in group]
        input_ids, attention_mask = _pad([row.input_ids for row in rows], self.pad_id, self.padding_side)
        width = input_ids.shape[1]
        offsets = [width - len(row.input_ids) if self.padding_side == "left" else 0 for row in rows]
        first_cols = [offset + len(row.prompt_ids) - 1 for offset, row in zip(offsets, rows, strict=True)]
        # Left padding shifts positions, which the model's own numbering would not know.
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0) if self.padding_side == "left" else None
        return ProbeBatch(input_ids, attention_mask, position_ids, *_scored_positions(encoded, group, first_cols))


@dataclass(frozen=True)
class SharedPrefixLayout:
    """Each prompt runs once, and its responses continue it: rows of a response's own tokens over the prompt's keys.

    A group takes prompts of similar length until its tokens reach the budget; its responses are cut into batches of
    similar length. All but a prompt's last token run ahead: that one predicts the response's first token, and so it
    stands in front of every response.

    Args:
        tokens_per_batch (`int`, *optional*): Most tokens of a group, padding included; prompt and responses of one
            probe stay together even where they are more, but no forward is larger unless a single row is.
        pad_id (`int`, *optional*): Token id of the padding.
        boundaries (`tuple[int, ...]`, *optional*): Lengths above which the model computes otherwise, prompts included:
            longer rows are padded instead.
    """

    tokens_per_batch: int = 4096
    pad_id: int = 0
    boundaries: tuple[int, ...] = ()
    name: str = field(default="shared_prefix", init=False)

    def __post_init__(self):
        _check_budget(self.tokens_per_batch)

    def groups(self, encoded: EncodedProbes) -> list[BatchGroup]:
        """The frozen groups of a run, by ascending length of their prompts; rows above a boundary follow."""
        above = [i for i, item in enumerate(encoded.items) if any(side_of(len(item.input_ids), self.boundaries))]
        shared = [self._group(encoded, families) for families in self._families_by_group(encoded, set(above))]
        if not above:
            return shared
        padded = PaddedLayout(None, self.pad_id, "right", self.tokens_per_batch, self.boundaries)
        return shared + [BatchGroup((batch,)) for batch in padded.batches(encoded, above)]

    def _families_by_group(self, encoded: EncodedProbes, left_out: set[int]) -> list[list[list[int]]]:
        """Responses with the same prompt are a family; families in groups that keep to the budget."""
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for index, item in enumerate(encoded.items):
            if index not in left_out:
                by_prompt.setdefault(item.prompt_ids, []).append(index)
        families = sorted(by_prompt.values(), key=lambda family: (len(encoded.items[family[0]].prompt_ids), family[0]))
        groups: list[list[list[int]]] = []
        response_tokens = 0
        for family in families:
            prompt = max(1, len(encoded.items[family[0]].prompt_ids) - 1)
            own = sum(len(_row_ids(encoded.items[index])) for index in family)
            if groups and response_tokens + own + (len(groups[-1]) + 1) * prompt <= self.tokens_per_batch:
                groups[-1].append(family)
                response_tokens += own
            else:
                groups.append([family])
                response_tokens = own
        return groups

    def _group(self, encoded: EncodedProbes, families: list[list[int]]) -> BatchGroup:
        heads = [encoded.items[family[0]].prompt_ids[:-1] for family in families]
        prompts = Prompts(*_pad(heads, self.pad_id, "left"))
        prompt_of = {index: g for g, family in enumerate(families) for index in family}
        order = sorted(prompt_of, key=lambda index: (-len(_row_ids(encoded.items[index])), index))
        cuts = self._cuts([len(_row_ids(encoded.items[index])) for index in order], prompts.input_ids.shape[1])
        batches = tuple(self._batch(encoded, order[a:b], prompt_of, prompts) for a, b in cuts)
        return BatchGroup(batches, prompts)

    def _cuts(self, lengths: Sequence[int], prompt_length: int) -> list[tuple[int, int]]:
        """Where to cut rows of descending length into batches: little padding, but no needlessly small forward."""
        cuts, start = [], 0
        for position, length in enumerate(lengths):
            rows, width = position - start, lengths[start]
            small = rows * width < _SMALLEST_SHARE * self.tokens_per_batch
            full = (rows + 1) * width > self.tokens_per_batch or (
                (rows + 1) * (width + prompt_length) > _KEYS_PER_TOKEN * self.tokens_per_batch
            )
            if rows and (full or (length < _FILL * width and not small)):
                cuts.append((start, position))
                start = position
        return [*cuts, (start, len(lengths))]

    def _batch(
        self, encoded: EncodedProbes, order: list[int], prompt_of: dict[int, int], prompts: Prompts
    ) -> ProbeBatch:
        input_ids, own_mask = _pad([_row_ids(encoded.items[index]) for index in order], self.pad_id, "right")
        prompt_B = torch.tensor([prompt_of[index] for index in order])
        attention_mask = torch.cat([prompts.attention_mask[prompt_B], own_mask], dim=1)
        # Padding repeats the last position: one beyond it may lie outside the model's context.
        offset_BT = (own_mask.cumsum(-1) - 1).clamp(min=0)
        position_ids = prompts.attention_mask.sum(-1)[prompt_B][:, None] + offset_BT
        scored = _scored_positions(encoded, order, [0] * len(order))
        return ProbeBatch(input_ids, attention_mask, position_ids, *scored, prompt_B)


def _row_ids(item: EncodedResponse) -> tuple[int, ...]:
    """The tokens whose predictions are scored: the prompt's last one and the response's, without the very last."""
    return item.input_ids[len(item.prompt_ids) - 1 : -1]


def _pad(rows: Sequence[Sequence[int]], pad_id: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as one tensor of ids, and 1 where there is a token; at least one column wide."""
    width = max(1, *(len(row) for row in rows))
    input_ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for r, row in enumerate(rows):
        span = slice(width - len(row), width) if side == "left" else slice(len(row))
        input_ids[r, span] = torch.tensor(row, dtype=torch.int64)
        mask[r, span] = 1
    return input_ids, mask


def _scored_positions(
    encoded: EncodedProbes, order: Sequence[int], first_cols: Sequence[int]
) -> tuple[torch.Tensor, ...]:
    """Where each response token and end-of-turn token is predicted: rows, columns, targets, items, whether it ends."""
    scored = []
    for r, (index, first) in enumerate(zip(order, first_cols, strict=True)):
        item = encoded.items[index]
        for k, target in enumerate(item.input_ids[len(item.prompt_ids) :]):
            scored.append((r, first + k, target, index, k >= len(item.response_ids)))
    rows_N, cols_N, target_N, item_N, is_eos_N = torch.tensor(scored).T
    return rows_N, cols_N, target_N, item_N, is_eos_N.bool()


def _check_budget(tokens: int | None) -> None:
    if tokens is not None and tokens < 1:
        raise ValueError(f"probe_tokens_per_batch is {tokens}, expected at least 1")
