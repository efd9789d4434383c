"""Several updates in one pass: what each of them, taken alone from the same weights, does to the same observers.

N observed positions   n those of one tile   V labels   S changes of the weights, the steps' parts
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from trl_dynamics.akg.jvp import push_forward_together, refuse
from trl_dynamics.akg.one_step import Change, Force, Influence, View, check_output, finite, predict, update_gradient
from trl_dynamics.akg.steps import Step, Tensors, step_of
from trl_dynamics.akg.task import Task, causal_lm, label_logp_tiles

logger = logging.getLogger(__name__)
Before = tuple[torch.Tensor, torch.Tensor | None]  # ln pi of the labels, and the likeliest labels


def influences(
    task: Task | nn.Module,
    updates: Sequence[Any],
    observe: Any,
    *,
    direction: str | torch.optim.Optimizer | Callable = "sgd",
    lr: float | None = None,
    max_grad_norm: float | None = None,
    output: str = "target",
    top_k: int = 10,
    together: int = 4,
) -> Iterator[Influence]:
    """The influence of each of `updates`, all from the same weights and optimiser, in their order.

    The numbers are those of [`akg.influence`] for one after the other. A pass computes the values of a
    forward and a derivative beside them; several derivatives share the values, which makes four updates 10 to 40 %
    cheaper. In exchange the parts of all steps of a pass are held, as they are and stacked in the parameters' dtype, a
    step's sum of several parts too but for `output="target"`, and then all logits and their derivatives.

    Args:
        task, observe, direction, lr, max_grad_norm, output, top_k: As of [`akg.influence`].
        updates (`Sequence`): Batches of the task.
        together (`int`): How many updates share a pass.

    Raises:
        ValueError: As [`akg.influence`], or if `together` is less than 1.
    """
    task = task if isinstance(task, Task) else causal_lm(task)
    if together < 1:
        raise ValueError(f"together is {together}, expected at least 1")
    refuse(task.model)
    for start in range(0, len(updates), together):
        forces, steps = [], []
        for update in updates[start : start + together]:
            force = update_gradient(task, update)
            steps.append(step_of(force.gradients, task.trainable(), direction, lr, max_grad_norm))
            forces.append(dataclasses.replace(force, gradients={}))  # which the step took in
        yield from map(finite, predict_together(task, forces, steps, observe, output=output, top_k=top_k))


def predict_together(
    task: Task,
    forces: Sequence[Force | None],
    steps: Sequence[Step],
    observe: Any,
    *,
    output: str = "target",
    top_k: int = 10,
) -> list[Influence]:
    """[`akg.one_step.predict`] of several steps, in one pass for all of their parts.

    A model with an operation whose derivative torch.func.vmap cannot take for several changes at once is given a pass
    for each part.

    Raises:
        ValueError: As [`akg.one_step.predict`].
    """
    check_output(output, top_k)
    label_N, item_N = task.labels_of(observe, "what is observed"), task.items(observe)
    changes = [part for step in steps for part in step.parts.values()]
    if output != "target":  # the norms of parts do not add up to the step's
        changes += [step.total for step in steps if len(step.parts) > 1]
    try:
        found, (logp_N, top_id_Nk) = _read(task, changes, observe, label_N, output, top_k)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        logger.info("a pass for each step: %s", str(error).splitlines()[0])
        options = {"output": output, "top_k": top_k}
        return [predict(task, force, step, observe, **options) for force, step in zip(forces, steps, strict=True)]
    of_parts = iter(found)
    parts = [{name: next(of_parts) for name in step.parts} for step in steps]
    wholes = [_whole(own, of_parts, output) for own in parts]
    sides = [(None, None) if force is None else (force.loss, force.norm_U) for force in forces]
    return [
        Influence(whole, own, label_N, item_N, logp_N, top_id_Nk, *side, step)
        for whole, own, side, step in zip(wholes, parts, sides, steps, strict=True)
    ]


def _whole(parts: dict[str, Change], wholes: Iterator[Change], output: str) -> Change:
    """What a step does: as its only part, by the sum, or the next of `wholes`."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    return Change(sum(change.target_N for change in parts.values())) if output == "target" else next(wholes)


def _read(
    task: Task, changes: list[Tensors], observe: Any, label_N: torch.Tensor, output: str, top_k: int
) -> tuple[list[Change], Before]:
    """What every change does."""
    if output == "target":

        def read(tiles: Iterator[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            return tuple(label_logp_tiles(tiles, label_N))

        values, derivatives = push_forward_together(task, changes, observe, read)
        return [Change(target_N) for target_N in torch.cat(derivatives, dim=1)], (torch.cat(values), None)
    values, derivatives = push_forward_together(task, changes, observe, tuple)
    views = [View(label_N, output, top_k) for _ in changes]
    for tile_nV, tile_SnV in zip(values, derivatives, strict=True):
        for view, first_nV in zip(views, tile_SnV, strict=True):
            view.add(tile_nV, first_nV, None)
    return [view.change() for view in views], views[0].before()
