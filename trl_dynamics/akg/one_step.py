"""One step's influence: how an update moves the log-probabilities of everything that is observed, exactly.

    N observed positions   U positions of the update   V labels   k labels kept per position

The thesis' decomposition (arXiv 2407.10490, proposition 1; 2509.19554): Delta ln pi(.|x_o) = -eta A K G, with the
force G = dL/dz of the update, the kernel K = J_o J_u^T, and A = I - 1 pi^T of the observer. K G is the derivative of
the observers' logits along the update's gradient, one forward-mode pass; A and G have closed forms.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trl_dynamics.akg.jvp import push_forward, refuse
from trl_dynamics.akg.modes import evaluated
from trl_dynamics.akg.steps import UPDATE, Step, step_of
from trl_dynamics.akg.task import Task, causal_lm, row_sums

OUTPUTS = ("target", "stats", "topk", "full")
NOT_FINITE_MODEL = (
    "the model's own logits are so. Look for weights that are not finite; where rows are padded at the left, load it "
    "with attn_implementation='sdpa' (transformers' eager attention is NaN there in float64), or pad at the right"
)
NOT_FINITE_STEP = "look for a gradient or a state of the optimiser that is not finite, or take a smaller lr"
FORWARD_MODE, CENTRAL_DIFFERENCES = "forward mode", "central differences"


@dataclass(frozen=True)
class Change:
    """What one part of a step, or all of it, does to the observers; nats.

    Args:
        target_N (`torch.Tensor`): Delta ln pi of each position's own label.
        logit_norm_N (`torch.Tensor`, *optional*): Norm over labels of Delta z, the -eta K G of a plain gradient step.
        logp_norm_N (`torch.Tensor`, *optional*): Norm over labels of Delta ln pi, -eta A K G.
        argmax_N (`torch.Tensor`, *optional*): Delta ln pi of the likeliest label.
        top_Nk (`torch.Tensor`, *optional*): Delta ln pi of the labels in [`Influence`]`.top_id_Nk`.
        kernel_N, softmax_N (`torch.Tensor`, *optional*): The two second-order terms within `target_N`: that of logits
            that do not move in a straight line, since K changes, and that of the softmax, since A does.
        logits_NV, logp_NV (`torch.Tensor`, *optional*): Delta z and Delta ln pi of all labels.
        error_N (`torch.Tensor`, *optional*): By how much `target_N` is off as a derivative, where it is estimated: 999
            of 1000 values are off by no more.
    """

    target_N: torch.Tensor
    logit_norm_N: torch.Tensor | None = None
    logp_norm_N: torch.Tensor | None = None
    argmax_N: torch.Tensor | None = None
    top_Nk: torch.Tensor | None = None
    kernel_N: torch.Tensor | None = None
    softmax_N: torch.Tensor | None = None
    logits_NV: torch.Tensor | None = None
    logp_NV: torch.Tensor | None = None
    error_N: torch.Tensor | None = None


@dataclass(frozen=True)
class Influence:
    """The predicted effect of one step.

    Args:
        total ([`Change`]): Of the whole step.
        parts (`dict[str, Change]`): Of each part of the step, see [`akg.steps`]; at first order their logits and
            log-probabilities add up to the total's. Norms do not.
        label_N, item_N (`torch.Tensor`): Each position's label, and the observer that it belongs to.
        logp_N (`torch.Tensor`): ln pi of the label before the step, nats.
        top_id_Nk (`torch.Tensor`, *optional*): The labels of `top_Nk`.
        loss (`float`, *optional*): The update's loss before the step, where it was computed.
        force_norm_U (`torch.Tensor`, *optional*): Norm over labels of G = dL/dz at each position of the update.
        step ([`Step`]): What the parameters would do; of split weights, this process' pieces.
        method (`str`): `"forward mode"`, or `"central differences"`, which have an error ([`akg.split.differences`]).
    """

    total: Change
    parts: dict[str, Change]
    label_N: torch.Tensor
    item_N: torch.Tensor
    logp_N: torch.Tensor
    top_id_Nk: torch.Tensor | None
    loss: float | None
    force_norm_U: torch.Tensor | None
    step: Step = field(repr=False)
    method: str = FORWARD_MODE

    @property
    def per_item(self) -> torch.Tensor:
        """Delta ln pi of each observer's whole answer: the sum over its positions, nats.

        Shape (observers,), up to the last one that has a label.
        """
        return row_sums(self.total.target_N, self.item_N, int(self.item_N.max()) + 1)

    @property
    def factors(self) -> dict[str, torch.Tensor]:
        """How large each factor of the part `update` is, where its norms were kept (any `output` but `"target"`).

        `force` is ||G|| over the whole update; `kernel_N` is ||Delta z|| / ||G||, for a plain gradient step
        eta ||K G|| / ||G||; `softmax_N` is ||Delta ln pi|| / ||Delta z||, that is ||A K G|| / ||K G||.

        Raises:
            ValueError: If norms were not kept, or the update was not seen.
        """
        change = self.parts.get(UPDATE)
        if change is None or change.logit_norm_N is None or self.force_norm_U is None:
            raise ValueError("factors need the norms and the force of the update; predict with output='stats'")
        force = torch.linalg.vector_norm(self.force_norm_U)
        return {
            "force": force,
            "kernel_N": change.logit_norm_N / force,
            "softmax_N": change.logp_norm_N / change.logit_norm_N,
        }


@dataclass(frozen=True)
class Force:
    """The update's side: its loss, the gradient of the parameters, and the norm of G at each of its positions."""

    loss: float
    gradients: dict[str, torch.Tensor]
    norm_U: torch.Tensor


