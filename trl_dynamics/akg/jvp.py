"""Forward-mode passes: what a small change of the parameters does to the logits, exactly, without taking it.

n positions of one tile   V labels
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from trl_dynamics.akg.checks import refuse_split
from trl_dynamics.akg.modes import evaluated
from trl_dynamics.akg.operations import Nestable, Unhooked
from trl_dynamics.akg.task import Task

HALF = (torch.float16, torch.bfloat16)
# Takes a tile's logits (n, V) and their derivatives of first and, where asked for, second order along the change.
Visit = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None]


def push_forward(task: Task, changes: Mapping[str, torch.Tensor], batch: Any, visit: Visit, order: int = 1) -> None:
    """Call `visit` with every tile of logits and its directional derivatives along `changes`.

    The first order runs on dual numbers, one forward in which every value carries its derivative (about 3 to 4 plain
    forwards); the second order nests two such passes and holds the logits of the whole batch.

    Args:
        task ([`Task`]): Model and observables.
        changes (`Mapping`): By name, the direction in each parameter; the others stand still.
        batch: What is observed.
        visit (`Callable`): Takes (logits, first derivative, second derivative or None) of a tile, each (n, V).
        order (`int`): 1 or 2.

    Raises:
        ValueError: If an operation of the model has no forward-mode derivative.
    """
    refuse(task.model)
    if _in_half(task.model):
        changes, length = _of_length_one(changes)
        visit = _scaled(visit, length)
    with evaluated(task.model), _explained():
        (_first_order if order == 1 else _second_order)(task, changes, batch, visit)


def reverse_jacobian(
    task: Task, parameters: Mapping[str, nn.Parameter], batch: Any, weight_NV: torch.Tensor
) -> dict[str, torch.Tensor]:
    """J^T w: the gradient of sum(w * logits) by these parameters; those that the logits do not depend on are left out.

    Shapes: weight (N, V), one row per labelled position of the batch.
    """
    with evaluated(task.model, checkpointing=True), torch.enable_grad():
        tiles = list(task.logits(task.model, batch))
        weights = weight_NV.split([len(tile) for tile in tiles])
        found = torch.autograd.grad(tiles, list(parameters.values()), weights, allow_unused=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


def _first_order(task: Task, changes: Mapping[str, torch.Tensor], batch: Any, visit: Visit) -> None:
    with torch.no_grad(), forward_ad.dual_level():
        values = {name: p.detach() for name, p in task.model.named_parameters()}
        for name, change in changes.items():
            values[name] = forward_ad.make_dual(values[name], change.to(values[name].dtype))

        def run(model: nn.Module) -> None:
            for tile_nV in task.logits(model, batch):
                logits_nV, change_nV = forward_ad.unpack_dual(tile_nV)
                visit(logits_nV, torch.zeros_like(logits_nV) if change_nV is None else change_nV, None)

        with Unhooked():
            _with_values(task.model, values, run)


def push_forward_together(
    task: Task, changes: Sequence[Mapping[str, torch.Tensor]], batch: Any, read: Callable[[Iterator], tuple]
) -> tuple[tuple, tuple]:
    """What `read` makes of the logits' tiles, and its derivatives along each of several changes, in one pass.

    Derivatives have a first axis more, of the changes. All of them are computed beside the same values, which is
    faster than one [`push_forward`] for each and takes the memory of all.

    Args:
        task, batch: As of [`push_forward`].
        changes (`Sequence`): Directions; of parameters that one of them leaves out, it has zeros.
        read (`Callable`): From an iterator of tiles (n, V) to a tuple of tensors.

    Raises:
        ValueError: If an operation has no forward-mode derivative.
        RuntimeError: Of torch.func.vmap, if it cannot take an operation's derivative for several changes at once.
    """
    refuse(task.model)
    fixed = {name: p.detach() for name, p in task.model.named_parameters()}
    names = list(dict.fromkeys(name for change in changes for name in change))
    lengths = [1.0] * len(changes)
    if _in_half(task.model):
        changes, lengths = zip(*map(_of_length_one, changes), strict=True)
    stacked = tuple(
        torch.stack(
            [change[n].to(fixed[n].dtype) if n in change else torch.zeros_like(fixed[n]) for change in changes]
        )
        for n in names
    )
    del changes  # of half precision they are copies

    def at(*values: torch.Tensor) -> tuple:
        moved = fixed | dict(zip(names, values, strict=True))
        return _with_values(task.model, moved, lambda model: read(task.logits(model, batch)))

    def along(*change: torch.Tensor) -> tuple[tuple, tuple]:
        return torch.func.jvp(at, tuple(fixed[name] for name in names), change)

    with evaluated(task.model), _explained(), torch.no_grad(), Unhooked():
        values, derivatives = torch.func.vmap(along, out_dims=(None, 0))(*stacked)
    return values, tuple(
        d * d.new_tensor(lengths).view(-1, *[1] * (d.dim() - 1)) if any(x != 1.0 for x in lengths) else d
        for d in derivatives
    )


def push_forward_head(task: Task, changes: Mapping[str, torch.Tensor], batch: Any, visit: Visit) -> None:
    """As [`push_forward`], where nothing but the task's head moves: features stand still, a tied embedding does, too.

    Args:
        changes (`Mapping`): Directions by the names of the head's own parameters.
    """
    refuse(task.model)
    if _in_half(task.model):
        changes, length = _of_length_one(changes)
        visit = _scaled(visit, length)
    duals: dict[str, torch.Tensor] = {}

    def on_head(head: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if not duals:
            return None  # called from below
        own = dict(duals)
        duals.clear()
        try:
            return torch.func.functional_call(head, own, args)
        finally:
            duals.update(own)

    with evaluated(task.model), _explained(), torch.no_grad(), forward_ad.dual_level():
        values = dict(task.head.named_parameters())
        for name, change in changes.items():
            duals[name] = forward_ad.make_dual(values[name].detach(), change.to(values[name].dtype))
        hook = task.head.register_forward_hook(on_head)
        try:
            for tile_nV in task.logits(task.model, batch):
                logits_nV, change_nV = forward_ad.unpack_dual(tile_nV)
                visit(logits_nV, torch.zeros_like(logits_nV) if change_nV is None else change_nV, None)
        finally:
            hook.remove()


def _second_order(task: Task, changes: Mapping[str, torch.Tensor], batch: Any, visit: Visit) -> None:
    fixed = {name: p.detach() for name, p in task.model.named_parameters()}
    one = torch.ones((), dtype=torch.float64)

    def logits_at(distance: torch.Tensor) -> torch.Tensor:
        moved = {
            name: fixed[name] + distance.to(fixed[name]) * change.to(fixed[name]) for name, change in changes.items()
        }
        return _with_values(task.model, fixed | moved, lambda model: torch.cat(list(task.logits(model, batch))))

    def slope_at(distance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.func.jvp(logits_at, (distance,), (one.to(distance),))

    with torch.no_grad(), Nestable():
        zero = torch.zeros((), dtype=torch.float64)
        (logits_NV, first_NV), (_, second_NV) = torch.func.jvp(slope_at, (zero,), (one,))
    visit(logits_NV, first_NV, second_NV)


def _in_half(model: nn.Module) -> bool:
    """Whether any weight is of half precision, through which derivatives of others pass as well."""
    return any(parameter.dtype in HALF for parameter in model.parameters())


def _of_length_one(changes: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float]:
    """The changes over their Euclidean norm, and the norm: what is of length one does not vanish in half precision."""
    wide = [change.to(torch.promote_types(change.dtype, torch.float32)) for change in changes.values()]
    length = sum(float(torch.linalg.vector_norm(change)) ** 2 for change in wide) ** 0.5 or 1.0
    return {name: change / length for name, change in changes.items()}, length


def _scaled(visit: Visit, length: float) -> Visit:
    """A visit that is given derivatives of changes of this length; they are linear, and quadratic, in the change."""

    def scaled(logits_nV: torch.Tensor, first_nV: torch.Tensor, second_nV: torch.Tensor | None) -> None:
        visit(logits_nV, first_nV * length, None if second_nV is None else second_nV * length**2)

    return scaled


class _Call(nn.Module):
    """A function of a model as a module, since torch swaps parameters for the length of a module's forward."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module], Any]):
        super().__init__()
        self.model, self.call = model, call

    def forward(self) -> Any:
        return self.call(self.model)


def _with_values(model: nn.Module, values: Mapping[str, torch.Tensor], call: Callable[[nn.Module], Any]) -> Any:
    """`call(model)` with other parameters; tied ones follow."""
    named = {f"model.{name}": value for name, value in values.items()}
    return torch.func.functional_call(_Call(model, call), named, ())


def refuse(model: nn.Module) -> None:
    """Refuse what forward mode cannot go through, before anything is computed.

    Raises:
        ValueError: If weights are quantised, or split over processes.
    """
    refuse_split(model)
    if any(getattr(module, "is_quantized", False) for module in model.modules()):
        raise ValueError(
            "the weights are quantised, and their products have no forward-mode derivative; load the model without "
            "quantization_config or call its dequantize(), or use akg.gram, which needs a backward alone"
        )


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if not any(words in str(error) for words in ("forward AD", "forward mode", "forward-mode")):
            raise
        raise ValueError(
            f"an operation of this model has no forward-mode derivative ({str(error).splitlines()[0]:.200}); with "
            "transformers use attn_implementation='eager' or 'sdpa', and experts_implementation='eager' for mixtures "
            "of experts; akg.gram and akg.split.differences need no such derivative"
        ) from error
