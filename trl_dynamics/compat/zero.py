"""What DeepSpeed's ZeRO keeps where: flat groups of weights, and the pieces of parameters that this process holds.

DeepSpeed is no requirement, and nothing here imports it.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

Engine = nn.Module  # deepspeed.DeepSpeedEngine


@dataclass(frozen=True)
class FlatGroup:
    """Parameters that the engine's optimiser steps as one tensor.

    Args:
        members (`Sequence[nn.Parameter]`): They, in order.
        flat (`torch.Tensor`): This process' part of them in float32, what the optimiser steps.
        settings (`dict`): The optimiser's entry of `param_groups`.
    """

    members: Sequence[nn.Parameter]
    flat: torch.Tensor
    settings: dict


@dataclass(frozen=True)
class Fragment:
    """The part of a parameter that a flat tensor of this process has.

    Args:
        parameter (`nn.Parameter`): The parameter.
        start, flat_start, size (`int`): Where the part begins in the flattened parameter and in the flat tensor.
    """

    parameter: nn.Parameter
    start: int
    flat_start: int
    size: int

    def of_parameter(self, whole: torch.Tensor) -> torch.Tensor:
        """The part in a flattened parameter."""
        return whole.narrow(0, self.start, self.size)

    def of_flat(self, flat: torch.Tensor) -> torch.Tensor:
        """The part in a flat tensor."""
        return flat.narrow(0, self.flat_start, self.size)

    def gradient(self) -> torch.Tensor:
        """Flat, training's averaged gradient: of the part, or of the whole parameter where that is kept."""
        return self.parameter._hp_mapping.get_lp_grad_fragment(self.parameter._index_in_param_group).flatten()


def whole_groups(engine: Engine) -> list[FlatGroup]:
    """The groups of ZeRO-1 and ZeRO-2, one for each group of the optimiser."""
    zero = engine.optimizer
    groups = zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, zero.optimizer.param_groups, strict=True)
    return [FlatGroup(*group) for group in groups]


def piece_groups(engine: Engine) -> list[FlatGroup]:
    """The groups of ZeRO-3, into which it cuts those of the optimiser."""
    zero = engine.optimizer
    settings = [zero.optimizer.param_groups[zero.sub_group_to_group_id[i]] for i in range(len(zero.fp16_groups))]
    groups = zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, settings, strict=True)
    return [FlatGroup(*group) for group in groups]


def fragment_of(parameter: nn.Parameter) -> Fragment | None:
    """Which part of a parameter ZeRO-1 or ZeRO-2 steps on this process; None where other processes have all of it."""
    if (found := parameter._hp_mapping) is None:
        return None
    here, there = found.lp_fragment_address, found.hp_fragment_address
    return Fragment(parameter, here.start, there.start, here.numel)


def is_in_pieces(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 splits a parameter over processes."""
    return hasattr(parameter, "ds_status")


def piece_of(parameter: nn.Parameter) -> torch.Tensor:
    """Flat, this process' piece of a parameter that ZeRO-3 has split; the last process' piece is filled up."""
    return parameter.ds_tensor.data


def without_filling(parameter: nn.Parameter, piece: torch.Tensor) -> torch.Tensor:
    """A piece without what fills the last process' one up."""
    size = parameter.ds_tensor.numel()
    begin = dist.get_rank(parameter.ds_process_group) * size
    return piece.narrow(0, 0, min(max(parameter.ds_numel - begin, 0), size))


def whole_numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, of which ZeRO-3 leaves none in sight outside a forward."""
    return getattr(parameter, "ds_numel", parameter.numel())


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter, of which ZeRO-3 leaves none in sight outside a forward."""
    return getattr(parameter, "ds_shape", parameter.shape)


def release_gathered(engine: Engine) -> None:
    """Drop what ZeRO-3 left gathered after a forward, small weights among it; the next one gathers it again."""
    engine.optimizer.empty_partition_cache()


def other_copies(engine: Engine) -> list[str]:
    """Settings of ZeRO-3 with which forwards read other copies of the weights than [`piece_of`]."""
    zero = engine.optimizer
    given = {
        "weights or optimiser states on NVMe": zero.swap_optimizer or zero.params_in_nvme_and_cpu,
        "zero_hpz_partition_size > 1": engine.zero_hpz_partition_size() > 1,
        "zero_quantized_weights": engine.zero_quantized_weights() or engine.zero_quantized_nontrainable_weights(),
    }
    return [what for what, is_on in given.items() if is_on]


@contextlib.contextmanager
def without_zero3() -> Iterator[None]:
    """Load models whole on this process, also where training arguments have switched on ZeRO-3 for all loading."""
    zero3 = sys.modules.get("transformers.integrations.deepspeed")
    if zero3 is None:
        yield
        return
    reference, zero3._hf_deepspeed_config_weak_ref = zero3._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        zero3._hf_deepspeed_config_weak_ref = reference
