"""The one forward that gives per-token statistics: installed on a model instance, removed again.

TRL's fused LM head returns neither logits nor hidden states, so the model's forward is wrapped once more: called with
`stats_request=` it runs the backbone and a tiled head (or the model's own forward, see `ways.py`) and returns small
per-token tensors; called in any other way it is the forward it was. All work happens inside the root forward, so that
the hooks of FSDP and DeepSpeed ZeRO gather parameters as they do in training.
"""

import contextlib
import functools
import inspect
import types
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from trl_dynamics.compat import base_causal_lm, full_head_weights, logit_transform
from trl_dynamics.ops.tiled_head import CalledHead, Head, KnownLogits, TileLogits, token_stats
from trl_dynamics.stats_head.ways import MODULE, OWN, device_of_head, num_labels_of, way_of

_ORIGINAL = "_forward_without_stats_head"


@dataclass(frozen=True)
class StatsRequest:
    """Which positions to score against which labels.

    Shapes: `rows_N`, `cols_N` index the (B, T) input (the prediction at column c is of the token that follows it),
    `target_N` the label there, `extra_NE` further labels whose log-probabilities are wanted; all int64.
    `num_columns` is T: an adapter that prepends virtual tokens makes the hidden states longer than the input.
    `return_hidden` adds `hidden_ND`, the final hidden states that the LM head reads at these positions; where the
    model's own forward is used, those that its output embeddings read.

    `own_logits` asks for the logits (B, T, V) of the model's own forward instead, as `logits`.

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
    own_logits: bool = False
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
        ValueError: If the model has no LM head to score with, or encodes the prompt apart from the answer.
    """
    base = base_causal_lm(model)
    if hasattr(base, _ORIGINAL):
        return
    require_decoder(base)
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


def require_decoder(base: nn.Module) -> None:
    """Refuse models that read the prompt in an encoder.

    Raises:
        ValueError: If this is one.
    """
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(base).__name__} is an encoder-decoder, expected a causal language model, in which prompt and "
            "answer are one sequence; take a decoder-only model"
        )


def own_logits(base: nn.Module, forward: Callable, *args, **kwargs) -> torch.Tensor:
    """(B, T, V) logits of an ordinary `forward` without labels, `base`'s own or one around it.

    Raises:
        ValueError: If the forward returns none.
    """
    if "use_cache" in inspect.signature(type(base).forward).parameters:
        kwargs["use_cache"] = "past_key_values" in kwargs
    output = forward(*args, **kwargs)
    logits_BTV = output[0] if isinstance(output, tuple) else getattr(output, "logits", None)
    if not isinstance(logits_BTV, torch.Tensor) or logits_BTV.dim() != 3:
        raise ValueError(f"{type(base).__name__} returns no logits (B, T, V), so that it cannot be scored")
    return logits_BTV


def _stats_forward(base: nn.Module, request: StatsRequest, *args, **kwargs) -> TokenStats:
    # PEFT wrappers hand over None for every argument of a causal LM, labels included; the backbone knows none of them.
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if request.own_logits:
        return TokenStats({"logits": own_logits(base, getattr(base, _ORIGINAL), *args, **kwargs)})
    way = way_of(base)
    if way == OWN:
        return _own_stats(base, request, *args, **kwargs)
    kwargs["use_cache"] = "past_key_values" in kwargs
    hidden_BTD = base.base_model(*args, **kwargs).last_hidden_state
    # ZeRO-3 expects every forward to use the parameters that its first one used, so even one that scores nothing looks
    # at the head's.
    device = device_of_head(base.get_output_embeddings())
    if request.backbone_only:
        return TokenStats()
    hidden_ND = _at_positions(hidden_BTD, request).to(device)
    with _called_head(base) if way == MODULE else whole_head(base, hidden_ND) as head:
        return _stats(hidden_ND, head, request, {"hidden_ND": hidden_ND})


@contextlib.contextmanager
def _called_head(base: nn.Module) -> Iterator[CalledHead]:
    head, (factor, softcap) = base.get_output_embeddings(), logit_transform(base)
    yield CalledHead(head, num_labels_of(base, head), factor, softcap)


def _own_stats(base: nn.Module, request: StatsRequest, *args, **kwargs) -> TokenStats:
    """From the logits of the model's own forward, which exist as a whole here."""
    device_of_head(base.get_output_embeddings())  # for ZeRO-3, as above
    read: list[torch.Tensor] = []
    hook = base.get_output_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0]))
    try:
        logits_BTV = own_logits(base, getattr(base, _ORIGINAL), *args, **kwargs)
    finally:
        hook.remove()
    if request.backbone_only:
        return TokenStats()
    num_columns, device = logits_BTV.shape[1], logits_BTV.device
    cols_N = request.cols_N + (num_columns - request.num_columns)
    index_N = (request.rows_N * num_columns + cols_N).to(device)
    more = {}
    if request.return_hidden:
        if len(read) != 1 or read[0].shape[:2] != logits_BTV.shape[:2]:
            raise ValueError(f"the LM head of {type(base).__name__} reads no hidden state per position")
        more["hidden_ND"] = _at_positions(read[0], request)
    return _stats(index_N, KnownLogits(logits_BTV.flatten(0, 1)), request, more)


def _at_positions(values_BTD: torch.Tensor, request: StatsRequest) -> torch.Tensor:
    """Rows of a (B, T, D) tensor at the scored positions; virtual tokens make it longer than the input."""
    shift, device = values_BTD.shape[1] - request.num_columns, values_BTD.device
    return values_BTD[request.rows_N.to(device), (request.cols_N + shift).to(device)]


def _stats(inputs_N: torch.Tensor, head: TileLogits, request: StatsRequest, hidden: dict) -> TokenStats:
    device = inputs_N.device
    extra_NE = None if request.extra_NE is None else request.extra_NE.to(device)
    stats = token_stats(inputs_N, head, request.target_N.to(device), extra_NE, request.top_k)
    return TokenStats(stats | hidden if request.return_hidden else stats)
