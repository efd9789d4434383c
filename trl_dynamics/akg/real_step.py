"""Prediction against truth: the step is taken, what happened is measured, and the step is taken back.

N observed positions
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trl_dynamics.akg.jvp import push_forward_head, refuse
from trl_dynamics.akg.one_step import Influence, View, finite, predict, update_gradient
from trl_dynamics.akg.steps import Tensors, step_of
from trl_dynamics.akg.task import Task, causal_lm, label_logp

# Relative error of the first order from which on the step is called too large for it.
LARGE_ERROR = 0.1
ROUNDING, SOFTMAX, KERNEL, BEYOND, FIRST_ORDER = "rounding", "softmax", "kernel", "beyond", "first order"
VERDICTS = {
    FIRST_ORDER: "the first order explains what happened",
    SOFTMAX: "the second order of the softmax is what is missing: probabilities moved far, and A with them",
    KERNEL: "the kernel changed along the step: the second order of the logits is what is missing",
    BEYOND: "terms beyond the second order are what is missing: take a smaller step",
    ROUNDING: "rounding is what differs: the true change is smaller than this dtype can tell",
}


@dataclass(frozen=True)
class Verification:
    """Predicted and true changes of ln pi of every observed label in one real step, nats.

    Args:
        predicted ([`Influence`]): Of the second order; its `parts` are of the first.
        first_N, second_N, true_N (`torch.Tensor`): The change to first order, to second order, and as it was.
        rounding_N (`torch.Tensor`): How much of `true_N` may be rounding: what the same forward gives where every
            weight, trained or not, is moved by one or two units in its last place, up and down by turns.
        errors (`dict[str, float]`): ||predicted - true|| / ||true|| over all positions, of the `first` and the
            `second` order and, where the task has a head, of `fixed_features`: the prediction of a model whose
            features stand still, so that its head alone moves.
        shares (`dict[str, float]`): Norms of what could be missing from the first order, over ||true||.
        verdict (`str`): A key of [`VERDICTS`].
    """

    predicted: Influence
    first_N: torch.Tensor
    second_N: torch.Tensor
    true_N: torch.Tensor
    rounding_N: torch.Tensor
    errors: dict[str, float]
    shares: dict[str, float]
    verdict: str


def verify(
    task: Task | nn.Module,
    update: Any,
    observe: Any,
    *,
    direction: str | torch.optim.Optimizer | Callable = "sgd",
    lr: float | None = None,
    max_grad_norm: float | None = None,
) -> Verification:
    """Compare the influence of a step with what the step does; the parameters are put back, bit for bit.

    Args: as [`akg.influence`].

    The first order is what [`akg.influence`] predicts. Where it is off by more than `LARGE_ERROR`, the
    verdict names the largest of: the softmax's second-order term (A changes along the step), that of the logits (K
    changes), what is beyond both, and rounding; the first two only where they bring the prediction closer to truth.
    """
    task = task if isinstance(task, Task) else causal_lm(task)
    refuse(task.model)
    force = update_gradient(task, update)
    step = step_of(force.gradients, task.trainable(), direction, lr, max_grad_norm)
    predicted = finite(predict(task, force, step, observe, order=2), change=False)  # a step may diverge
    curved = predicted.total
    first_N = curved.target_N - curved.kernel_N - curved.softmax_N
    before_N = label_logp(task, observe)
    with moved(task, predicted.step.total):
        true_N = label_logp(task, observe) - before_N
    with moved(task, last_bits(task)):
        rounding_N = label_logp(task, observe) - before_N
    scale = float(torch.linalg.vector_norm(true_N))

    def share(values_N: torch.Tensor) -> float:
        return float(torch.linalg.vector_norm(values_N)) / scale if scale else float("inf")

    errors = {"first": share(first_N - true_N), "second": share(curved.target_N - true_N)}
    if task.head is not None:
        errors["fixed_features"] = share(fixed_features(task, observe, predicted) - true_N)
    shares = {
        SOFTMAX: share(curved.softmax_N),
        KERNEL: share(curved.kernel_N),
        BEYOND: errors["second"],
        ROUNDING: share(rounding_N),
    }
    # Terms of the second order are the answer only where it comes closer to the truth than the first.
    answers = shares if errors["second"] < errors["first"] else (BEYOND, ROUNDING)
    verdict = max(answers, key=shares.__getitem__)
    if not math.isfinite(scale):
        verdict = BEYOND
    elif not scale:
        verdict = ROUNDING if torch.count_nonzero(first_N) else FIRST_ORDER
    elif errors["first"] <= LARGE_ERROR:
        verdict = FIRST_ORDER
    return Verification(predicted, first_N, curved.target_N, true_N, rounding_N, errors, shares, verdict)


@contextmanager
def moved(task: Task, changes: Tensors) -> Iterator[None]:
    """The parameters with these changes added, and at the end as they were, bit for bit."""
    parameters = dict(task.model.named_parameters())
    kept = {name: parameters[name].detach().clone() for name in changes}
    try:
        with torch.no_grad():
            for name, change in changes.items():
                parameters[name].add_(change)
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)


def fixed_features(task: Task, observe: Any, predicted: Influence) -> torch.Tensor:
    """(N,) what the step's change of the head alone does, to first order: features stand still.

    The unconstrained-feature reading (2509.19554; K = <h_o, h_u> I): exact for a step on an untied head. A head that
    is tied to the embedding moves here as a head only.
    """
    changes, label_N = predicted.step.total, task.labels(observe)
    names = {id(parameter): name for name, parameter in task.trainable().items()}
    own = {name: names.get(id(parameter)) for name, parameter in task.head.named_parameters()}
    own = {name: changes[whole] for name, whole in own.items() if whole in changes}
    if not own:
        return torch.zeros_like(predicted.logp_N)
    view = View(label_N, "target", 1)
    push_forward_head(task, own, observe, view.add)
    return view.change().target_N


def last_bits(task: Task) -> Tensors:
    """A change of every weight, trained or not, by one or two units in its last place, up and down by turns."""
    changes: Tensors = {}
    for name, parameter in task.model.named_parameters():
        value = parameter.detach()
        if not value.is_floating_point():
            continue
        sign = torch.ones(value.numel(), dtype=value.dtype, device=value.device)
        sign[1::2] = -1
        changes[name] = value.abs() * torch.finfo(value.dtype).eps * sign.view_as(value)
    return changes
