"""DeepSpeed ZeRO: what the engine is about to do to the weights, and the pieces of them that this process holds.

ZeRO-1 and ZeRO-2 split gradients and the optimiser's state, but leave every process the whole weights: the step is put
together on all of them, and forward mode takes it from there. ZeRO-3 splits the weights as well.

DeepSpeed steps inside of the backward, before transformers' callbacks; [`before_step`] comes in between.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import nn

from trl_dynamics.akg.split.differences import Shards, refuse_rounded_weights
from trl_dynamics.akg.steps import Step, Tensors, split_of
from trl_dynamics.compat import zero
from trl_dynamics.compat.zero import Engine, FlatGroup


@contextlib.contextmanager
def before_step(engine: Engine, call: Callable[[], None]) -> Iterator[None]:
    """Inside, `call` runs right before each step of the engine: the gradients of all processes and of all accumulated
    batches are averaged by then, and not yet clipped."""
    optimizer = engine.optimizer
    own, step = vars(optimizer).get("step"), optimizer.step

    def stepped(*args, **kwargs):
        call()
        return step(*args, **kwargs)

    optimizer.step = stepped
    try:
        yield
    finally:
        if own is None:
            del optimizer.step
        else:
            optimizer.step = own


def zero_shards(engine: Engine) -> Shards:
    """The pieces of a model that ZeRO-3 has split: those that forwards gather, beside which the optimiser has its own.

    Raises:
        ValueError: If the engine splits nothing, its weights are not float32, or DeepSpeed keeps other copies of them.
    """
    _refuse_other_copies(engine)
    refuse_rounded_weights(engine.module)
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    values = {name: zero.without_filling(p, zero.piece_of(p)) for name, p in trained.items()}
    return Shards(values, lambda: zero.release_gathered(engine), engine.device, distributed=True)


def piecewise_step(engine: Engine) -> Step:
    """The step that ZeRO-3 is about to take, as this process' pieces of it; to be called within [`before_step`].

    Raises:
        ValueError: If the engine's optimiser is none of torch's that [`akg.steps`] knows, or as [`zero_shards`].
    """
    from deepspeed.utils import safe_get_local_grad

    _refuse_other_copies(engine)
    groups, names = zero.piece_groups(engine), {id(p): name for name, p in engine.module.named_parameters()}
    optimizer = engine.optimizer.optimizer
    split = split_of(optimizer)
    pieces = {id(p): safe_get_local_grad(p).flatten() for group in groups for p in group.members}
    own = [zero.without_filling(p, pieces[id(p)]) for group in groups for p in group.members]
    clip = _clip_factor(engine, sum(map(_sum_sq, own)))
    parts: dict[str, Tensors] = {}
    for group in groups:
        flat, held = group.flat, [zero.piece_of(p) for p in group.members]
        gradient = torch.cat([pieces[id(p)] for p in group.members]).to(flat) * clip
        for part, change in split(gradient, flat.detach(), group.settings, optimizer.state.get(flat, {})):
            of_members = change.split([piece.numel() for piece in held])
            for p, there, piece in zip(group.members, held, of_members, strict=True):
                own_piece = zero.without_filling(p, piece).to(there.device)
                parts.setdefault(part, {})[names[id(p)]] = own_piece
    return Step(parts, clip)


def whole_step(engine: Engine, gradients: Mapping[str, torch.Tensor] | None = None) -> Step:
    """The step that ZeRO-1 or ZeRO-2 is about to take, whole on every process; to be called within [`before_step`].

    Args:
        engine: DeepSpeed's.
        gradients (`Mapping`, *optional*): By name, whole gradients that take the place of training's.

    Raises:
        ValueError: If the engine is of another stage, or its optimiser none of torch's that [`akg.steps`] knows.
    """
    _refuse_stage(engine, (1, 2))
    groups, names = zero.whole_groups(engine), {id(p): name for name, p in engine.module.named_parameters()}
    optimizer = engine.optimizer.optimizer
    split = split_of(optimizer)
    held = [_flat_gradient(group, names, gradients) for group in groups]
    clip = _clip_factor(engine, sum(map(_sum_sq, held)))
    parts: dict[str, Tensors] = {}
    for group, gradient in zip(groups, held, strict=True):
        state = optimizer.state.get(group.flat, {})
        for part, change in split(gradient * clip, group.flat.detach(), group.settings, state):
            of_members = {names[id(p)]: _gathered(p, change) for p in group.members}
            parts[part] = parts.get(part, {}) | of_members
    return Step(parts, clip)


def _flat_gradient(group: FlatGroup, names: Mapping[int, str], given: Mapping | None) -> torch.Tensor:
    """This process' part of a group's gradients, laid out as the optimiser has the weights."""
    gradient = torch.zeros_like(group.flat)
    for p in group.members:
        if (part := zero.fragment_of(p)) is None:
            continue  # other processes have all of it
        piece = part.gradient() if given is None else given.get(names[id(p)], torch.zeros_like(p)).flatten()
        part.of_flat(gradient).copy_(part.of_parameter(piece) if piece.numel() == p.numel() else piece)
    return gradient


def _gathered(p: nn.Parameter, change: torch.Tensor) -> torch.Tensor:
    """A parameter's whole change, of which each process has a part, or none."""
    whole = torch.zeros(p.numel(), dtype=change.dtype, device=p.device)
    if (part := zero.fragment_of(p)) is not None:
        part.of_parameter(whole).copy_(part.of_flat(change))
    dist.all_reduce(whole)
    return whole.view_as(p)


def _sum_sq(tensor: torch.Tensor) -> float:
    return float(tensor.square().sum(dtype=torch.float64))


def _clip_factor(engine: Engine, sum_sq: float) -> float:
    """By what DeepSpeed multiplies the gradient, `sum_sq` being this process' share of its squared norm."""
    limit = engine.gradient_clipping()
    if not limit:
        return 1.0
    share = torch.tensor(sum_sq, dtype=torch.float64, device=engine.device)
    dist.all_reduce(share)
    return min(1.0, limit / (float(share) ** 0.5 + 1e-6))


def _refuse_stage(engine: Engine, stages: tuple[int, ...]) -> None:
    stage = engine.zero_optimization_stage()
    if stage not in stages:
        raise ValueError(f"the engine runs at ZeRO stage {stage}, expected {' or '.join(map(str, stages))}")


def _refuse_other_copies(engine: Engine) -> None:
    _refuse_stage(engine, (3,))
    if wrong := zero.other_copies(engine):
        raise ValueError(
            f"the engine uses {' and '.join(wrong)}, with which forwards read other copies of the weights than the "
            "pieces that are moved; leave it out, or train with ZeRO-2 or FSDP2"
        )
