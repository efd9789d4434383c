"""DeepSpeed ZeRO: what the engine is about to do to the weights, and the pieces of them that this process holds.

ZeRO-1 and ZeRO-2 split gradients and the optimiser's state, but leave every process the whole weights: the step is put
together on all of them, and forward mode takes it from there. ZeRO-3 splits the weights as well.

DeepSpeed steps inside of the backward, before transformers' callbacks; [`before_step`] comes in between.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from trl_dynamics.akg.split.differences import Shards, refuse_rounded_weights
from trl_dynamics.akg.steps import Step, Tensors, split_of

Engine = nn.Module  # deepspeed.DeepSpeedEngine; DeepSpeed is no requirement


@contextlib.contextmanager
def before_step(engine: Engine, call: Callable[[], None]) -> Iterator[None]:
    """Inside, `call` runs right before each step of the engine: the gradients of all processes and of all accumulated
    batches are averaged by then, and not yet clipped."""
    zero = engine.optimizer
    own, step = vars(zero).get("step"), zero.step

    def stepped(*args, **kwargs):
        call()
        return step(*args, **kwargs)

    zero.step = stepped
    try:
        yield
    finally:
        if own is None:
            del zero.step
        else:
            zero.step = own


def zero_shards(engine: Engine) -> Shards:
    """The pieces of a model that ZeRO-3 has split: those that forwards gather, beside which the optimiser has its own.

    Raises:
        ValueError: If the engine splits nothing, its weights are not float32, or DeepSpeed keeps other copies of them.
    """
    _refuse_other_copies(engine)
    refuse_rounded_weights(engine.module)
    values = {name: _owned(p, p.ds_tensor.data) for name, p in engine.module.named_parameters() if p.requires_grad}
    # What a forward leaves gathered, small weights among it, is released; the next forward gathers it again.
    return Shards(values, engine.optimizer.empty_partition_cache, engine.device, distributed=True)


def piecewise_step(engine: Engine) -> Step:
    """The step that ZeRO-3 is about to take, as this process' pieces of it; to be called within [`before_step`].

    Raises:
        ValueError: If the engine's optimiser is none of torch's that [`akg.steps`] knows, or as [`zero_shards`].
    """
    from deepspeed.utils import safe_get_local_grad

    _refuse_other_copies(engine)
    zero, names = engine.optimizer, {id(p): name for name, p in engine.module.named_parameters()}
    optimizer = zero.optimizer
    split = split_of(optimizer)
    pieces = {id(p): safe_get_local_grad(p).flatten() for group in zero.fp16_groups for p in group}
    clip = _clip_factor(engine, sum(_sum_sq(_owned(p, pieces[id(p)])) for g in zero.fp16_groups for p in g))
    parts: dict[str, Tensors] = {}
    for index, members in enumerate(zero.fp16_groups):
        flat = zero.fp32_partitioned_groups_flat[index]
        group = optimizer.param_groups[zero.sub_group_to_group_id[index]]
        gradient = torch.cat([pieces[id(p)] for p in members]).to(flat) * clip
        for part, change in split(gradient, flat.detach(), group, optimizer.state.get(flat, {})):
            of_members = change.split([p.ds_tensor.numel() for p in members])
            for p, piece in zip(members, of_members, strict=True):
                parts.setdefault(part, {})[names[id(p)]] = _owned(p, piece).to(p.ds_tensor.device)
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
    zero, names = engine.optimizer, {id(p): name for name, p in engine.module.named_parameters()}
    optimizer, flats = zero.optimizer, zero.single_partition_of_fp32_groups
    split = split_of(optimizer)
    held = [_flat_gradient(*given, names, gradients) for given in zip(zero.bit16_groups, flats, strict=True)]
    clip = _clip_factor(engine, sum(map(_sum_sq, held)))
    parts: dict[str, Tensors] = {}
    for flat, gradient, members, group in zip(flats, held, zero.bit16_groups, optimizer.param_groups, strict=True):
        for part, change in split(gradient * clip, flat.detach(), group, optimizer.state.get(flat, {})):
            of_members = {names[id(p)]: _gathered(p, change) for p in members}
            parts[part] = parts.get(part, {}) | of_members
    return Step(parts, clip)


def _flat_gradient(
    members: Sequence[nn.Parameter], flat: torch.Tensor, names: Mapping[int, str], given: Mapping | None
) -> torch.Tensor:
    """This process' part of a group's gradients, laid out as the optimiser has the weights."""
    gradient = torch.zeros_like(flat)
    for p in members:
        if (found := p._hp_mapping) is None:
            continue  # other processes have all of it
        if given is None:
            piece = found.get_lp_grad_fragment(p._index_in_param_group).flatten()
        else:
            piece = given.get(names[id(p)], torch.zeros_like(p)).flatten()
        here, there = found.lp_fragment_address, found.hp_fragment_address
        piece = piece.narrow(0, here.start, here.numel) if piece.numel() == p.numel() else piece
        gradient.narrow(0, there.start, there.numel).copy_(piece)
    return gradient


def _gathered(p: nn.Parameter, change: torch.Tensor) -> torch.Tensor:
    """A parameter's whole change, of which each process has a part, or none."""
    whole = torch.zeros(p.numel(), dtype=change.dtype, device=p.device)
    if (found := p._hp_mapping) is not None:
        here, there = found.lp_fragment_address, found.hp_fragment_address
        whole.narrow(0, here.start, here.numel).copy_(change.narrow(0, there.start, there.numel))
    dist.all_reduce(whole)
    return whole.view_as(p)


def _owned(p: nn.Parameter, piece: torch.Tensor) -> torch.Tensor:
    """A piece without what fills the last process' one up."""
    begin = dist.get_rank(p.ds_process_group) * p.ds_tensor.numel()
    return piece.narrow(0, 0, min(max(p.ds_numel - begin, 0), p.ds_tensor.numel()))


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
    zero = engine.optimizer
    given = {
        "weights or optimiser states on NVMe": zero.swap_optimizer or zero.params_in_nvme_and_cpu,
        "zero_hpz_partition_size > 1": engine.zero_hpz_partition_size() > 1,
        "zero_quantized_weights": engine.zero_quantized_weights() or engine.zero_quantized_nontrainable_weights(),
    }
    wrong = [what for what, is_on in given.items() if is_on]
    if wrong:
        raise ValueError(
            f"the engine uses {' and '.join(wrong)}, with which forwards read other copies of the weights than the "
            "pieces that are moved; leave it out, or train with ZeRO-2 or FSDP2"
        )
