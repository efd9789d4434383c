"""What is updated and what is observed: callables over a model, and nothing that is about language models alone.

N observed positions   n positions of one tile   V labels   B rows   T tokens
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trl_dynamics.akg.checks import check_batch, check_head, refuse_outside, refuse_padding, refuse_split
from trl_dynamics.akg.losses import Loss, mean_cross_entropy
from trl_dynamics.akg.modes import evaluated
from trl_dynamics.compat import base_causal_lm, logit_transform
from trl_dynamics.ops.tiled_head import TILE_ELEMENTS, transformed
from trl_dynamics.stats_head.forward import require_decoder
from trl_dynamics.stats_head.ways import num_labels_of

IGNORED = -100


@dataclass(frozen=True)
class Task:
    """A model with the loss it is updated by and the distributions that are observed.

    Args:
        model (`nn.Module`): It runs in evaluation mode, so that nothing is drawn at random.
        logits (`Callable`): `logits(model, batch)` yields tiles (n, V) that together are the logits of all N labelled
            positions of a batch, in the order of `labels`.
        labels (`Callable`): `labels(batch)` gives them, (N,) int64.
        items (`Callable`): `items(batch)` says which observer each position belongs to, (N,) int64.
        loss (`Callable`): `loss(logits_NV, label_N, item_N, batch)` is the scalar that the update descends.
        head (`nn.Module`, *optional*): The linear layer that makes logits of features, where there is one.
        check (`Callable`, *optional*): `check(model, batch, what)` raises a ValueError for a batch that the model
            cannot read, or would read as another; `what` names the batch.
    """

    model: nn.Module
    logits: Callable[[nn.Module, Any], Iterator[torch.Tensor]]
    labels: Callable[[Any], torch.Tensor]
    items: Callable[[Any], torch.Tensor]
    loss: Loss
    head: nn.Module | None = None
    check: Callable[[nn.Module, Any, str], None] | None = None

    def labels_of(self, batch: Any, what: str) -> torch.Tensor:
        """`labels(batch)`.

        Raises:
            ValueError: If there are none, or as `check`; `what` names the batch.
        """
        label_N = self.labels(batch)
        if self.check is not None:
            self.check(self.model, batch, what)
        if not len(label_N):
            raise ValueError(f"{what} has no labelled position: every label is ignored")
        return label_N

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training moves, by name; one that is tied is there once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def coverage(self) -> float:
        """The share of the model's weights that training moves: 1 but where some are frozen, as beneath an adapter."""
        return sum(map(torch.numel, self.trainable().values())) / sum(map(torch.numel, self.model.parameters()))


