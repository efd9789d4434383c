"""Forward-mode passes: what a small change of the parameters does to the logits, exactly, without taking it.

n positions of one tile   V labels
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from trl_dynamics.akg.task import Task

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

        _with_values(task.model, values, run)


def push_forward_head(task: Task, changes: Mapping[str, torch.Tensor], batch: Any, visit: Visit) -> None:
    """As [`push_forward`], where nothing but the task's head moves: features stand still, a tied embedding does, too.

    Args:
        changes (`Mapping`): Directions by the names of the head's own parameters.
    """
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

    with torch.no_grad(), _Nestable():
        zero = torch.zeros((), dtype=torch.float64)
        (logits_NV, first_NV), (_, second_NV) = torch.func.jvp(slope_at, (zero,), (one,))
    visit(logits_NV, first_NV, second_NV)


def _silu(value: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    return value * value.sigmoid()


def _gelu(value: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    if approximate == "tanh":
        return 0.5 * value * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (value + 0.044715 * value**3)))
    return 0.5 * value * (1 + torch.erf(value / 2**0.5))


class _Nestable(TorchFunctionMode):
    """Activations as sums and products: torch has no derivative of forward mode for the derivatives of its own."""

    WRITTEN_OUT: ClassVar[dict] = {F.silu: _silu, F.gelu: _gelu}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.WRITTEN_OUT.get(function, function)(*args, **(kwargs or {}))


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


@contextlib.contextmanager
def evaluated(model: nn.Module, *, checkpointing: bool = False) -> Iterator[None]:
    """Evaluation mode, and the attention kernel that has derivatives of forward mode; both put back at the end.

    With `checkpointing`, the modules that checkpoint their activations still do so, which transformers makes them do
    in training mode only; what is inside of them stays in evaluation mode, so that nothing is dropped.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    if checkpointing:
        for module in modes:
            module.training = bool(getattr(module, "gradient_checkpointing", False))
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if not any(words in str(error) for words in ("forward AD", "forward mode", "forward-mode")):
            raise
        raise ValueError(
            f"an operation of this model has no forward-mode derivative ({str(error).splitlines()[0]:.200}); with "
            "transformers use attn_implementation='eager' or 'sdpa', and full-precision weights in place of quantised "
            "ones"
        ) from error
