"""The one forward that gives per-token statistics: installed on a model instance, removed again.

TRL's fused LM head returns neither logits nor hidden states, so the model's forward is wrapped once more: called with
`stats_request=` it runs the backbone and a tiled head and returns small per-token tensors; called in any other way it
is the forward it was. All work happens inside the root forward, so that the hooks of FSDP and DeepSpeed ZeRO gather
parameters as they do in training.
"""

import contextlib
import functools
import types
from collections import UserDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from trl_dynamics.compat import base_causal_lm, full_head_weights, logit_transform
from trl_dynamics.ops.tiled_head import Head, token_stats

_ORIGINAL = "_forward_without_stats_head"


@dataclass(frozen=True)
class StatsRequest:
    """Which positions to score against which labels.

    Shapes: `rows_N`, `cols_N` index the (B, T) input (the prediction at column c is of the token that follows it),
    `target_N` the label there, `extra_NE` further labels whose log-probabilities are wanted; all int64.
    `num_columns` is T: an adapter that prepends virtual tokens makes the hidden states longer than the input.
    `return_hidden` adds `hidden_ND`, the final hidden states that the LM head reads at these positions.

    `float32` leaves an autocast that is on.

    Rows that continue prompts which ran before are given with that cache as `past_key_values` to the forward;
    [`prompts_only`] asks for the forward that fills it.
    """

    rows_N: torch.Tensor
    cols_N: torch.Tensor
    target_N: torch.Tensor
    num_columns: int
    extra_NE: torch.Tensor | None = None
    top_k: int = 10
    return_hidden: bool = False
    backbone_only: bool = False
    float32: bool = False


class TokenStats(UserDict):
    """Statistics by name, which FSDP2 does not look into.

    In bf16 it rounds every tensor that it finds in the output of a root forward, whatever kind of dict that is. Its
    hooks for the backward find nothing here either, so no gradients flow from here under FSDP2.
    """


def prompts_only(num_columns: int, float32: bool = False) -> StatsRequest:
    """A request that scores nothing: the forward runs the backbone, for the sake of the cache that it fills."""
    nothing_N = torch.zeros(0, dtype=torch.int64)
    return StatsRequest(nothing_N, nothing_N, nothing_N, num_columns, backbone_only=True, float32=float32)


def install(model: nn.Module) -> None:
    """Wrap the forward of the causal LM in `model` (a PEFT wrapper is looked through); a second call does nothing.

    A deep copy of the model has the head as well, and runs on its own weights. TRL's fused head below it does so in
    fused calls alone: asked for logits, the copy of a trainer's model still runs the model that TRL patched.

    Raises:
        ValueError: If the model has no LM head to score with.
    """
    base = base_causal_lm(model)
    if hasattr(base, _ORIGINAL):
        return
    if getattr(base, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(f"{type(base).__name__} has no LM head; per-token statistics need a causal language model")

    # The signature stays that of the class: `generate` validates its arguments against it.
    @functools.wraps(type(base).forward)
    def forward(self, *args, stats_request: StatsRequest | None = None, **kwargs):
        if stats_request is None:
            # A deep copy rebinds the methods that it finds on the instance, not those that a function closes over.
            return getattr(self, _ORIGINAL)(*args, **kwargs)
        # Accelerate puts its autocast into the model's forward, so that only in here it can be left again.
        off = torch.autocast(self.device.type, enabled=False) if stats_request.float32 else contextlib.nullcontext()
        with off:
            return _stats_forward(self, stats_request, *args, **kwargs)

    setattr(base, _ORIGINAL, base.forward)
    base.forward = types.MethodType(forward, base)


def is_installed(model: nn.Module) -> bool:
    """Whether `model`, or the causal LM inside its wrappers, has the head."""
    return any(hasattr(module, _ORIGINAL) for module in model.modules())


def remove(model: nn.Module) -> None:
    """Put back the forward that was there before [`install`]; does nothing when it is not installed.

    Forwards that others have put around it since then go with it, accelerate's autocast among them.
    """
    base = base_causal_lm(model)
    if not hasattr(base, _ORIGINAL):
        return
    original = getattr(base, _ORIGINAL)
    vars(base).pop("forward", None)
    if base.forward != original:
        base.forward = original
    delattr(base, _ORIGINAL)


@contextlib.contextmanager
def whole_head(base: nn.Module, hidden_ND: torch.Tensor) -> Iterator[Head]:
    """The LM head, whole on this process whatever shards it; only valid inside the model's own root forward.

    Args:
        base (`nn.Module`): The causal language model.
        hidden_ND (`torch.Tensor`): Final hidden states that the head is for.
    """
    factor, softcap = logit_transform(base)
    with full_head_weights(base.get_output_embeddings()) as (weight_VD, bias_V):
        if not torch.is_autocast_enabled(hidden_ND.device.type):
            # Where half-precision weights are scored in float32, the hidden states are wider than the head.
            weight_VD = weight_VD.to(hidden_ND.dtype)
            bias_V = None if bias_V is None else bias_V.to(hidden_ND.dtype)
        yield Head(weight_VD, bias_V, factor, softcap)


def _stats_forward(base: nn.Module, request: StatsRequest, *args, **kwargs) -> TokenStats:
    # PEFT wrappers hand over None for every argument of a causal LM, labels included; the backbone knows none of them.
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    kwargs["use_cache"] = "past_key_values" in kwargs
    hidden_BTD = base.base_model(*args, **kwargs).last_hidden_state
    # ZeRO-3 expects every forward to use the parameters that its first one used, so even one that scores nothing looks
    # at the head's.
    lm_head = base.get_output_embeddings()
    device = lm_head.weight.device
    if request.backbone_only:
        return TokenStats()
    shift = hidden_BTD.shape[1] - request.num_columns
    last = hidden_BTD.device
    hidden_ND = hidden_BTD[request.rows_N.to(last), (request.cols_N + shift).to(last)].to(device)
    extra_NE = None if request.extra_NE is None else request.extra_NE.to(hidden_ND.device)
    with whole_head(base, hidden_ND) as head:
        stats = token_stats(hidden_ND, head, request.target_N.to(hidden_ND.device), extra_NE, request.top_k)
    return TokenStats(stats | {"hidden_ND": hidden_ND} if request.return_hidden else stats)
