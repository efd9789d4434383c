"""More from the forward that the loss runs anyway: sum p^2 of TRL's fused head, and hidden states of some tokens.

    B rows   T tokens, one less than the input has columns   N observed tokens   D hidden

The model's forward is wrapped once more; called without `loss_request=` it is the forward it was. All work happens
inside the root forward, where FSDP and DeepSpeed ZeRO have gathered the head.
"""

import functools
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from trl_dynamics.compat import add_sum_sq_to_head, base_causal_lm
from trl_dynamics.ops.tiled_head import Head
from trl_dynamics.stats_head import whole_head


class TokenObserver(Protocol):
    """Computes what it needs from the hidden states of the observed tokens, and keeps it itself."""

    def observe(self, hidden_ND: torch.Tensor, head: Head, target_N: torch.Tensor) -> None:
        """Once per forward, without gradients; `head` is whole here and only here.

        Shapes: hidden (N, D), the states that predict the tokens; target (N,) int64, the tokens; in the order of
        `mask_BT.nonzero()`, and on the device of the head.
        """


@dataclass(frozen=True)
class LossRequest:
    """What a fused forward is to give besides TRL's output.

    Shapes: `input_ids` (B, T + 1), `observed_mask_BT` (B, T) bool: which tokens the observers see.
    """

    sum_sq: bool
    observers: Sequence[TokenObserver] = ()
    input_ids: torch.Tensor | None = None
    observed_mask_BT: torch.Tensor | None = None


def install(model: nn.Module) -> None:
    """Wrap the forward that a DPO trainer has just given the causal LM in `model`.

    Once per trainer: TRL puts a new fused head over whatever an earlier trainer left on the same model.
    """
    base = base_causal_lm(model)
    plain, with_sum_sq = (f"_{kind}_forward_{_num_installed(base)}" for kind in ("loss", "sum_sq"))
    setattr(base, plain, base.forward)
    add_sum_sq_to_head(base)
    setattr(base, with_sum_sq, base.forward)

    # The signature stays that of the class: `generate` validates its arguments against it.
    @functools.wraps(type(base).forward)
    def forward(self, *args, loss_request: LossRequest | None = None, **kwargs):
        if loss_request is None:
            return getattr(self, plain)(*args, **kwargs)
        fused = getattr(self, with_sum_sq if loss_request.sum_sq else plain)
        return _observed(self, loss_request, fused, *args, **kwargs)

    base.forward = types.MethodType(forward, base)


def _num_installed(base: nn.Module) -> int:
    return sum(name.startswith("_loss_forward_") for name in vars(base))


def _observed(base: nn.Module, request: LossRequest, fused, *args, **kwargs):
    if not request.observers:
        return fused(*args, **kwargs)
    states: list[torch.Tensor] = []
    hook = base.base_model.register_forward_hook(
        lambda _, __, output: states.append(output.last_hidden_state.detach())
    )
    try:
        output = fused(*args, **kwargs)
    finally:
        hook.remove()
    rows_N, cols_N = request.observed_mask_BT.nonzero(as_tuple=True)
    # An adapter that prepends virtual tokens makes the hidden states longer than the input.
    shift = states[0].shape[1] - request.input_ids.shape[1]
    # With a `device_map`, input, last layer and head may be on three devices; all that observers see is on the head's.
    last, device = states[0].device, base.get_output_embeddings().weight.device
    with torch.no_grad():
        hidden_ND = states[0][rows_N.to(last), (cols_N + shift).to(last)].to(device)
        target_N = request.input_ids[rows_N, cols_N + 1].to(device)
        with whole_head(base, hidden_ND) as head:
            for observer in request.observers:
                observer.observe(hidden_ND, head, target_N)
    return output
