"""The losses whose force G = dL/dz moves the observers, as functions of an update's logits.

    N labelled positions   V labels   B rows   P pairs

All take `(logits_NV, label_N, row_N, batch)`, `row_N` the row of each position, and return a scalar in nats.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], torch.Tensor]


def mean_cross_entropy(
    logits_NV: torch.Tensor, label_N: torch.Tensor, row_N: torch.Tensor, batch: Any
) -> torch.Tensor:
    """Mean of -ln pi(label) over all labelled positions: TRL's SFT loss, and a classifier's."""
    return F.cross_entropy(logits_NV, label_N)


def gradient_ascent(logits_NV: torch.Tensor, label_N: torch.Tensor, row_N: torch.Tensor, batch: Any) -> torch.Tensor:
    """Mean of +ln pi(label): every label is pushed down, as in unlearning by gradient ascent."""
    return -F.cross_entropy(logits_NV, label_N)


def sum_cross_entropy(logits_NV: torch.Tensor, label_N: torch.Tensor, row_N: torch.Tensor, batch: Any) -> torch.Tensor:
    """Sum of -ln pi(label), the thesis' own SFT force pi - e_y at every position (arXiv 2407.10490, equation 5)."""
    return F.cross_entropy(logits_NV, label_N, reduction="sum")


def dpo(beta: float = 0.1) -> Loss:
    """Mean over pairs of -ln sigma(beta m), m the log-ratio of chosen minus that of rejected (arXiv 2305.18290).

    The rows of a batch are all chosen answers, then the rejected ones in the same order. `batch["ref_logps"]`, (B,)
    nats, has the reference model's ln pi_ref of each row's labels.

    Raises:
        ValueError: When it is called with an odd number of rows.
    """

    def loss(logits_NV: torch.Tensor, label_N: torch.Tensor, row_N: torch.Tensor, batch: Any) -> torch.Tensor:
        logp_N = -F.cross_entropy(logits_NV, label_N, reduction="none")
        ref_B = batch["ref_logps"].to(logp_N)
        if len(ref_B) % 2:
            raise ValueError(f"DPO's batch has {len(ref_B)} rows; expected the chosen ones, then as many rejected")
        ratio_B = -ref_B.index_add(0, row_N, -logp_N)
        chosen_P, rejected_P = ratio_B.chunk(2)
        return -F.logsigmoid(beta * (chosen_P - rejected_P)).mean()

    return loss


def policy_gradient(normalizer: str = "dapo", max_length: int | None = None) -> Loss:
    """GRPO's loss at ratio 1, where clipping does nothing: -A_i per token of answer i, normalised as by TRL.

    `batch["advantages"]`, (B,) is A_i.

    Args:
        normalizer (`str`): TRL's `loss_type`. `"dapo"` and `"bnpo"`: the sum over all tokens of the batch by their
            number; `"grpo"`: the mean over answers of their means; `"dr_grpo"`: the sum by rows times `max_length`.
        max_length (`int`, *optional*): Of `"dr_grpo"`: the longest answer that may be drawn.

    Raises:
        ValueError: If the normaliser is unknown, or `"dr_grpo"` comes without `max_length`.
    """
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer is {normalizer!r}, expected one of {sorted(NORMALIZERS)}")
    if normalizer == "dr_grpo" and not max_length:
        raise ValueError("dr_grpo divides by the longest answer that may be drawn: give max_length")

    def loss(logits_NV: torch.Tensor, label_N: torch.Tensor, row_N: torch.Tensor, batch: Any) -> torch.Tensor:
        logp_N = -F.cross_entropy(logits_NV, label_N, reduction="none")
        advantage_B = batch["advantages"].to(logp_N)
        weight_N = NORMALIZERS[normalizer](logp_N, row_N, len(advantage_B), max_length)
        return -(weight_N * advantage_B[row_N] * logp_N).sum()

    return loss


def _by_tokens(logp_N: torch.Tensor, row_N: torch.Tensor, num_rows: int, max_length: int | None) -> torch.Tensor:
    return logp_N.new_full(row_N.shape, 1 / max(1, len(row_N)))


def _by_answers(logp_N: torch.Tensor, row_N: torch.Tensor, num_rows: int, max_length: int | None) -> torch.Tensor:
    return 1 / (num_rows * torch.bincount(row_N, minlength=num_rows)[row_N].to(logp_N.dtype))


def _by_longest(logp_N: torch.Tensor, row_N: torch.Tensor, num_rows: int, max_length: int | None) -> torch.Tensor:
    return logp_N.new_full(row_N.shape, 1 / (num_rows * max_length))


NORMALIZERS = {"dapo": _by_tokens, "bnpo": _by_tokens, "grpo": _by_answers, "dr_grpo": _by_longest}
