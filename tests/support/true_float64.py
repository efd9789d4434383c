"""Models that compute in float64 all the way, which those of transformers do not: their norms round to float32."""

import functools

import torch
import torch.nn.functional as F
from torch import nn


def true_float64(model: nn.Module) -> nn.Module:
    """The model in float64, every RMS norm without its cast, attention by torch's own kernel (eager rounds too).

    Models that have eager attention alone (Gemma 2) keep its float32 softmax.
    """
    model = model.double().eval()
    if model._supports_sdpa:
        model.set_attn_implementation("sdpa")
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            # Gemma's norms multiply by 1 + weight.
            offset = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
            module.forward = functools.partial(_rms_norm, module, offset)
    return model


def _rms_norm(module: nn.Module, offset: float, hidden: torch.Tensor) -> torch.Tensor:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return F.rms_norm(hidden, hidden.shape[-1:], module.weight + offset, eps)