def influence(
    task: Task | nn.Module,
    update: Any,
    observe: Any,
    *,
    direction: str | torch.optim.Optimizer | Callable = "sgd",
    lr: float | None = None,
    max_grad_norm: float | None = None,
    output: str = "target",
    top_k: int = 10,
    order: int = 1,
) -> Influence:
    """Predict, for one optimiser step on `update`, the change of ln pi at every labelled position of `observe`.

    One backward for the update, one forward-mode pass over the observers per part of the step. Nothing is changed: not
    the parameters, their gradients, the optimiser, the modes of modules, or a random state.

    Args:
        task ([`Task`] or `nn.Module`): What is updated and observed; a model alone is a causal LM with TRL's SFT loss.
        update, observe: Batches of the task.
        direction, lr, max_grad_norm: The step; see [`akg.steps.step_of`].
        output (`str`): `"target"`: the labels alone; `"stats"`: norms and the likeliest label too; `"topk"`: the
            `top_k` likeliest labels too; `"full"`: all labels, (N, V). Only the last holds more than a tile of logits.
        order (`int`): 2 adds the second-order term along the step to the total, not to the parts.

    Raises:
        ValueError: If an argument is none of these, nothing can be trained, weights are quantised or split over
            processes, the model has an operation without a forward-mode derivative or cannot read a batch, or a
            number is not finite.
    """
    task = task if isinstance(task, Task) else causal_lm(task)
    check_output(output, top_k, order)
    refuse(task.model)
    force = update_gradient(task, update)
    step = step_of(force.gradients, task.trainable(), direction, lr, max_grad_norm)
    return finite(predict(task, force, step, observe, output=output, top_k=top_k, order=order))


def finite(found: Influence, *, change: bool = True) -> Influence:
    """An influence as it is, if its numbers are finite.

    Args:
        change (`bool`): Whether the predicted change has to be, too.

    Raises:
        ValueError: If any is not; the message says whether the model or the step is to blame.
    """
    for value_N, what, remedy in (
        (found.logp_N, "ln pi of {} of {} observed labels is", NOT_FINITE_MODEL),
        (torch.tensor([0.0 if found.loss is None else found.loss]), "the update's loss is", NOT_FINITE_MODEL),
        (found.total.target_N, "the predicted change of {} of {} observed labels is", NOT_FINITE_STEP),
    ):
        if not value_N.isfinite().all() and (change or value_N is not found.total.target_N):
            counts = int((~value_N.isfinite()).sum()), len(value_N)
            raise ValueError(f"{what.format(*counts)} not finite (NaN or infinite): {remedy}")
    return found


def predict(
    task: Task,
    force: Force | None,
    step: Step,
    observe: Any,
    *,
    output: str = "target",
    top_k: int = 10,
    order: int = 1,
) -> Influence:
    """[`influence`] of a step that is known already, for one batch of observers after the other.

    `force` is None where the gradients came from elsewhere: training has computed them itself.

    Raises:
        ValueError: As [`influence`].
    """
    check_output(output, top_k, order)
    label_N = task.labels_of(observe, "what is observed")
    views = {name: View(label_N, output, top_k) for name in step.parts}
    for name, changes in step.parts.items():
        push_forward(task, changes, observe, views[name].add)
    parts = {name: view.change() for name, view in views.items()}
    first = next(iter(views.values()))
    if order == 1 and len(parts) == 1:
        total = first.change()
    elif order == 1 and output == "target":
        total = Change(sum(part.target_N for part in parts.values()))
    else:
        whole = View(label_N, output, top_k)
        push_forward(task, step.total, observe, whole.add, order)
        total = whole.change()
    logp_N, top_id_Nk = first.before()
    loss, norm_U = (None, None) if force is None else (force.loss, force.norm_U)
    return Influence(total, parts, label_N, task.items(observe), logp_N, top_id_Nk, loss, norm_U, step)


