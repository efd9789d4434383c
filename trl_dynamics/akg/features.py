"""How a step moves hidden states instead of logits: the thesis' view of feature learning.

    N labelled positions   D features

Delta h = -eta K_h W^T G in place of -eta K G, K_h the kernel of features h and W^T G the force that enters the
backbone (arXiv 2302.05779; 2509.19554). One forward-mode pass gives it exactly to first order, for any optimiser.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trl_dynamics.akg.jvp import push_forward
from trl_dynamics.akg.steps import Step
from trl_dynamics.akg.task import Task, causal_lm, predicting


@dataclass(frozen=True)
class Movement:
    """Hidden states of the observers and what one step does to them, to first order.

    Args:
        before_ND, change_ND (`torch.Tensor`): h and Delta h at each labelled position.
        item_N (`torch.Tensor`): The observer that each position belongs to.
    """

    before_ND: torch.Tensor
    change_ND: torch.Tensor
    item_N: torch.Tensor

    @property
    def energy_N(self) -> torch.Tensor:
        """||Delta h|| at each position."""
        return torch.linalg.vector_norm(self.change_ND, dim=-1)

    @property
    def cosine_N(self) -> torch.Tensor:
        """How far Delta h points along h itself: 1 where features only grow, 0 where they turn."""
        return torch.cosine_similarity(self.before_ND, self.change_ND, dim=-1)


def features(task: Task | nn.Module, module: str | None = None) -> Task:
    """The task with hidden states in place of its logits, for [`akg.kernel.Kernel`] and [`movement`]; it has no loss.

    Args:
        task ([`Task`] or `nn.Module`): What is observed; a model alone is a causal LM.
        module (`str`, *optional*): The name of the module whose output is taken, or of its first element where it
            returns several, such as `"model.layers.2"`. Default: what the task's head reads.

    Raises:
        ValueError: If there is no such module, or the task has no head; and when it is used, if what is found has
            neither a row per label nor, for a causal LM, a vector per column.
    """
    task = task if isinstance(task, Task) else causal_lm(task)
    if module is None and task.head is None:
        raise ValueError("the task has no head whose input could be taken; name a module")
    if module is not None and module not in (names := dict(task.model.named_modules())):
        raise ValueError(f"the model has no module {module!r}; the first of {len(names)} are {list(names)[1:4]}")

    def hidden(model: nn.Module, batch: Any) -> Iterator[torch.Tensor]:
        found: list[torch.Tensor] = []
        if module is None:
            hook = task.head.register_forward_pre_hook(lambda _, args: found.append(args[0].clone()))
        else:
            hook = task.model.get_submodule(module).register_forward_hook(
                lambda _, args, out: found.append(_first(out).clone())  # what comes later may change it in place
            )
        try:
            seen = sum(len(tile) for tile in task.logits(model, batch))
        finally:
            hook.remove()
        yield _by_label(found, seen, batch)

    return dataclasses.replace(task, logits=hidden, loss=_no_loss, head=None)


def movement(task: Task | nn.Module, step: Step, observe: Any, module: str | None = None) -> Movement:
    """What a step does to the hidden states of the observers.

    Args:
        task ([`Task`] or `nn.Module`): What is observed; a model alone is a causal LM.
        step ([`Step`]): As of [`akg.influence`]'s result, or of [`akg.steps.step_of`].
        observe: A batch of the task.
        module (`str`, *optional*): As of [`features`].

    Raises:
        ValueError: As [`features`].
    """
    task = features(task, module)
    tiles: list[tuple[torch.Tensor, torch.Tensor]] = []
    push_forward(task, step.total, observe, lambda hidden, change, _: tiles.append((hidden, change)))
    before, change = (torch.cat(values) for values in zip(*tiles, strict=True))
    return Movement(before, change, task.items(observe))


def _first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _by_label(found: list[torch.Tensor], num_labels: int, batch: Any) -> torch.Tensor:
    """(N, D) of what a hook saw: rows of labels, or columns of which those before a label count."""
    if all(value.dim() == 2 for value in found) and sum(map(len, found)) == num_labels:
        return torch.cat(found)
    shape = batch["labels"].shape if isinstance(batch, Mapping) else ()
    if len(found) == 1 and len(shape) == 2 and found[0].shape[:2] == shape:
        return found[0][predicting(batch["labels"])]
    shapes = [tuple(value.shape) for value in found]
    raise ValueError(f"the hidden states have shapes {shapes}, expected {num_labels} rows, one per label")


def _no_loss(*_: Any) -> torch.Tensor:
    raise ValueError("hidden states have no loss; take the step of the task itself")
