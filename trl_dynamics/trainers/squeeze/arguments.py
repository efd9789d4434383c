"""Options of [`DPOConfig`] about the squeezing effect."""

from dataclasses import dataclass, field


@dataclass
class SqueezeArguments:
    """A gauge of the squeezing risk, and interventions against it. All off, the loss is TRL's own."""

    gauge_every: int | None = field(
        default=None,
        metadata={
            "help": "Optimiser steps between squeezing-risk measurements on the training batches (squeeze_risk/... in "
            "the log); the loss stays the same. 0: never. None: every step where a probe set is tracked, else never."
        },
    )
    gauge_valley_prob: float = field(
        default=0.01,
        metadata={
            "help": "What counts as a valley: squeeze_risk/rejected/valley_share is the share of rejected tokens to "
            "which the policy gives less than this probability. The default is a convention, not a measured boundary."
        },
    )
    gate_dpo: str | None = field(
        default=None,
        metadata={
            "help": "Gate-DPO: weigh the gradient of rejected tokens by sigmoid(gate_alpha * (p - gate_tau)), where p "
            "is the 'token' probability, the geometric mean of the answer ('sequence') or its 10 percent quantile "
            "('q10'). Goes with every loss type. None: off.",
            "choices": ["token", "sequence", "q10"],
        },
    )
    gate_alpha: float = field(default=30.0, metadata={"help": "Steepness of the gate of `gate_dpo`, above 0."})
    gate_tau: float = field(default=0.1, metadata={"help": "Probability at which that gate is half open."})
    dpop_lambda: float | None = field(
        default=None,
        metadata={
            "help": "DPOP: lower the margin of the sigmoid loss by this times what the chosen answer lost against the "
            "reference (nats); the paper uses 50. None: off."
        },
    )
    dpo_shift: float | None = field(
        default=None,
        metadata={
            "help": "DPO-Shift: factor of the rejected answer's log-ratio in the sigmoid loss, from 0 to 1; the one "
            "at the start where `dpo_shift_end` is given. None: off."
        },
    )
    dpo_shift_end: float | None = field(
        default=None,
        metadata={"help": "DPO-Shift: the factor at the end of training, reached linearly. None: `dpo_shift` stays."},
    )
    cal_dpo: float | None = field(
        default=None,
        metadata={
            "help": "Cal-DPO in place of the sigmoid loss: weight of the terms that draw the log-ratios to plus and "
            "minus 1 / (2 beta); the paper has 1, its code 0.5. None: off."
        },
    )
    squeeze_guard: float | None = field(
        default=None,
        metadata={
            "help": "Budget of drained mass: the most probability that a step may take, at a rejected token, from all "
            "labels but it and its likeliest rival, as predicted; the token's gradient is scaled down to keep it. The "
            "loss value and chosen tokens stay. None: off."
        },
    )
    squeeze_guard_mode: str = field(
        default="guard",
        metadata={
            "help": "'guard', or a control of it: 'uniform' gives all rejected tokens of a micro-batch their mean "
            "weight, 'shuffled' deals the same weights out at random.",
            "choices": ["guard", "uniform", "shuffled"],
        },
    )
    squeeze_guard_every: int = field(
        default=8,
        metadata={
            "help": "Steps between calibrations of the guard's kappa, each one more forward of a micro-batch; the "
            "first so many steps are all calibrated."
        },
    )
