"""Exact dynamics of a softmax under one gradient step on its own logits: the squeezing effect in closed form.

    N rows   V labels

A step of `strength` s on ln p(y) moves the logits by s (e_y - p). Positive s is learning y, as SFT does; negative s is
a negative gradient, as on DPO's rejected answer. s is the learning rate times whatever else scales the logits' change:
||x||^2 in softmax regression, the token's loss weight, the kernel of the token with itself. The rival y* is the
likeliest label besides y. Source: Ren and Sutherland, arXiv 2407.10490, section 3.3 and its Lemma 1 with claims 1-5;
closed form derived here.
"""

import math
from dataclasses import dataclass, fields

import torch

# A logit moved further than this in one step is no small step by any measure, and float32's exp still holds.
LARGEST_PUSH = 50.0


def step(logits_NV: torch.Tensor, label_N: torch.Tensor, strength_N: torch.Tensor | float) -> torch.Tensor:
    """Logits after one step on ln p(label): z' = z + s (e_y - p).

    Shapes: logits (N, V) -> (N, V), label (N,) int64, strength (N,) or one number, above 0 to learn the label and
    below 0 to unlearn it. Steps on several labels of the same row add up: `step(z, a, s) + step(z, b, r) - z`.
    """
    strength_N = torch.as_tensor(strength_N, dtype=logits_NV.dtype, device=logits_NV.device).expand(len(label_N))
    moved_NV = logits_NV - strength_N[:, None] * logits_NV.softmax(dim=-1)
    return moved_NV.scatter_add(1, label_N[:, None], strength_N[:, None])


