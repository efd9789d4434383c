"""The sides of a pair in SFT: each label carries its side through truncation and packing, each batch gives sums.

TRL's packing keeps `input_ids` and `labels` only, and a packed row holds documents of several sides, or parts of them.
So the side travels in the label itself: label + mark * 2**32, mark 1, 2, ... for the sides of a pair and 0 for data
without pairs. -100 stays -100. The collator takes the marks off again, so that losses see plain labels.
"""

from collections.abc import Callable

import torch
from datasets import Dataset, IterableDataset

SIDE_COLUMN = "trl_dynamics_side"
LABEL_SIDE, LABEL_ROW = "label_side", "label_row"

_BITS = 32


def mark_labels(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Rows of `input_ids`, `labels` and `SIDE_COLUMN`, which goes: its mark moves into the labels."""

    def mark(row: dict) -> dict:
        offset = row[SIDE_COLUMN] << _BITS
        return {"labels": [label if label == -100 else label + offset for label in row["labels"]]}

    return dataset.map(mark, remove_columns=SIDE_COLUMN)


class SideCollator:
    """The trainer's collator, with the marks of the labels as a tensor of their own.

    Adds to its batch `label_side`, of the labels' shape: 0 for no side, -1 for an ignored label; and, where rows are
    laid end to end (padding-free), `label_row`, of the same shape: which row of the batch a label belongs to.

    Args:
        collator (`Callable`): Makes a batch with `labels` from rows.
    """

    def __init__(self, collator: Callable[[list[dict]], dict]):
        self.collator = collator

    def __call__(self, rows: list[dict]) -> dict:
        batch = self.collator(rows)
        if "labels" not in batch:
            return batch
        marked = batch["labels"]
        side = marked >> _BITS
        batch["labels"] = marked - (side.clamp(min=0) << _BITS)
        batch[LABEL_SIDE] = side.to(torch.int8)
        if getattr(self.collator, "padding_free", False):
            lengths = torch.tensor([len(row["labels"]) for row in rows])
            row_of = torch.arange(len(rows)).repeat_interleave(lengths)
            # Padding to a multiple comes after the last row and has no labels.
            batch[LABEL_ROW] = torch.cat([row_of, row_of[-1:].expand(marked.shape[1] - len(row_of))])[None]
        return batch


def side_sums(
    logp_BT: torch.Tensor,
    is_top1_BT: torch.Tensor,
    side_BT: torch.Tensor,
    row_BT: torch.Tensor | None,
    num_sides: int,
) -> torch.Tensor:
    """Per row and side: the sum of -log p (nats), the number of most likely labels, the number of labels.

    Args:
        logp_BT (`torch.Tensor`): Log-probability of each label.
        is_top1_BT (`torch.Tensor`): Whether the label is the most likely token.
        side_BT (`torch.Tensor`): 1, 2, ...: the label's side; 0 and -1 do not count.
        row_BT (`torch.Tensor` or `None`): The row of each label, from 0 without gaps; None: its index in the batch.
        num_sides (`int`): S.

    Returns:
        `torch.Tensor`: (R, S, 3), R rows; float64 (float32 on MPS, which has no other).
    """
    if row_BT is None:
        num_rows = len(side_BT)
        row_BT = torch.arange(num_rows, device=side_BT.device)[:, None].expand_as(side_BT)
    else:
        num_rows = int(row_BT.max()) + 1
    dtype = torch.float32 if logp_BT.device.type == "mps" else torch.float64
    values_BT3 = torch.stack([-logp_BT, is_top1_BT.to(logp_BT), torch.ones_like(logp_BT)], dim=-1).to(dtype)
    # What does not count goes to one more slot at the end.
    num_slots = num_rows * num_sides
    slot_BT = torch.where(side_BT > 0, row_BT * num_sides + side_BT - 1, num_slots)
    sums = torch.zeros(num_slots + 1, 3, dtype=dtype, device=logp_BT.device)
    sums.index_add_(0, slot_BT.flatten(), values_BT3.flatten(0, 1))
    return sums[:-1].view(num_rows, num_sides, 3)
