"""Findings about what recorded influence can explain: whether the first order holds, and whether it holds for long.

How far an explanation reaches says nothing against the training, and is information; steps that are not finite do.
"""

import numpy as np
import pandas as pd

from trl_dynamics.findings.effects import MIN_PROBES
from trl_dynamics.findings.finding import ALERT, INFO, WARNING, Finding
from trl_dynamics.findings.rules import Rule, Run, rule
from trl_dynamics.influence.summary import ALL, InfluenceSummary
from trl_dynamics.statistics import STABLE

# Relative error of the first order: from here a tenth, or a quarter, of the squared changes is not explained.
LARGE_ERROR, SEVERE_ERROR = 0.3, 0.5
# A step is judged where rounding alone would make less than this.
MAX_ROUNDING = 0.1
# Share of the stretches between neighbouring recorded steps whose ranking surely changed.
MIN_UNSTABLE = 0.25


def judged_steps(influence: InfluenceSummary) -> pd.DataFrame:
    """The rows of [`InfluenceSummary`]`.errors` over all answers whose change is well above rounding."""
    errors = influence.errors
    if errors.empty:
        return errors
    return errors[(errors["response_type"] == ALL) & (errors["rounding"] < MAX_ROUNDING) & errors["error"].notna()]


def calm_text(influence: InfluenceSummary) -> str:
    """What it means that no rule fired: which of them could judge anything."""
    judged = {
        "steps are small enough for their first order": len(judged_steps(influence)) > 0,
        "rankings hold": len(influence.stretches) > 0,
    }
    known = [text for text, is_judged in judged.items() if is_judged and influence.num_probes >= MIN_PROBES]
    if not known:
        return f"fewer than {MIN_PROBES} probes, or nothing above rounding: nothing could be judged"
    return f"{' and '.join(known)}, as far as can be told"


@rule(step_not_finite=(ALERT, WARNING))
def step_not_finite(influence: InfluenceSummary, run: Run) -> Finding | None:
    """What a step was predicted or measured to do is NaN or infinite."""
    lost = influence.not_finite
    if lost.empty:
        return None
    first, most = lost.index[0], lost.max()
    # A prediction may overflow by itself; where the model gives NaN to answers, the run is lost.
    diverged = influence.means["logp"].isna().any()
    return Finding(
        "step_not_finite",
        ALERT if diverged else WARNING,
        "steps have changes that are not finite",
        f"In {len(lost)} of {len(influence.steps)} recorded steps, first at step {first}, the predicted or the "
        f"measured change of up to {most} of the probes' answers is NaN or infinite: the run diverged, or its "
        "gradients are not finite. No other finding and no chart counts these changes.",
        {"steps_not_finite": float(len(lost)), "steps_recorded": float(len(influence.steps))}
        | {"first_step": float(first), "most_answers": float(most)},
        "A change of an answer is NaN or infinite at a recorded step: what is predicted of an update, or what is "
        "measured of the step itself. Alert where the log-probabilities of a type are not finite either.",
        f"Look at loss and grad_norm up to step {first}. Go on from a checkpoint before it with a smaller learning "
        "rate, with max_grad_norm set, or with bf16 instead of fp16; where the first step is affected, look for NaN "
        "in the weights that were loaded, and for examples without any label.",
    )