def check_output(output: str, top_k: int, order: int = 1) -> None:
    """Refuse what [`influence`] cannot give.

    Raises:
        ValueError: If an argument is none of its values.
    """
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}, expected at least 1")
    if output not in OUTPUTS:
        raise ValueError(f"output is {output!r}, expected one of {OUTPUTS}")
    if order not in (1, 2):
        raise ValueError(f"order is {order}, expected 1 or 2")


def update_gradient(task: Task, update: Any) -> Force:
    """One backward through the update's loss; `.grad` of the parameters is left alone.

    Raises:
        ValueError: If no parameter can be trained or the batch has no labelled position.
    """
    parameters = task.trainable()
    if not parameters:
        raise ValueError(
            "no parameter of the model requires a gradient, so that there is no step to predict; an adapter that "
            "transformers loads is frozen: set requires_grad on what is trained, or merge it (peft's merge_and_unload)"
        )
    label_U = task.labels_of(update, "the update")
    with evaluated(task.model, checkpointing=True), torch.enable_grad():
        logits_UV = torch.cat(list(task.logits(task.model, update)))
        loss = task.loss(logits_UV, label_U, task.items(update), update)
        (force_UV,) = torch.autograd.grad(loss, logits_UV, retain_graph=True)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    gradients = {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
    return Force(float(loss.detach()), gradients, torch.linalg.vector_norm(force_UV, dim=-1))


class View:
    """Collects what is kept of every tile."""

    def __init__(self, label_N: torch.Tensor, output: str, top_k: int):
        self.label_N, self.output, self.top_k = label_N, output, top_k
        self.seen, self.tiles = 0, []

    def add(self, logits_nV: torch.Tensor, first_nV: torch.Tensor, second_nV: torch.Tensor | None) -> None:
        label_n = self.label_N[self.seen : self.seen + len(logits_nV)]
        self.seen += len(logits_nV)
        self.tiles.append(tile_change(logits_nV, first_nV, second_nV, label_n, self.output, self.top_k))

    def change(self) -> Change:
        names = Change.__dataclass_fields__
        return Change(**{name: self._joined(name) for name in names if name in self.tiles[0]})

    def before(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._joined("logp_N"), self._joined("top_id_Nk") if "top_id_Nk" in self.tiles[0] else None

    def _joined(self, name: str) -> torch.Tensor:
        return torch.cat([tile[name] for tile in self.tiles])


def tile_change(
    logits_nV: torch.Tensor,
    first_nV: torch.Tensor,
    second_nV: torch.Tensor | None,
    label_n: torch.Tensor,
    output: str,
    top_k: int,
) -> dict[str, torch.Tensor]:
    """Delta ln pi of a tile from the derivatives of its logits: A Delta z, A in closed form.

    With z' and z'' the derivatives along the step, (ln pi)' = z' - E[z'] and (ln pi)'' = z'' - E[z''] - Var[z'], the
    expectations under pi; of order two the change is (ln pi)' + (ln pi)''/2.
    """
    logp_nV = logits_nV.log_softmax(dim=-1)
    prob_nV = logp_nV.exp()
    mean_n1 = (prob_nV * first_nV).sum(dim=-1, keepdim=True)
    logits_change_nV, change_nV, curves = first_nV, first_nV - mean_n1, {}
    if second_nV is not None:
        softmax_n1 = -(prob_nV * change_nV.square()).sum(dim=-1, keepdim=True) / 2
        kernel_nV = (second_nV - (prob_nV * second_nV).sum(dim=-1, keepdim=True)) / 2
        curves = {"kernel_N": kernel_nV.gather(1, label_n[:, None])[:, 0], "softmax_N": softmax_n1[:, 0]}
        logits_change_nV, change_nV = first_nV + second_nV / 2, change_nV + kernel_nV + softmax_n1
    kept = curves | {
        "logp_N": logp_nV.gather(1, label_n[:, None])[:, 0],
        "target_N": change_nV.gather(1, label_n[:, None])[:, 0],
    }
    if output != "target":
        kept["logit_norm_N"] = torch.linalg.vector_norm(logits_change_nV, dim=-1)
        kept["logp_norm_N"] = torch.linalg.vector_norm(change_nV, dim=-1)
        kept["argmax_N"] = change_nV.gather(1, logp_nV.argmax(dim=-1, keepdim=True))[:, 0]
    if output in ("topk", "full"):
        kept["top_id_Nk"] = logp_nV.topk(min(top_k, logp_nV.shape[-1]), dim=-1).indices
        kept["top_Nk"] = change_nV.gather(1, kept["top_id_Nk"])
    if output == "full":
        kept["logits_NV"], kept["logp_NV"] = logits_change_nV, change_nV
    return kept
