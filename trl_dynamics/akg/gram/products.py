"""Which update pulls which observer, as numbers: exact inner products of gradients over all trained parameters.

    O observers   U rows of the update   N, M their labelled positions   T, S their columns

S[o, u] = <grad ln pi(y_o), grad L_u>, ln pi(y_o) the sum over an observer's labels, L_u = -sum_m w_m ln pi(y_m) over
those of row u. An SGD step of rate eta on row u alone changes ln pi(y_o) by -eta S[o, u], to first order: the
thesis' -eta A K G (arXiv 2407.10490, proposition 1), summed over labels.

No gradient of a row is ever stored, but what layers read and what came back to their outputs; layer by layer, the
gradients of all rows are then formed for some of a matrix' rows, multiplied, and dropped.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from trl_dynamics.akg.checks import refuse_split
from trl_dynamics.akg.gram.journal import Journal, fingerprint
from trl_dynamics.akg.gram.plan import all_at_once, estimate
from trl_dynamics.akg.gram.tiles import LabelTiles, RowTiles, Side
from trl_dynamics.akg.one_step import NOT_FINITE_MODEL
from trl_dynamics.akg.task import Task, causal_lm, label_logp

SPLITS = ("module", "position", "loss_token")


@dataclass(frozen=True)
class GramResult:
    """Inner products of gradients; all tensors are float64 and on the CPU.

    Args:
        total_OU (`torch.Tensor`): S.
        module_OU (`dict[str, torch.Tensor]`, *optional*): S of each module's own parameters; tied modules are one
            entry, their names joined by +, since the products between them belong to neither.
        position_OTUS (`torch.Tensor`, *optional*): S by the columns at which parameters were applied, the prompt's
            included; the head is applied at the column before a label.
        token_NM (`torch.Tensor`, *optional*): S by the labels of both sides.
        label_N, item_N, label_M, item_M (`torch.Tensor`): Each labelled position's label and row, of both sides.
        weight_M (`torch.Tensor`): w.
    """

    total_OU: torch.Tensor
    module_OU: dict[str, torch.Tensor] | None
    position_OTUS: torch.Tensor | None
    token_NM: torch.Tensor | None
    label_N: torch.Tensor
    item_N: torch.Tensor
    label_M: torch.Tensor
    item_M: torch.Tensor
    weight_M: torch.Tensor


def gram(
    task: Task | nn.Module,
    update: Any,
    observe: Any,
    *,
    by: str | None = None,
    weight: torch.Tensor | None = None,
    diagonal: Mapping[str, torch.Tensor] | None = None,
    memory_budget: int | None = None,
    journal: str | Path | None = None,
    check: bool = True,
    disable_tqdm: bool = False,
) -> GramResult:
    """All inner products between the gradients of observers and those of an update's rows.

    Gradients are those that training has: of a model that detaches something on the way, such as DoRA, they do not say
    all that moves; [`akg.influence`] does.

    Args:
        task ([`Task`] or `nn.Module`): What is updated and observed; a model alone is a causal LM. A row of a batch
            is an observer or an update. The task's loss is not used: see `weight`.
        update, observe: Batches of the task, mappings or tuples of tensors.
        by (`str`, *optional*): A split that adds up to the total: `"module"`; `"position"`, causal LMs alone, holds
            O T U S numbers; `"loss_token"`, at the cost of one backward for each label of the side that has fewer
            and one forward-mode pass over the other side.
        weight (`torch.Tensor`, *optional*): (M,) the w of each labelled position of the update; default 1, the sum of
            -ln pi. [`loss_weights`] has those of a task's loss, with which the rows add up to the batch's gradient.
        diagonal (`Mapping`, *optional*): By parameter name, a tensor D of its shape: <grad ln pi, D grad L>, with
            1 / (sqrt(v_hat) + eps) Adam's. Not with `by="position"`.
        memory_budget (`int`, *optional*): Bytes that the computation may add; rows of both sides are taken in tiles
            that fit. Default: all rows at once. See [`estimate`].
        journal (`str` or `Path`, *optional*): A file that keeps finished tiles; a run with the same path, arguments,
            data and model goes on from there, to the same numbers.
        check (`bool`): Whether one pair is compared with its two gradients, stored for once; it finds models that let
            rows mix or use a parameter outside the module that has it.
        disable_tqdm (`bool`): Whether to show no progress bar where there is more than one tile.

    Raises:
        ValueError: If an argument is none of these, nothing can be trained, the budget is too small for one row of
            either side, the journal is of something else, the weights are split over processes, the rows of this model
            cannot be told apart, or a product is not finite; tiles before it are in the journal.
    """
    task = task if isinstance(task, Task) else causal_lm(task)
    weight_M = _checked(task, update, observe, by, weight, diagonal)
    plan = all_at_once(task, update, observe, by)
    if memory_budget is not None:
        plan = estimate(task, update, observe, by=by, memory_budget=memory_budget, check=check)
    options = {"options": [by, weight_M, diagonal], "memory budget": [plan.update_rows, plan.observe_rows]}
    kept = Journal(journal, fingerprint(task, (update, observe), options) if journal is not None else {})
    sides = Side(task, update, -weight_M), Side(task, observe, torch.ones(len(task.labels(observe))).double())
    tiles = (LabelTiles if by == "loss_token" else RowTiles)(task, *sides, by, diagonal, plan)
    with tqdm(total=plan.tiles, disable=disable_tqdm or plan.tiles == 1, desc="gram", unit="tile") as bar:
        for tile in tiles.run(kept.tiles, check):
            if tile.arrays is not None:
                _refuse_not_finite(tile.arrays.values())
                kept.add(tile.name, tile.arrays)
            bar.update()
    return GramResult(
        **tiles.joined(kept.tiles),
        label_N=task.labels(observe),
        item_N=task.items(observe),
        label_M=task.labels(update),
        item_M=task.items(update),
        weight_M=weight_M,
    )


def _checked(
    task: Task, update: Any, observe: Any, by: str | None, weight: torch.Tensor | None, diagonal: Mapping | None
) -> torch.Tensor:
    """The weights, once all arguments are known to make sense."""
    refuse_split(task.model)
    trained, label_M = task.trainable(), task.labels_of(update, "update")
    if by not in (None, *SPLITS):
        raise ValueError(f"by is {by!r}, expected None or one of {SPLITS}")
    if not trained:
        raise ValueError("no parameter of the model requires a gradient, so that all products are zero")
    task.labels_of(observe, "observe")
    if by == "position" and not all(isinstance(b, Mapping) and "input_ids" in b for b in (update, observe)):
        raise ValueError("by='position' needs batches of a causal language model, with input_ids and labels")
    if diagonal is not None:
        if by == "position":
            raise ValueError("by='position' compares positions without forming gradients; leave out diagonal")
        shapes = [{name: tuple(value.shape) for name, value in side.items()} for side in (trained, diagonal)]
        if wrong := sorted(name for name in {*trained, *diagonal} if shapes[0].get(name) != shapes[1].get(name)):
            raise ValueError(f"diagonal differs from the trained parameters in {wrong[:3]}; give each one's shape")
    weight_M = torch.ones(len(label_M), dtype=torch.float64) if weight is None else weight.detach().double().cpu()
    if weight_M.shape != label_M.shape:
        raise ValueError(f"weight has shape {tuple(weight_M.shape)}, expected one for each label: ({len(label_M)},)")
    return weight_M


def _refuse_not_finite(arrays: Iterable[np.ndarray]) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(f"an inner product of gradients is not finite (NaN or infinite): {NOT_FINITE_MODEL}")


def loss_weights(task: Task, update: Any) -> torch.Tensor:
    """(M,) w_m = -dL / d ln pi(y_m) of the task's loss at each labelled position: its force is G = w (pi - e_y).

    Raises:
        ValueError: If the loss reads more of the logits than the labels' log-probabilities (label smoothing, entropy),
            or the batch has no labelled position.
    """
    logp_M, found = label_logp(task, update, "the update").double().clamp(max=-1e-12), []
    for others in (1, 2):  # all other labels as one, or as two of half the probability
        with torch.enable_grad():
            leaf_M = logp_M.detach().requires_grad_()
            rest_M1 = (-torch.expm1(leaf_M)).log()[:, None] - torch.tensor(float(others)).log()
            logits = torch.cat([leaf_M[:, None], rest_M1.expand(-1, others)], dim=1)
            loss = task.loss(logits, torch.zeros_like(task.labels(update)), task.items(update), update)
            found.append(-torch.autograd.grad(loss, leaf_M)[0])
    if not torch.allclose(*found, rtol=1e-6, atol=1e-9):
        raise ValueError("the loss depends on more than the labels' log-probabilities; give weight, or use influence")
    return found[0]
