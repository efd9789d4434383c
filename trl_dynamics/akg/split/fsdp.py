"""The pieces of a model's weights that this process holds, and the observers' forward over all of them.

    N observed positions   B rows   T tokens

FSDP2 and DeepSpeed ZeRO-3 gather the weights of a module around its forward, so that observers must run through the
model as training runs it; [`stats_head`] does.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trl_dynamics import stats_head
from trl_dynamics.akg.modes import evaluated
from trl_dynamics.akg.split.differences import PRECISE, Shards, refuse_rounded_weights
from trl_dynamics.akg.steps import Step
from trl_dynamics.akg.task import causal_lm_labels, model_inputs, predicting
from trl_dynamics.compat import base_causal_lm


def fsdp_shards(model: nn.Module) -> Shards:
    """The pieces of a model that FSDP2 has split.

    Args:
        model (`nn.Module`): What `fully_shard` was called on last, a trainer's `model`.

    Raises:
        ValueError: If it is not the root of such a model, or its weights, or what it computes in, are not float32.
    """
    if not isinstance(model, FSDPModule):
        raise ValueError(
            f"{type(model).__name__} is not split by FSDP2 (fully_shard); where FSDP1 is used, set fsdp_version: 2"
        )
    refuse_rounded_weights(model)
    values = {name: p.detach().to_local() for name, p in model.named_parameters() if p.requires_grad}
    # Forwards may run elsewhere than the pieces are kept.
    device = torch.device(next(p.device_mesh.device_type for p in model.parameters()))
    return Shards(values, lambda: reshard(model), device, distributed=True)


def reshard(model: nn.Module) -> None:
    """Drop what FSDP2 has gathered: after a forward without a backward, the root's weights stay whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_step(step: Step) -> Step:
    """A step whose changes are DTensors, as this process' pieces of it."""
    parts = {part: {name: local(change) for name, change in changes.items()} for part, changes in step.parts.items()}
    return Step(parts, step.clip)


def sharded_label_logp(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """(N,) ln pi of the labels of this process' batch, nats; all processes call this together.

    Args:
        model (`nn.Module`): A causal LM with the stats head installed: a trainer's `model`.
        batch (`Mapping`): As of [`akg.task.causal_lm`].

    Raises:
        ValueError: If the batch is no such mapping, or the forward computes in half precision.
    """
    target_N = causal_lm_labels(batch)
    rows_N, cols_N = predicting(batch["labels"])
    num_columns = batch["labels"].shape[1]
    request = stats_head.StatsRequest(rows_N, cols_N, target_N, num_columns, top_k=1, return_hidden=True, float32=True)
    try:
        with torch.no_grad(), evaluated(model):
            stats = model(**model_inputs(base_causal_lm(model), batch), stats_request=request)
    finally:
        reshard(model)
    if (dtype := stats["hidden_ND"].dtype) not in PRECISE:
        raise ValueError(
            f"the model computes in {str(dtype).removeprefix('torch.')}, but central differences need float32: train "
            "with mixed_precision 'no' (bf16=False, fp16=False)"
        )
    return stats["target_logp"]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process' piece of a tensor that may be split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
