"""Exact dynamics of a softmax under one gradient step on its own logits: the squeezing effect in closed form.

    N rows   V labels

A step of `strength` s on ln p(y) moves the logits by s (e_y - p). Positive s is learning y, as SFT does; negative s is
a negative gradient, as on DPO's rejected answer. s is the learning rate times whatever else scales the logits' change:
||x||^2 in softmax regression, the token's loss weight, the kernel of the token with itself. The rival y* is the
likeliest label besides y. Source: Ren and Sutherland, arXiv 2407.10490, section 3.3 and its Lemma 1 with claims 1-5;
closed form derived here.
"""

import torch


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