def causal_lm(model: nn.Module, loss: Loss = mean_cross_entropy) -> Task:
    """A causal language model of transformers, in a PEFT wrapper or not.

    A batch has `input_ids` and `labels`, (B, T) int64 with -100 where nothing is observed or learnt, and may have
    `attention_mask` (needed where rows are padded) and `position_ids`. The label at column t is predicted by column
    t - 1, as in transformers.

    Args:
        model (`nn.Module`): The model.
        loss (`Callable`, *optional*): One of [`akg.losses`] or your own; default: TRL's SFT loss.

    Raises:
        ValueError: If the model has no LM head, learns a prompt, which moves the columns, does more to its hidden
            states than its output embeddings do, or lies in pieces on several processes.
    """
    refuse_split(model)
    base = base_causal_lm(model)
    require_decoder(base)
    if getattr(base, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(f"{type(base).__name__} has no LM head; use akg.task.classifier for other models")
    if any(getattr(config, "is_prompt_learning", False) for config in getattr(model, "peft_config", {}).values()):
        raise ValueError("adapters that learn a prompt are not supported by akg; use LoRA or the full model")
    check_head(model, causal_lm_logits)
    head = base.get_output_embeddings()
    return Task(model, causal_lm_logits, causal_lm_labels, row_of_label, loss, head, check_causal_lm_batch)


def causal_lm_logits(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Logits of the labelled positions, the head applied tile by tile."""
    base = base_causal_lm(model)
    try:
        hidden_BTD = base.base_model(**model_inputs(base, batch), use_cache=False).last_hidden_state
    except IndexError as error:
        raise ValueError(
            f"rows of {batch['input_ids'].shape[1]} tokens are too long for the positions that "
            f"{type(base).__name__} has learnt ({error}); cut them to its context"
        ) from error
    row_N, column_N = predicting(batch["labels"])
    hidden_ND = hidden_BTD[row_N, column_N]
    head, (factor, softcap) = base.get_output_embeddings(), logit_transform(base)
    tile = max(1, TILE_ELEMENTS // num_labels_of(base, head))
    for start in range(0, len(hidden_ND), tile):
        yield transformed(head(hidden_ND[start : start + tile]), factor, softcap)


def causal_lm_labels(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(N,) the labels that are not ignored, row by row; the first column has nothing that predicts it.

    Raises:
        ValueError: If the batch is no mapping, lacks one of the two, or they differ in shape.
    """
    check_batch(batch)
    labels_BT = batch["labels"][:, 1:]
    return labels_BT[labels_BT != IGNORED]


def check_causal_lm_batch(model: nn.Module, batch: Mapping[str, torch.Tensor], what: str) -> None:
    """Refuse a batch that a causal LM cannot read, or would read padding of as text.

    Raises:
        ValueError: If ids or labels are outside the vocabulary, or rows begin with padding and there is no
            `attention_mask`.
    """
    base, ids_BT, labels_BT = base_causal_lm(model), batch["input_ids"], batch["labels"]
    embedding, head = getattr(base.get_input_embeddings(), "weight", None), base.get_output_embeddings().weight
    remedy = f"the model's vocabulary; use its own tokenizer, and {IGNORED} for labels to ignore"
    if embedding is not None:
        refuse_outside(ids_BT, embedding.shape[0], f"{what}: input_ids", remedy)
    refuse_outside(labels_BT[labels_BT != IGNORED], head.shape[0], f"{what}: labels", remedy)
    refuse_padding(base, batch, what)


def row_of_label(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(N,) the row of each labelled position."""
    return predicting(batch["labels"])[0]


def classifier(model: nn.Module, loss: Loss = mean_cross_entropy, head: nn.Module | None = None) -> Task:
    """Any module whose output is a tensor of logits (B, C), or an object that has it as `logits`.

    A batch is a tuple (inputs, labels), or a mapping whose entries but `labels` are the model's keyword arguments.

    Args:
        model (`nn.Module`): The classifier.
        loss (`Callable`, *optional*): One of [`akg.losses`] or your own; default: the mean cross-entropy.
        head (`nn.Module`, *optional*): The layer whose output the logits are, for the prediction by fixed features.
    """
    return Task(model, classifier_logits, classifier_labels, row_of_class, loss, head)


def classifier_logits(model: nn.Module, batch: Any) -> Iterator[torch.Tensor]:
    """(B, C) logits of a batch, as one tile."""
    if isinstance(batch, Mapping):
        output = model(**{name: value for name, value in batch.items() if name != "labels"})
    else:
        output = model(batch[0])
    logits_BC = getattr(output, "logits", output)
    remedy = "the model's classes; count from 0"
    refuse_outside(classifier_labels(batch), logits_BC.shape[-1], "the labels of a batch", remedy)
    yield logits_BC


def classifier_labels(batch: Any) -> torch.Tensor:
    """(B,) the labels of a batch: its entry `labels`, or its last one."""
    return batch["labels"] if isinstance(batch, Mapping) else batch[-1]


def row_of_class(batch: Any) -> torch.Tensor:
    """(B,) each row is an observer of its own."""
    labels_B = classifier_labels(batch)
    return torch.arange(len(labels_B), device=labels_B.device)


def model_inputs(base: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the backbone reads; positions are counted from a row's first real token, so that padding moves nothing."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    takes_positions = "position_ids" in inspect.signature(base.base_model.forward).parameters
    if takes_positions and "position_ids" not in inputs and "attention_mask" in inputs:
        inputs["position_ids"] = (inputs["attention_mask"].long().cumsum(dim=-1) - 1).clamp(min=0)
    return inputs


def predicting(labels_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of the positions that predict a label."""
    return (labels_BT[:, 1:] != IGNORED).nonzero(as_tuple=True)


def label_logp(task: Task, batch: Any, what: str = "what is observed") -> torch.Tensor:
    """(N,) ln pi of the labels, nats.

    Raises:
        ValueError: As [`Task.labels_of`]; `what` names the batch.
    """
    label_N = task.labels_of(batch, what)
    with torch.no_grad(), evaluated(task.model):
        return torch.cat(list(label_logp_tiles(task.logits(task.model, batch), label_N)))


def label_logp_tiles(tiles: Iterable[torch.Tensor], label_N: torch.Tensor) -> Iterator[torch.Tensor]:
    """(n,) ln pi of the labels of each tile (n, V) of logits, nats, so that no tile is held."""
    seen = 0
    for logits_nV in tiles:
        label_n = label_N[seen : (seen := seen + len(logits_nV))]
        yield logits_nV.log_softmax(dim=-1).gather(1, label_n[:, None])[:, 0]


def num_rows(batch: Any) -> int:
    """B: how many rows a batch has.

    Raises:
        ValueError: If it is no mapping, tuple or list with a tensor in it.
    """
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    sizes = [len(value) for value in values if isinstance(value, torch.Tensor) and value.dim()]
    if not sizes:
        raise ValueError(f"a batch is a {type(batch).__name__}, expected a mapping or a tuple of tensors, row by row")
    return sizes[0]


def rows_of(batch: Any, rows: slice) -> Any:
    """Some rows of a batch."""
    size = num_rows(batch)

    def part(value: Any) -> Any:
        by_row = isinstance(value, torch.Tensor) and value.dim() and len(value) == size
        return value[rows] if by_row else value

    if isinstance(batch, Mapping):
        return {name: part(value) for name, value in batch.items()}
    return tuple(part(value) for value in batch)


def row_sums(values_NX: torch.Tensor, row_N: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Sums over the positions of each row: (N, ...) -> (num_rows, ...), zeros where a row has none."""
    zeros_BX = values_NX.new_zeros(num_rows, *values_NX.shape[1:])
    return zeros_BX.index_add(0, row_N.to(values_NX.device), values_NX)