def rival(logits_NV: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
    """y*: (N,) ids of the likeliest label besides `label`."""
    return logits_NV.scatter(1, label_N[:, None], -torch.inf).argmax(dim=-1)


def growth(logits_NV: torch.Tensor, label_N: torch.Tensor, strength_N: torch.Tensor | float) -> torch.Tensor:
    """(N, V) factors alpha_v = p'(v) / p(v) by which [`step`] multiplies the probabilities.

    alpha_v = sum_j exp(z_j) / sum_j exp(z_j + d_j - d_v) with d = z' - z. Under a negative step it grows with p(v) for
    all v but the label itself (claim 3: the rich get richer).
    """
    change_NV = step(logits_NV, label_N, strength_N) - logits_NV
    total_N = (logits_NV.log_softmax(dim=-1) + change_NV).logsumexp(dim=-1)
    return (change_NV - total_N[:, None]).exp()


def drained_mass(logits_NV: torch.Tensor, label_N: torch.Tensor, strength_N: torch.Tensor | float) -> torch.Tensor:
    """(N,) probability that [`step`] takes from all labels but the one stepped on and its rival.

    [1 - p(y) - p(y*)] before minus the same after, y* as of before. Positive: third parties pay. For a negative step
    and fixed logits of all others it grows as p(y) falls below the runner-up (claim 4); it need not be monotone in the
    strength, unlike p(y) and p(y*) (claim 5).
    """
    prob_NV, rival_N = logits_NV.softmax(dim=-1), rival(logits_NV, label_N)
    lost_NV = prob_NV * (1 - growth(logits_NV, label_N, strength_N))
    named_N2 = torch.stack([label_N, rival_N], dim=-1)
    return lost_NV.scatter(1, named_N2, 0.0).sum(dim=-1)


@dataclass(frozen=True)
class Rows:
    """What is kept of each row to know the drained mass of any push on its label, not the V probabilities.

        K likeliest other labels   P power sums

    Shapes: `label_logp`, `rival_logp` (N,) in nats, `rival_id` (N,) int64, `top` (N, K) probabilities of the
    likeliest labels besides the label and its rival, `power` (N, P): S_n = sum of p_v^n over all labels left.
    """

    label_logp_N: torch.Tensor
    rival_logp_N: torch.Tensor
    rival_id_N: torch.Tensor
    top_NK: torch.Tensor
    power_NP: torch.Tensor

    def __getitem__(self, chosen) -> "Rows":
        """The rows that an index or a mask chooses."""
        return Rows(*(getattr(self, column.name)[chosen] for column in fields(self)))


def join(parts: list[Rows]) -> Rows:
    """One [`Rows`] of several, in order."""
    return Rows(*(torch.cat([getattr(part, column.name) for part in parts]) for column in fields(Rows)))


def keep_rows(logits_NV: torch.Tensor, label_N: torch.Tensor, num_top: int = 15, num_powers: int = 5) -> Rows:
    """The [`Rows`] of these logits (N, V) and labels (N,); overwrites the logits."""
    label_N1 = label_N[:, None]
    total_N = logits_NV.logsumexp(dim=-1)
    label_logp_N = logits_NV.gather(1, label_N1)[:, 0] - total_N
    # In place: the tile of logits is the largest tensor of a forward, and nothing else reads it.
    prob_NV = logits_NV.sub_(total_N[:, None]).scatter_(1, label_N1, -torch.inf)
    top_logp_NK, top_id_NK = prob_NV.topk(min(num_top + 1, prob_NV.shape[-1]), dim=-1)
    prob_NV = prob_NV.exp_().scatter_(1, top_id_NK, 0.0)
    powers, power_NV = [prob_NV.sum(dim=-1)], prob_NV
    for _ in range(num_powers - 1):
        power_NV = power_NV * prob_NV
        powers.append(power_NV.sum(dim=-1))
    rest = top_logp_NK[:, 1:].exp(), torch.stack(powers, dim=-1)
    return Rows(label_logp_N, top_logp_NK[:, 0], top_id_NK[:, 0], *rest)


def drained_by_push(rows: Rows, push_N: torch.Tensor) -> torch.Tensor:
    """(N,) `drained_mass(logits, label, -push)` from the kept rows, push (N,) >= 0; never too small.

    With S the labels besides y and y*, and the push s >= 0,

        D(s) = (R(0) dZ - dR) / (1 + dZ)
        R(s) = sum_{v in S} p_v e^{s p_v},   Z(s) = R(s) + p* e^{s p*} + p_y e^{s (p_y - 1)}

    and dR, dZ their changes. R is exact for the kept labels; for all others sum p e^{s p} = sum_n s^n / n! S_{n+1},
    cut off after the kept power sums. What is cut off is positive and D falls in R, so this never falls short of the
    truth; [`push_error`] bounds the excess.
    """
    label_prob_N, rival_prob_N = rows.label_logp_N.exp(), rows.rival_logp_N.exp()
    push_N1 = push_N[:, None]
    order_P = torch.arange(1, rows.power_NP.shape[1], dtype=push_N.dtype, device=push_N.device)
    terms_NP = push_N1.pow(order_P) / torch.lgamma(order_P + 1).exp() * rows.power_NP[:, 1:]
    more_N = (rows.top_NK * torch.expm1(push_N1 * rows.top_NK)).sum(dim=-1) + terms_NP.sum(dim=-1)
    named_N = rival_prob_N * torch.expm1(push_N * rival_prob_N)
    named_N = named_N + label_prob_N * torch.expm1(push_N * (label_prob_N - 1))
    third_N = rows.top_NK.sum(dim=-1) + rows.power_NP[:, 0]
    change_N = more_N + named_N
    return (third_N * change_N - more_N) / (1 + change_N)


def push_error(rows: Rows, push_N: torch.Tensor) -> torch.Tensor:
    """(N,) bound on how much [`drained_by_push`] exceeds the drained mass.

    The terms cut off are at most S_P q s^P / P! e^{s q}, q the least of the kept probabilities, and dD/dR is
    -(Z - R) / Z^2, at most 1 / Z in size.
    """
    least_N = rows.top_NK[:, -1] if rows.top_NK.shape[1] else rows.rival_logp_N.exp()
    order = rows.power_NP.shape[1]
    cut_N = rows.power_NP[:, -1] * least_N * push_N.pow(order) / math.factorial(order) * (push_N * least_N).exp()
    label_prob_N, rival_prob_N = rows.label_logp_N.exp(), rows.rival_logp_N.exp()
    # Z >= sum of the named labels' weights and of what the others had before.
    others_N = rows.top_NK.sum(dim=-1) + rows.power_NP[:, 0]
    named_N = rival_prob_N * (push_N * rival_prob_N).exp() + label_prob_N * (push_N * (label_prob_N - 1)).exp()
    return cut_N / (others_N + named_N)


def largest_share(rows: Rows, push_N: torch.Tensor, budget: float) -> torch.Tensor:
    """(N,) largest w in [0, 1] with a drained mass D(w push) of at most `budget`, by bisection.

    D may fall before it rises, but never rises and falls again, so that {s: D(s) <= budget} is an interval that begins
    at 0 for any budget >= 0. Proof: D' has the sign of E (p* - r) - Y (1 - p_y + r) with E = p* e^{s p*},
    Y = p_y e^{s (p_y - 1)} and r the mean of p_v under weights p_v e^{s p_v} over S. ln(E / Y) grows at the rate
    1 - p_y + p*. ln[(1 - p_y + r) / (p* - r)] grows at r' (1 / (1 - p_y + r) + 1 / (p* - r)), and r', the variance of
    those p_v in [0, p*], is at most r (p* - r); so at most at r / (1 - p_y + r) times that rate, which is less. Hence
    D' changes sign once at most, from - to +.

    Shapes: push (N,) >= 0, the budget a probability >= 0. Errors: the bisection ends 2^-24 below; where
    [`push_error`] matters the share is smaller than it might be, and the budget is kept all the same.
    """
    push_N = push_N.to(rows.label_logp_N.dtype)
    high_N = push_N.clamp(max=LARGEST_PUSH)
    fits_mask_N = (drained_by_push(rows, high_N) <= budget) & (push_N <= LARGEST_PUSH)
    share_N = torch.ones_like(push_N)
    over_N = (~fits_mask_N).nonzero()[:, 0]
    rows, high_N, low_N = rows[over_N], high_N[over_N], torch.zeros_like(high_N[over_N])
    for _ in range(24):
        middle_N = (low_N + high_N) / 2
        fits_N = drained_by_push(rows, middle_N) <= budget
        low_N, high_N = torch.where(fits_N, middle_N, low_N), torch.where(fits_N, high_N, middle_N)
    return share_N.index_copy(0, over_N, low_N / push_N[over_N])


def response_sums(
    rows: Rows, label_logp_N: torch.Tensor, rival_logp_N: torch.Tensor, push_N: torch.Tensor
) -> torch.Tensor:
    """(3,) sums of a least-squares fit of kappa in o' - o = -kappa x over rows; those of several batches add up.

    o is the log-odds ln p(y) - ln p(y*) (nats) of `rows`, o' that after the step with y* as of before, which
    `label_logp_N` and `rival_logp_N` give, and x = push (1 - p_y + p*) what a push by that much takes from it: exactly
    so for any strength, as [`step`] moves logits, not to first order. Returned on the CPU in float64: sum x (o - o'),
    sum x^2, sum (o - o')^2. kappa = [0] / [1], and [0] / sqrt([1] [2]) is the cosine of what is fitted and the fit.
    """
    label_prob_N, rival_prob_N = rows.label_logp_N.exp(), rows.rival_logp_N.exp()
    fall_N = (rows.label_logp_N - rows.rival_logp_N - label_logp_N + rival_logp_N).cpu().double()
    taken_N = (push_N * (1 - label_prob_N + rival_prob_N)).cpu().double()
    return torch.stack([taken_N @ fall_N, taken_N @ taken_N, fall_N @ fall_N])
