"""Gate-DPO: the gradient of rejected tokens fades where the model gives them next to no probability already."""

import torch

from trl_dynamics.ops.preference import GATED_PROB, gate
from trl_dynamics.trainers.squeeze.recording import TokenForward


class Gate:
    """Weighs the gradient of rejected tokens by sigma(alpha (p - tau)), detached (Gate-DPO, arXiv 2605.02626).

    The loss' value stays, and so does all that chosen tokens receive. p is what the policy itself gives, in the same
    forward: with `on="sequence"` the geometric mean over the answer's tokens and with `on="q10"` their 10 % quantile,
    the two estimates that the paper's authors compare; with `on="token"` each token's own probability (ours).

    The form of the gate and of the two estimates is that of the authors' published results; their alpha and tau could
    not be checked, and the defaults here (a gate of 0.05 at p = 0, 0.5 at 0.1, 0.95 at 0.2) are ours.

    Args:
        on (`str`): `"token"`, `"sequence"` or `"q10"`.
        alpha (`float`): Steepness, above 0.
        tau (`float`): Probability at which the gate is half open.
    """

    observes_tokens = False

    def __init__(self, on: str, alpha: float, tau: float):
        self.prob, self.alpha, self.tau = GATED_PROB[on], alpha, tau

    def weights(self, gradient_BT: torch.Tensor, forward: TokenForward) -> torch.Tensor:
        """(B, T): the gate on rejected tokens, 1 elsewhere."""
        weight_BT = gate(self.prob(forward.logp_BT, forward.mask_BT), self.alpha, self.tau)
        return weight_BT.where(forward.rejected_mask_BT, 1.0)
