"""How logits come from a causal LM: from its head's matrix, from its head as a module, or from its own forward.

Structure decides first, anew at every forward: adapters come and go. What the numbers say afterwards is kept on the
model ([`use_own_forward`]).
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trl_dynamics.compat import base_causal_lm, is_in_pieces, is_plain_linear, longrope_boundaries

MATRIX, MODULE, OWN = "matrix", "module", "own forward"
# Most bytes of the float32 logits (B, T, V) of one forward of the model's own; a longer row is a batch of its own.
OWN_LOGITS_BYTES = 1 << 28
_OWN = "_stats_own_forward"


@dataclass(frozen=True)
class _OwnForward:
    """Kept on a model that is scored by its own forward; no plain number, which a scoring would take away again."""

    num_labels: int


def way_of(base: nn.Module) -> str:
    """`MATRIX` for a plain `nn.Linear`, `MODULE` for other heads, `OWN` where neither gives the model's logits.

    A head of another kind whose weights are split over processes would gather them once per tile, and processes have
    different numbers of tiles: there the model's own forward runs as well.
    """
    if hasattr(base, _OWN):
        return OWN
    head = base.get_output_embeddings()
    if is_plain_linear(head):
        return MATRIX
    return OWN if has_split_weights(head) else MODULE


def use_own_forward(base: nn.Module, num_labels: int) -> None:
    """From now on this model's statistics come from its own forward, whose logits have so many labels."""
    setattr(base, _OWN, _OwnForward(num_labels))


def own_forward_tokens(model: nn.Module) -> int | None:
    """Most tokens of one forward, padding included, where the model's own forward is used; None elsewhere."""
    own = getattr(base_causal_lm(model), _OWN, None)
    return None if own is None else max(1, OWN_LOGITS_BYTES // (4 * own.num_labels))


def length_boundaries(model: nn.Module) -> tuple[int, ...]:
    """Lengths of a row above which the model computes otherwise, for every row of a batch as soon as one is longer."""
    return longrope_boundaries(base_causal_lm(model).config)


def num_labels_of(base: nn.Module, head: nn.Module) -> int:
    """How many labels the head has, as far as it says; a size of tiles depends on it, no number."""
    return getattr(head, "out_features", None) or base.config.get_text_config().vocab_size


def device_of_head(head: nn.Module) -> torch.device:
    """The device of the head's weights; ZeRO-3 notices that they are looked at."""
    weight = getattr(head, "weight", None)
    return weight.device if isinstance(weight, torch.Tensor) else next(head.parameters()).device


def has_split_weights(module: nn.Module) -> bool:
    """Whether weights lie in pieces on several processes: FSDP2 or ZeRO-3."""
    return any(isinstance(part, FSDPModule) for part in module.modules()) or any(
        isinstance(parameter, DTensor) or is_in_pieces(parameter) for parameter in module.parameters()
    )
