"""What DPO's loss computed on its way, caught without a second forward; and the gradient of its log-probabilities.

    B = 2P rows: P chosen answers, then the P rejected ones   T tokens, one less than the input has columns

TRL's loss runs unchanged. A [`LossRecorder`] stands in for its model and keeps the output; hooks on the loss and on
the output's `log_probs` see d loss / d ln p_t of every token in the backward, whatever the loss, and may weigh it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import trl
from torch import nn

from trl_dynamics.trainers.recorder import Recorder
from trl_dynamics.trainers.squeeze.loss_head import LossRequest


@dataclass(frozen=True)
class TokenForward:
    """What the loss' forward gave for one micro-batch on this process, without gradient.

    Shapes: (B, T). `logp_BT` (nats) is 0 outside completions, which `mask_BT` marks; `rejected_mask_BT` marks the
    completions of the rejected rows. `log_sum_sq_BT` is ln sum_v p_v^2, where it was asked for. `num_pairs` is P,
    `num_accumulated` the number of micro-batches of this process that make up the optimiser step, `model_inputs` what
    the policy was called with, besides labels and switches, to run these rows once more.
    """

    logp_BT: torch.Tensor
    mask_BT: torch.Tensor
    log_sum_sq_BT: torch.Tensor | None
    num_pairs: int
    num_accumulated: int = 1
    model_inputs: dict = field(default_factory=dict)

    @property
    def rejected_mask_BT(self) -> torch.Tensor:
        return rejected_only(self.mask_BT)


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has no more than that."""
    return torch.float32 if device.type == "mps" else torch.float64


def rejected_only(mask_BT: torch.Tensor) -> torch.Tensor:
    """`mask_BT` without its first half of rows, the chosen answers."""
    return torch.cat([torch.zeros_like(mask_BT[: len(mask_BT) // 2]), mask_BT[len(mask_BT) // 2 :]])


class TokenWeigher(Protocol):
    """Something that weighs the gradient of single tokens in the backward."""

    observes_tokens: bool

    def weights(self, gradient_BT: torch.Tensor, forward: TokenForward) -> torch.Tensor:
        """(B, T) weights, 1 for untouched, called once per micro-batch in the backward: no collectives in here.

        `gradient_BT` (B, T) float32 is d loss / d ln p_t, where loss is what `compute_loss` returned for this
        micro-batch on this process: factors that come later (gradient accumulation, loss scaling) are divided out,
        and averaging over processes is not in it. In DPO it is -beta (1 - a) / P for chosen tokens and the opposite
        for rejected ones, a = sigma(beta margin).
        """


class LossRecorder(Recorder):
    """A [`Recorder`] that also adds a request to the fused call."""

    def __init__(self, model: nn.Module, request: LossRequest | None):
        super().__init__(model)
        self.request = request

    def __call__(self, *args, **kwargs):
        if self.request is not None and kwargs.get("fused_lm_head"):
            kwargs["loss_request"] = self.request
        return super().__call__(*args, **kwargs)


@contextlib.contextmanager
def recorded_reference(trainer: trl.DPOTrainer) -> Iterator[list[torch.Tensor]]:
    """Collects the `log_probs` of the forwards of the module that gives the reference; the reference's is the last.

    That module is the trainer's `ref_model` or, where an adapter is trained, the policy itself with its adapter off,
    which the policy's own forward may run through as well.
    """
    found: list[torch.Tensor] = []

    def keep(module, args, output):
        if getattr(output, "log_probs", None) is not None:
            found.append(output.log_probs)

    hook = (trainer.model if trainer.ref_model is None else trainer.ref_model).register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def watch_gradient(
    loss: torch.Tensor,
    log_probs: torch.Tensor,
    forward: TokenForward,
    weighers: Sequence[TokenWeigher],
    measure: Callable[[torch.Tensor, torch.Tensor | None, TokenForward], None] | None,
) -> None:
    """In the backward, weigh the gradient that `loss` has with respect to `log_probs`, and measure it.

    Without `weighers` the gradient is left bitwise alone. `log_probs` may have more columns in front than T.

    Args:
        measure: Called with the unweighted gradient (B, T) in the unit of [`TokenWeigher.weights`], the product of all
            weights (B, T) or None, and `forward`.
    """
    scale: list[torch.Tensor] = []
    num_tokens = forward.mask_BT.shape[1]

    def hook(gradient: torch.Tensor) -> torch.Tensor | None:
        gradient_BT = gradient[:, -num_tokens:].float() / scale[-1].float()
        weight_BT = None
        for weigher in weighers:
            left_BT = gradient_BT if weight_BT is None else gradient_BT * weight_BT
            own_BT = weigher.weights(left_BT, forward).float()
            weight_BT = own_BT if weight_BT is None else weight_BT * own_BT
        if measure is not None:
            measure(gradient_BT, weight_BT, forward)
        if weight_BT is None:
            return None
        weighted = gradient.clone()
        weighted[:, -num_tokens:] *= weight_BT.to(gradient.dtype)
        return weighted

    # The loss' own gradient is the factor that accumulation and loss scaling put in front of it; it comes first.
    loss.register_hook(lambda gradient: scale.append(gradient.detach()))
    log_probs.register_hook(hook)
