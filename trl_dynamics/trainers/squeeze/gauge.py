"""How risky the negative gradients of a DPO run are: the squeezing-risk gauge on the training batches themselves.

    B = 2P rows: P chosen answers, then the P rejected ones   T tokens   K quantities

The factors of the squeezing effect (arXiv 2407.10490, section 3.3): a negative gradient squeezes when it is strong
(energy) and falls on what is improbable already (residual near its most, low probability: a valley).
"""

import math
from collections.abc import Callable

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_dynamics.compat import log_metric
from trl_dynamics.trainers.squeeze.recording import TokenForward, widest_float

# What is made of each ratio of sums, in the order of the rows of `risk_sums`.
QUANTITIES: dict[str, Callable[[float], float]] = {
    "chosen/energy": float,
    "rejected/energy": float,
    "chosen/residual_norm": math.sqrt,
    "rejected/residual_norm": math.sqrt,
    "rejected/geometric_prob": math.exp,
    "rejected/valley_share": float,
    "rejected/kept": float,
}


def risk_sums(
    gradient_BT: torch.Tensor, weight_BT: torch.Tensor | None, forward: TokenForward, valley_prob: float
) -> torch.Tensor:
    """(K, 2) sums and counts whose ratios are the gauge's quantities; sums of several batches add up.

    With g_t = d loss / d ln p_t of the micro-batch's mean loss over P pairs, n the completion tokens of an answer:

    - energy, per answer: P sum_t |g_t| / n, in 1 / nat; mean over answers. In DPO beta (1 - a), a = sigma(beta m),
      the same on both sides; other losses may differ by side and token. Before any weight.
    - residual norm ||G||, G_t = p - e_y: root of the mean over tokens of 1 - 2 p(y) + sum_v p(v)^2, between 0 and
      sqrt(2), computed as (1 - p(y))^2 + sum_{v != y} p(v)^2.
    - geometric probability of the rejected answers: exp of the mean over tokens of ln p(y-).
    - valley share: the share of rejected tokens with p(y-) < `valley_prob`.
    - kept: sum |w g| / sum |g| over rejected tokens, the share of the negative gradient that weights left.

    Shapes: gradient, weight (B, T), the latter None for no weights.
    """
    wide = widest_float(gradient_BT.device)
    mask_2PT = forward.mask_BT.view(2, forward.num_pairs, -1)
    # Of a pair's own loss, whatever number of pairs the micro-batch averages over.
    size_2PT = forward.num_pairs * (gradient_BT.to(wide).abs() * forward.mask_BT).view_as(mask_2PT)
    num_tokens_2P = mask_2PT.sum(dim=-1)
    energy_2P = size_2PT.sum(dim=-1) / num_tokens_2P.clamp(min=1)
    logp_2PT = forward.logp_BT.to(wide).view_as(mask_2PT)
    prob_2PT = logp_2PT.exp()
    others_2PT = (forward.log_sum_sq_BT.to(wide).exp().view_as(mask_2PT) - prob_2PT.square()).clamp(min=0)
    residual_2PT = ((1 - prob_2PT).square() + others_2PT) * mask_2PT
    num_answers_2, num_tokens_2 = (num_tokens_2P > 0).sum(dim=-1), num_tokens_2P.sum(dim=-1)
    valley_PT = (prob_2PT[1] < valley_prob) & mask_2PT[1]
    kept_PT = torch.zeros_like(size_2PT[1])
    if weight_BT is not None:
        kept_PT = size_2PT[1] * weight_BT.to(wide).abs().view_as(mask_2PT)[1]
    sums = [*energy_2P.sum(dim=-1), *residual_2PT.sum(dim=(-2, -1)), logp_2PT[1].sum(), valley_PT.sum(), kept_PT.sum()]
    weighed = size_2PT[1].sum() if weight_BT is not None else torch.zeros_like(kept_PT.sum())
    counts = [*num_answers_2, *num_tokens_2, num_tokens_2[1], num_tokens_2[1], weighed]
    return torch.stack([torch.stack([value.to(wide) for value in column]) for column in (sums, counts)], dim=-1)


def risk_metrics(sums_K2: torch.Tensor) -> dict[str, float]:
    """The gauge's quantities from [`risk_sums`], as `squeeze_risk/...`; what nothing was counted for is left out."""
    pairs = zip(QUANTITIES.items(), sums_K2.tolist(), strict=True)
    return {f"squeeze_risk/{name}": of(total / count) for (name, of), (total, count) in pairs if count}


class Gauge(TrainerCallback):
    """Measures in the backward, reduces over micro-batches and processes at the end of the step, and logs with TRL's.

    One small all-reduce per measured optimiser step; token-weighted, so that the values do not depend on how a batch
    is split over micro-batches and processes.

    Args:
        trainer ([`~trl.DPOTrainer`]): Its `accelerator` and `_metrics` are used.
        every (`int`): Optimiser steps between measurements; the first step is always measured.
        valley_prob (`float`): See [`risk_sums`].
    """

    def __init__(self, trainer, every: int, valley_prob: float):
        self.trainer, self.every, self.valley_prob = trainer, every, valley_prob
        self._sums_K2: torch.Tensor | None = None

    def is_due(self, step: int) -> bool:
        """Whether the optimiser step that makes `global_step` equal `step` is measured."""
        return step == 1 or step % self.every == 0

    def measure(self, gradient_BT: torch.Tensor, weight_BT: torch.Tensor | None, forward: TokenForward) -> None:
        """Add one micro-batch; runs in the backward, so without collectives."""
        with torch.no_grad():
            sums_K2 = risk_sums(gradient_BT, weight_BT, forward, self.valley_prob)
            self._sums_K2 = sums_K2 if self._sums_K2 is None else self._sums_K2 + sums_K2

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Forget the micro-batches of a step that an exception ended, such as one out of memory."""
        self._sums_K2 = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Every process comes here at the same steps, and before the step's line is logged."""
        if not self.is_due(state.global_step) or self._sums_K2 is None:
            return
        sums_K2, self._sums_K2 = self.trainer.accelerator.reduce(self._sums_K2, "sum"), None
        for name, value in risk_metrics(sums_K2).items():
            log_metric(self.trainer, "train", name, value)
