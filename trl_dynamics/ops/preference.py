"""Losses of preference pairs that stand in for DPO's own, one short function per paper, and Gate-DPO's gate.

    P pairs   B rows   T tokens

`chosen_P` and `rejected_P` are log-ratios, ln pi(y) - ln pi_ref(y), summed over an answer's tokens, in nats. DPO's
loss is -ln sigma(beta m) with the margin m = chosen - rejected. DPOP and DPO-Shift add a term to the margin, and can
be combined; Cal-DPO is a loss of its own.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def dpo(
    chosen_P: torch.Tensor, rejected_P: torch.Tensor, beta: float, term_P: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """-ln sigma(beta (chosen - rejected + term)): (P,) losses in nats (arXiv 2305.18290, equation 7; term 0)."""
    return -F.logsigmoid(beta * (chosen_P - rejected_P + term_P))


def dpop_term(chosen_P: torch.Tensor, rejected_P: torch.Tensor, strength: float) -> torch.Tensor:
    """-lambda max(0, -chosen): (P,) nats; the margin shrinks once the chosen answer is below the reference.

    DPO-Positive (Smaug, arXiv 2402.13228, equation 3), whose penalty stands inside the sigmoid and is scaled by beta.
    """
    return -strength * (-chosen_P).clamp(min=0)


def dpo_shift_term(chosen_P: torch.Tensor, rejected_P: torch.Tensor, strength: float) -> torch.Tensor:
    """(1 - f) rejected: (P,) nats; the margin becomes chosen - f rejected, so f < 1 weakens the negative gradient.

    DPO-Shift (arXiv 2502.07599), whose f is a constant or moves linearly over the run; see [`linear`].
    """
    return (1 - strength) * rejected_P


def cal_dpo(chosen_P: torch.Tensor, rejected_P: torch.Tensor, beta: float, weight: float = 1.0) -> torch.Tensor:
    """-ln sigma(chosen - rejected) + weight [(chosen - 1/(2 beta))^2 + (rejected + 1/(2 beta))^2]: (P,) losses.

    Cal-DPO (arXiv 2412.14516): the sigmoid has no beta, which sets the targets of the two log-ratios instead. The
    paper's weight is 1, that of its authors' code 0.5.
    """
    target = 1 / (2 * beta)
    return dpo(chosen_P, rejected_P, 1.0) + weight * ((chosen_P - target).square() + (rejected_P + target).square())


MARGIN_TERMS: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "dpop": dpop_term,
    "dpo_shift": dpo_shift_term,
}


def linear(start: float, end: float, progress: float) -> float:
    """start at progress 0, end at progress 1, a straight line between."""
    return start + (end - start) * progress


def gate(prob: torch.Tensor, alpha: float, tau: float) -> torch.Tensor:
    """Gate-DPO's weight of a rejected token's gradient: sigma(alpha (p - tau)), any shape, without gradient.

    Near 0 for what is improbable already, near 1 above tau (arXiv 2605.02626; which p: [`GATED_PROB`]).
    """
    return torch.sigmoid(alpha * (prob.detach() - tau))


def token_prob(logp_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """(B, T) each token's own probability, a finer gate than the paper's two, which weigh an answer as a whole."""
    return logp_BT.exp()


def sequence_prob(logp_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """(B, T) the geometric mean of an answer's token probabilities, at each of its tokens ("seq" in the paper)."""
    num_tokens_B = mask_BT.sum(dim=-1).clamp(min=1)
    return ((logp_BT * mask_BT).sum(dim=-1) / num_tokens_B).exp()[:, None].expand_as(logp_BT)


def low_prob(logp_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """(B, T) the 10 % quantile of an answer's token probabilities, at each of its tokens ("q10" in the paper)."""
    # FSDP2 in half precision rounds what the loss' forward returns, and quantiles of halves there are none.
    prob_BT = logp_BT.to(torch.promote_types(logp_BT.dtype, torch.float32)).exp().masked_fill(~mask_BT, torch.nan)
    return prob_BT.nanquantile(0.1, dim=-1, keepdim=True).nan_to_num().expand_as(logp_BT)


GATED_PROB: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "token": token_prob,
    "sequence": sequence_prob,
    "q10": low_prob,
}
