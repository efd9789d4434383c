"""Encoded answers as batches with labels, the form in which losses and `akg` take them.

B rows, one answer each   T tokens of a row
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from trl_dynamics.probing.encode import EncodedResponse
from trl_dynamics.probing.layouts import side_of

# transformers' label of a position that is not looked at.
IGNORED = -100


def collate(
    items: Sequence[EncodedResponse], pad_id: int, device: torch.device | str = "cpu", ends: bool = False
) -> dict[str, torch.Tensor]:
    """Answers as a batch padded on the right; labels are their tokens, and with `ends` the end-of-turn token too.

    Shapes: `input_ids`, `attention_mask`, `labels` (B, T).
    """
    width = max(len(item.input_ids) for item in items)
    ids_BT = torch.full((len(items), width), pad_id)
    mask_BT, labels_BT = torch.zeros_like(ids_BT), torch.full_like(ids_BT, IGNORED)
    for row, item in enumerate(items):
        length, start = len(item.input_ids), len(item.prompt_ids)
        stop = length if ends else start + len(item.response_ids)
        ids_BT[row, :length] = torch.tensor(item.input_ids)
        mask_BT[row, :length] = 1
        labels_BT[row, start:stop] = ids_BT[row, start:stop]
    batch = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}
    return {name: values.to(device) for name, values in batch.items()}


def split(
    items: Sequence[EncodedResponse], tokens_per_batch: int, boundaries: Sequence[int] = ()
) -> Iterator[list[EncodedResponse]]:
    """Consecutive answers whose padded rows hold at most so many tokens, at least one.

    No batch has rows on both sides of one of the `boundaries`, lengths above which a model computes otherwise.
    """
    batch: list[EncodedResponse] = []
    for item in items:
        width = max(len(other.input_ids) for other in [*batch, item])
        apart = side_of(width, boundaries) != side_of(min(len(o.input_ids) for o in [*batch, item]), boundaries)
        if batch and (apart or width * (len(batch) + 1) > tokens_per_batch):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def pad_id_of(tokenizer: PreTrainedTokenizerBase, model: nn.Module | None = None) -> int:
    """The token that fills rows up, which no number depends on.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its padding token, or else its EOS token.
        model (`nn.Module`, *optional*): Of a tokenizer with a padding token that this model has no embedding for, the
            EOS token.
    """
    pad_id, embedding = tokenizer.pad_token_id, None if model is None else model.get_input_embeddings()
    known = pad_id is not None and pad_id < getattr(embedding, "num_embeddings", pad_id + 1)
    return pad_id if known else tokenizer.eos_token_id