@rule(step_too_large=INFO)
def step_too_large(influence: InfluenceSummary, run: Run) -> Finding | None:
    """What single steps did is far from what their gradients predict."""
    judged = judged_steps(influence)
    if judged.empty or influence.num_probes < MIN_PROBES:
        return None
    missed = float(np.linalg.norm(judged["error"] * judged["moved"]) / np.linalg.norm(judged["moved"]))
    large = judged[judged["error"] >= LARGE_ERROR]
    if missed < LARGE_ERROR:
        return None
    severe, worst = missed >= SEVERE_ERROR, judged.loc[judged["error"].idxmax()]
    first, last = (f"{step:.0f}" for step in (large["step"].min(), large["step"].max()))
    where = f"between steps {first} and {last}" if first != last else f"at step {first}"
    meaning = (
        "There the force map and the token strips do not explain what happened"
        if severe
        else "There only the large cells of the force map can be relied on, the small ones may have the wrong sign"
    )
    left_out = influence.errors["step"].nunique() - len(judged)
    further = f"{left_out} further step{'s' * (left_out > 1)}"
    unjudged = f" {further} moved the answers too little to be told from rounding." if left_out else ""
    return Finding(
        "step_too_large",
        INFO,
        "training steps are too large for their first-order explanation",
        f"What the gradient predicts for the probes' answers misses {missed:.0%} of what the recorded steps did. In "
        f"{len(large)} of {len(judged)} of them, {where}, it misses {LARGE_ERROR:.0%} or more, the most at step "
        f"{worst['step']:.0f}: {worst['error']:.0%}. {meaning}.{unjudged} This says nothing against the training.",
        {
            "error": missed,
            "median_error": float(judged["error"].median()),
            "worst_error": float(worst["error"]),
            "worst_step": float(worst["step"]),
            "steps_judged": float(len(judged)),
            "steps_above": float(len(large)),
            "steps_lost_in_rounding": float(left_out),
        },
        f"‖predicted − true‖ / ‖true‖ over all observed answers of all recorded steps, in nats per token, is at least "
        f"{LARGE_ERROR}. Steps count where rounding alone would make less than "
        f"{MAX_ROUNDING}; at least {MIN_PROBES} probes.",
        "At these steps trust measured changes and learning paths before what is predicted. To see what drives "
        "them, take the stretch again from a checkpoint at a tenth of the learning rate (or with warmup_steps, where "
        "it is the start): directions stay, the error shrinks with the step. `trl-dynamics akg --order 2` adds the "
        "next term for single steps.",
    )


@rule(kernel_unstable=INFO)
def kernel_unstable(influence: InfluenceSummary, run: Run) -> Finding | None:
    """Which answer moves which is ranked anew between two recorded steps."""
    stretches = influence.stretches
    if stretches.empty or influence.num_probes < MIN_PROBES:
        return None
    changed = stretches[stretches["high"] < STABLE]
    share = len(changed) / len(stretches)
    if share < MIN_UNSTABLE:
        return None
    worst = stretches.loc[stretches["value"].idxmin()]
    where = f"{changed['before'].iloc[0]:.0f} and {changed['after'].iloc[-1]:.0f}"
    gap = float((stretches["after"] - stretches["before"]).median())
    return Finding(
        "kernel_unstable",
        INFO,
        "influence is ranked anew between recorded steps: an explanation holds only near its own step",
        f"Fixed updates were predicted at every recorded step, and their {influence.num_pairs} influences on observed "
        f"answers ranked. In {len(changed)} of {len(stretches)} stretches between neighbouring steps, all of them "
        f"between steps {where}, the two rankings agree by clearly less than {STABLE} (Spearman; median "
        f"{stretches['value'].median():.2f}, lowest {worst['value']:.2f} [{worst['low']:.2f}, {worst['high']:.2f}] "
        f"from step {worst['before']:.0f} to {worst['after']:.0f}). A force map explains the steps around its own, "
        "not the run.",
        {
            "share_unstable": share,
            "stretches": float(len(stretches)),
            "median_spearman": float(stretches["value"].median()),
            "lowest_spearman": float(worst["value"]),
            "pairs": float(influence.num_pairs),
            "steps_between_records": gap,
        },
        f"Spearman's correlation over pairs of a fixed update and an observed answer, between neighbouring recorded "
        f"steps: in at least {MIN_UNSTABLE:.0%} of the stretches the upper end of its 95 % bootstrap interval over "
        f"probes is below {STABLE}. At least {MIN_PROBES} probes. What is "
        "ranked is influence as a whole, with the optimiser's scaling, not the kernel alone.",
        f"Record more often (a smaller akg_every; now {gap:.0f} steps lie between) and compare neighbouring steps "
        "only. If the ranking still changes, features themselves are being learnt: explain each phase of the run by "
        "itself.",
    )


RULES: dict[str, Rule] = {
    "step_not_finite": step_not_finite,
    "step_too_large": step_too_large,
    "kernel_unstable": kernel_unstable,
}
