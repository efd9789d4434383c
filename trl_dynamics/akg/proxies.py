"""Cheap stand-ins for the inner products of [`akg.gram`], from forwards alone: what most papers use in place of K.

    O observers   U rows of the update   N, M their labelled positions   D features   V labels   S inputs of blocks

All have the unit and sign of S there: an SGD step of rate eta on row u changes ln pi(y_o) by about -eta S[o, u]. How
much "about" is differs from model to model: [`agreement`] measures it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from trl_dynamics.akg.modes import evaluated, frozen
from trl_dynamics.akg.task import Task, causal_lm, causal_lm_labels, label_logp_tiles, num_rows, predicting, row_sums
from trl_dynamics.compat import base_causal_lm
from trl_dynamics.statistics import Agreement, pair_sides, rank_agreement


@dataclass(frozen=True)
class _Labels:
    """What a side has at some of its labelled positions.

    `error`: e = d ln pi(y) / d(head's output), e_y - pi where logits are that output; if they were asked for, `force`:
    W^T e, what enters the backbone, `inner`: what the blocks read, side by side, and `token`: the input.
    """

    feature_ND: torch.Tensor
    error_NV: torch.Tensor
    item_N: torch.Tensor
    force_ND: torch.Tensor | None = None
    inner_NS: torch.Tensor | None = None
    token_N: torch.Tensor | None = None


def head_only(task: Task | nn.Module, update: Any, observe: Any, weight: torch.Tensor | None = None) -> torch.Tensor:
    """CH1: S of a model whose head alone is trained, (O, U) float64.

    -sum over labels n, m of w_m <e_n, e_m> <h_n, h_m>, h the features that the head reads (and a 1, if it has a bias).
    Exact for a step on an untied head; K = <h_o, h_u> I is the reading of unconstrained features that NTHR and CHES
    rest on (arXiv 2505.18830, 2410.08847). Holds (M + a tile) V numbers.

    Args:
        task ([`Task`] or `nn.Module`): What is updated and observed; a model alone is a causal LM.
        update, observe: Batches of the task.
        weight (`torch.Tensor`, *optional*): (M,) as of [`akg.gram.gram`]; default 1.

    Raises:
        ValueError: If the task has no linear head, or one that is not called once per tile of logits, row by row.
    """
    task = _with_head(task)
    return _summed(task, update, observe, weight, lambda one, other: _head_products(task.head, one, other))


def blocks(task: Task | nn.Module, update: Any, observe: Any, weight: torch.Tensor | None = None) -> torch.Tensor:
    """CH2: [`head_only`] and the same force let into every block at once, (O, U) float64; transformers alone.

    -sum over labels n, m of w_m (<e_n, e_m> <h_n, h_m> + <W^T e_n, W^T e_m> k_nm), k_nm the sum of <a_n, a_m> over
    what every attention and MLP reads, a, plus 1 where both read the same token. It takes each block for a
    linear map of its own position straight into the head's features: no attention to other positions, no Jacobian in
    between.

    Args: as [`head_only`].

    Raises:
        ValueError: As [`head_only`], or if no stack of blocks, each with an attention and an MLP, is found.
    """
    task = _with_head(task)
    if task.labels is not causal_lm_labels:
        raise ValueError(f"the task of this {type(task.model).__name__} is none of akg.task.causal_lm; use head_only")

    def products(one: _Labels, other: _Labels) -> torch.Tensor:
        same_NM = (one.token_N[:, None] == other.token_N).to(one.force_ND)
        inner_NM = (one.force_ND @ other.force_ND.T) * (one.inner_NS @ other.inner_NS.T + same_NM)
        return _head_products(task.head, one, other) + inner_NM

    return _summed(task, update, observe, weight, products, inner=True)


def mean_features(
    task: Task | nn.Module, update: Any, observe: Any, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Minus the inner product of either row's mean feature, (O, U) float64: no force, no label, no weight.

    Args: as [`head_only`]; `weight` is not used.
    """
    task = _with_head(task)
    mean_OD, mean_UD = (_mean_feature(task, batch) for batch in (observe, update))
    return -(mean_OD @ mean_UD.T)


FORMS: dict[str, Callable[..., torch.Tensor]] = {
    "head only": head_only,
    "blocks": blocks,
    "mean features": mean_features,
}


def agreement(forms_OU: Mapping[str, torch.Tensor], exact_OU: torch.Tensor, *, seed: int = 0) -> dict[str, Agreement]:
    """Spearman's correlation of each form with what it stands for, over all pairs; observers and updates drawn again.

    Args:
        forms_OU (`Mapping`): Forms by name.
        exact_OU (`torch.Tensor`): [`akg.gram.gram`]'s `total_OU`, or sizes of K ([`akg.block_norms`]); compare
            sizes with absolute values. Divide both sides by lengths first, or the ranking is one of lengths.
        seed (`int`): Of the bootstrap.
    """
    sides, exact = pair_sides(exact_OU.shape), exact_OU.flatten().numpy()
    return {name: rank_agreement(form.flatten().numpy(), exact, sides, seed=seed) for name, form in forms_OU.items()}


def _with_head(task: Task | nn.Module) -> Task:
    task = task if isinstance(task, Task) else causal_lm(task)
    if not isinstance(task.head, nn.Linear):
        kind = type(task.head)
        what = "none" if task.head is None else f"a {kind.__module__}.{kind.__qualname__}"
        raise ValueError(
            f"the task's head is {what}, expected a torch.nn.Linear; give it, as to akg.task.classifier, or merge the "
            "adapter that wraps it (merge_and_unload of PEFT)"
        )
    return task


def _head_products(head: nn.Linear, one: _Labels, other: _Labels) -> torch.Tensor:
    alike_NM = one.feature_ND @ other.feature_ND.T
    return (one.error_NV @ other.error_NV.T) * (alike_NM if head.bias is None else alike_NM + 1)


def _summed(
    task: Task,
    update: Any,
    observe: Any,
    weight: torch.Tensor | None,
    products: Callable[[_Labels, _Labels], torch.Tensor],
    inner: bool = False,
) -> torch.Tensor:
    """(O, U) the sum of -w_m times products over the labels of each pair of rows."""
    total_OU = torch.zeros(num_rows(observe), num_rows(update), dtype=torch.float64)
    weight_M = torch.ones(len(task.labels_of(update, "update")), dtype=torch.float64) if weight is None else weight
    # An error is linear in what its label counts: the weight goes into the update's.
    others = list(_labels(task, update, weight_M, inner))
    for one in _labels(task, observe, torch.ones(len(task.labels_of(observe, "observe"))), inner):
        for other in others:
            by_row_NU = row_sums(products(one, other).double().cpu().T, other.item_N, total_OU.shape[1]).T
            total_OU -= row_sums(by_row_NU, one.item_N, total_OU.shape[0])
    return total_OU


def _mean_feature(task: Task, batch: Any) -> torch.Tensor:
    size, sum_BD, count_B = num_rows(batch), 0.0, 0
    for one in _labels(task, batch, torch.ones(len(task.labels_of(batch, "a batch")))):
        sum_BD = sum_BD + row_sums(one.feature_ND.double().cpu(), one.item_N, size)
        count_B = count_B + torch.bincount(one.item_N.cpu(), minlength=size)
    return sum_BD / count_B.clamp(min=1)[:, None]


def _labels(task: Task, batch: Any, weight_N: torch.Tensor, inner: bool = False) -> Iterator[_Labels]:
    """Tile by tile, one forward in all; parameters are frozen: nothing but the head's output has a gradient."""
    label_N, item_N = task.labels(batch), task.items(batch)
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def cut(head: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        calls.append((args[0].detach(), output.detach().requires_grad_()))
        return calls[-1][1]

    hook, seen = task.head.register_forward_hook(cut), 0
    inputs = _BlockInputs(task.model, batch) if inner else None
    try:
        with evaluated(task.model), frozen(task.model), torch.enable_grad():
            for logits_nV in task.logits(task.model, batch):
                part = slice(seen, seen := seen + len(logits_nV))
                feature, output = _only(calls, len(logits_nV))
                (logp_n,) = label_logp_tiles([logits_nV], label_N[part])
                (error,) = torch.autograd.grad((logp_n * weight_N[part].to(logp_n)).sum(), output)
                error_NV, feature_ND = (value.flatten(0, -2).to(logp_n) for value in (error, feature))
                row_N = item_N[part].repeat_interleave(len(error_NV) // len(logits_nV))
                used_N = (error_NV != 0).any(dim=1) if error.dim() > 2 else torch.ones_like(row_N, dtype=torch.bool)
                error_NV, feature_ND = error_NV[used_N], feature_ND[used_N]
                within = (error_NV @ task.head.weight.to(error_NV), *inputs.at(part, error_NV)) if inputs else ()
                yield _Labels(feature_ND, error_NV, row_N[used_N], *within)
    finally:
        hook.remove()
        if inputs:
            inputs.remove()


def _only(calls: list[tuple[torch.Tensor, torch.Tensor]], num_labels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output of the head's single call for a tile of so many labels."""
    if len(calls) != 1 or len(calls[0][1]) != num_labels:
        shapes = [tuple(output.shape) for _, output in calls]
        raise ValueError(f"the head returned {shapes} for {num_labels} labels, expected one tensor, a row per label")
    return calls.pop()


class _BlockInputs:
    """What attention and MLP of every block read in the forward that runs while this is installed."""

    def __init__(self, model: nn.Module, batch: Mapping[str, torch.Tensor]):
        self.row_N, self.column_N = predicting(batch["labels"])
        self.token_N = batch["input_ids"][self.row_N, self.column_N]
        self.shape = batch["input_ids"].shape
        base = base_causal_lm(model)
        self.width = base.config.get_text_config().hidden_size
        stack = decoder_blocks(base)
        self.found: list[list[torch.Tensor]] = [[] for _ in stack]
        self.hooks = [
            child.register_forward_pre_hook(partial(self._keep, found), with_kwargs=True)
            for found, block in zip(self.found, stack, strict=True)
            for child in block.children()
            if any(parameter.dim() > 1 for parameter in child.parameters())
        ]

    def _keep(self, found: list[torch.Tensor], module: nn.Module, args: tuple, kwargs: dict) -> None:
        read = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(read, torch.Tensor) or read.shape[-1] != self.width:
            return
        if read.dim() == 2 and len(read) == self.shape.numel():  # OPT's MLP reads all columns of all rows as rows
            read = read.view(*self.shape, -1)
        if read.dim() == 3:
            found.append(read.detach()[self.row_N, self.column_N])

    def at(self, part: slice, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs side by side at some labelled positions, (N, S), and the tokens there.

        Raises:
            ValueError: If fewer than two are known of a block.
        """
        for index, found in enumerate(self.found):
            if len(found) < 2:
                raise ValueError(
                    f"of block {index}, {len(found)} of its modules were seen to read hidden states of size "
                    f"{self.width}, expected 2, an attention and an MLP; use head_only"
                )
        inputs = [value[part].to(like) for found in self.found for value in found]
        return torch.cat(inputs, dim=1), self.token_N[part]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def decoder_blocks(base: nn.Module) -> nn.ModuleList:
    """The stack of a causal LM's blocks.

    Raises:
        ValueError: If there is no list of as many modules as the configuration has layers.
    """
    depth = base.config.get_text_config().num_hidden_layers
    for module in base.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(f"{type(base).__name__} has no list of its {depth} blocks; use head_only")
