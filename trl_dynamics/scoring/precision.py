"""Scoring in float32 whatever the weights' dtype: exact enough that batch composition hardly shows."""

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import nn

from trl_dynamics.compat import shards_or_casts_parameters

_HALF = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def float32_compute(model: nn.Module, accelerator: Accelerator | None = None) -> Iterator[None]:
    """Half-precision weights as float32 copies while their module runs; autocast is left by the stats head itself.

    A layer's weights are copied at a time, so memory grows by the largest layer only. The parameters themselves are
    not touched, they only step aside: assigning to their `.data` would cut the hooks by which DDP reduces gradients.

    Raises:
        ValueError: If the processes' own wrapper casts or gathers the weights (FSDP or DeepSpeed in half precision).
    """
    half = any(parameter.dtype in _HALF for parameter in model.parameters())
    if accelerator is not None and shards_or_casts_parameters(accelerator, half_weights=half):
        raise ValueError(
            f"probe_dtype=float32 is not possible under {accelerator.distributed_type.value} with half-precision "
            "compute, whose wrapper casts the weights itself; train with mixed_precision 'no' and float32 weights, or "
            "leave probe_dtype out and score the checkpoints later with `trl-dynamics track --dtype float32`"
        )
    aside: dict[nn.Module, list[tuple[nn.Module, str, nn.Parameter]]] = {}

    def put_back(unit: nn.Module, *_) -> None:
        for module, name, parameter in aside.pop(unit, []):
            module._parameters[name] = parameter

    def enlarge(unit: nn.Module, *_) -> None:
        aside[unit] = [
            (module, name, parameter)
            for module in units[unit]
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.dtype in _HALF
        ]
        for module, name, parameter in aside[unit]:
            module._parameters[name] = parameter.detach().float()

    units = dict(_units(model))
    handles = [unit.register_forward_pre_hook(enlarge) for unit in units]
    handles += [unit.register_forward_hook(put_back, always_call=True) for unit in units]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for unit in list(aside):
            put_back(unit)


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """What is enlarged at a time: each layer of a list with all inside it, each other module with its own weights.

    Inside a layer, adapters look at the dtype of their parts before these run, so it is enlarged as a whole.
    """
    if isinstance(module, nn.ModuleList):
        yield from ((layer, list(layer.modules())) for layer in module)
        return
    if any(parameter.dtype in _HALF for parameter in module.parameters(recurse=False)):
        yield module, [module]
    for child in module.children():
        yield from _units(child)
