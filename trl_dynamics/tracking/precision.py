"""Scoring in float32 whatever the weights' dtype: exact enough that batch composition hardly shows."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from trl_dynamics.compat import shards_or_casts_parameters

_HALF = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def float32_compute(model: nn.Module, accelerator=None) -> Iterator[None]:
    """Half-precision weights as float32 copies while their module runs; autocast is left by the stats head itself.

    One module's weights are copied at a time, so memory grows by the largest module only. The weights themselves are
    not touched: each parameter holds its own storage again when its module is done, also after an error.

    Raises:
        ValueError: If the processes' own wrapper casts or gathers the weights (FSDP or DeepSpeed in half precision).
    """
    owners = [
        module
        for module in model.modules()
        if any(parameter.dtype in _HALF for parameter in module.parameters(recurse=False))
    ]
    if accelerator is not None and shards_or_casts_parameters(accelerator, half_weights=bool(owners)):
        raise ValueError(
            f"probe_dtype=float32 is not possible under {accelerator.distributed_type.value} with half-precision "
            "compute, whose wrapper casts the weights itself; train with mixed_precision 'no' and float32 weights, or "
            "leave probe_dtype out and score the checkpoints later with `trl-dynamics track --dtype float32`"
        )
    kept: dict[int, list[tuple[nn.Parameter, torch.Tensor]]] = {}

    def enlarge(module: nn.Module, args: tuple) -> None:
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.dtype in _HALF]
        kept[id(module)] = [(parameter, parameter.data) for parameter in own]
        for parameter in own:
            parameter.data = parameter.data.float()

    def put_back(module: nn.Module, args: tuple, output: object) -> None:
        for parameter, data in kept.pop(id(module), []):
            parameter.data = data

    handles = [module.register_forward_pre_hook(enlarge) for module in owners]
    handles += [module.register_forward_hook(put_back, always_call=True) for module in owners]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameters in kept.values():
            for parameter, data in parameters:
                parameter.data = data
