"""Findings: failure signatures (and successes) in the records of a run, in words, with numbers, rule and remedy.

A finding says only what the records support; what counts as a change is defined in [`paths.changes`].
"""

import pandas as pd

from trl_dynamics.findings.effects import COUNTS, MIN_EFFECT, MIN_PROBES
from trl_dynamics.findings.finding import ALERT, INFO, WARNING, Finding
from trl_dynamics.findings.rules import Rule, Run, found_by, rule
from trl_dynamics.paths.changes import ALERT_GAP, ENTROPY_COLLAPSE, FLUENT, MIN_ARGMAX_RISE, bystander_types
from trl_dynamics.paths.rules.degeneration import degeneration, got_worse
from trl_dynamics.paths.rules.displacement import (
    bystander_loss,
    displacement,
    fall_from_peak,
    margin_by_rejection,
    settled,
    settled_unbroken,
)
from trl_dynamics.paths.rules.finiteness import not_finite, over_finite_probes
from trl_dynamics.paths.rules.objective import accuracy_below_half, loss_above_reference
from trl_dynamics.paths.rules.remedies import remedy_of
from trl_dynamics.paths.summary import Summary, summarise

# End-of-turn log-probability, nats.
MIN_EOS_FALL = 0.5
CALM = "what moved is too little to count, or is as it should be"
OBJECTIVE = ("loss_above_reference", "accuracy_below_half")


def find(records: pd.DataFrame | Summary, meta: dict) -> list[Finding]:
    """Findings of one run and one model, the most severe first; empty when the records support none.

    With a single step there is no change, and only levels are judged: what is not finite, and answers that are loops.

    Args:
        records (`pandas.DataFrame` or [`Summary`]): Records of one run and one model, any order, or what
            [`summarise_store`] made of a store, with its greedy answers and its trainer's log.
        meta (`dict`): The run's meta.json; `method` decides which rules apply.
    """
    return found_by(RULES.values(), summarise(records), Run(meta.get("method", "track"), meta))


def calm_text(summary: Summary) -> str:
    """What it means that no rule fired: what could be judged at all."""
    if len(summary.steps) < 2:
        return "one step was scored, so there is no change to judge"
    number = summary.changes().chosen.num_probes
    if number >= MIN_PROBES:
        blind = "; the probe set has no other fluent answers, so nothing was judged that they alone can show"
        return CALM if bystander_types(summary.types) else CALM + blind
    scored = f"{number} of the {MIN_PROBES} probes with chosen answers that most rules need" if number else "no chosen"
    return f"hardly any rule could judge, since {scored} {'were' if number else 'answer was'} scored at both ends"


@rule(squeezing=(ALERT, WARNING))
@over_finite_probes
def squeezing(summary: Summary, run: Run) -> Finding | None:
    """Mass moves to tokens that are likely already, and not to the answers that were preferred."""
    changes, method = summary.changes(), run.method
    others, since = changes.bystanders, summary.squeezed_since()
    if since is None or method == "sft":
        return None
    severe = changes.chosen.down() or changes.gap.mean >= ALERT_GAP
    # Likely tokens gain as well where the model settles on few answers, which may be good ones.
    severe = severe and not settled_unbroken(summary, changes, got_worse(summary, method))
    drained = summary.metric("drained_mass")
    if severe or degeneration(summary, run):
        outlook = "Expect broken or repetitive samples."
    else:
        outlook = "Answers may be fine all the same: check with `trl-dynamics judge`, or read them (probe_samples)."
    fluent = f"; other fluent answers, which nothing pushes down by name, moved {others}" if others.known else ""
    cause = "Off-policy rejected answers, which the model finds unlikely, are the usual cause. "
    return Finding(
        "squeezing",
        ALERT if severe else WARNING,
        "squeezing: probability moves to tokens that were likely already",
        f"By step {changes.end} the likeliest token along the chosen responses moved {changes.argmax} nats per token, "
        f"chosen itself {changes.chosen}, the gap between them {changes.gap}{fluent}. All of it holds from step "
        f"{since} on. {outlook}",
        {
            "argmax_change": changes.argmax.mean,
            "chosen_change": changes.chosen.mean,
            "gap_change": changes.gap.mean,
            **({"other_fluent_answers_change": others.mean} if others.known else {}),
            "since_step": float(since),
            **({"drained_mass": float(drained.iloc[-1])} if len(drained) else {}),
        },
        f"argmax along chosen rises by at least {MIN_ARGMAX_RISE} nats per token while chosen does not rise by "
        f"{MIN_EFFECT}, the gap argmax minus chosen widens by at least {MIN_EFFECT}, and chosen or {FLUENT} fall by "
        f"at least {MIN_EFFECT}, start to end; not for SFT, which pushes nothing down; {COUNTS}. Alert if chosen "
        f"falls by {MIN_EFFECT} or the gap widens by {ALERT_GAP}, unless there is entropy_collapse without "
        "degeneration in a run with probe_samples.",
        f"Use the checkpoint before step {since}. {cause if method == 'dpo' else ''}{remedy_of(method)}",
    )


@rule(unrelated_pull_up=(WARNING, INFO))
@over_finite_probes
def unrelated_pull_up(summary: Summary, run: Run) -> Finding | None:
    """SFT also raises answers to other training prompts: the model may answer one question with another's facts."""
    changes, method = summary.changes(), run.method
    other = changes.of_types(["other_train"])
    if method != "sft" or not (changes.chosen.up() and other.up()):
        return None
    excess = changes.difference("other_train", "other_test")
    late = summary.changes(start=summary.steps[len(summary.steps) // 2]).of_types(["other_train"])
    specific, control = excess.up(), ""
    if excess.known:
        meaning = "more than style: facts of other questions are pulled up" if specific else "what style can explain"
        control = f" That is {excess} against held-out answers given the same prompts: {meaning}."
    going = f" In the second half of the run it moved {late}" + (": it keeps rising." if late.up() else ".")
    return Finding(
        "unrelated_pull_up",
        WARNING if specific else INFO,
        "answers to other training prompts rise too" + (" (hallucination signature)" if specific else ""),
        f"While chosen moved {changes.chosen} nats per token, the answers of other training prompts, put under the "
        f"wrong prompt, moved {other}.{control}{going}",
        {
            "chosen_change": changes.chosen.mean,
            "other_train_change": other.mean,
            "other_train_change_late": late.mean,
            **({"other_train_minus_other_test": excess.mean} if excess.known else {}),
        },
        f"SFT only: chosen and other_train both rise by at least {MIN_EFFECT} nats per token; a warning if "
        f"other_train rises by {MIN_EFFECT} more than other_test does, else info; {COUNTS}.",
        "Fewer epochs or a lower learning rate; ask the model some of these questions and check its facts. The "
        "finding means something only if the answers in other_train were trained on under their own prompts."
        + ("" if excess.known else " Put other_test into the probe set to separate style from facts."),
    )


@rule(entropy_collapse=WARNING)
@over_finite_probes
def entropy_collapse(summary: Summary, run: Run) -> Finding | None:
    """The next-token distribution becomes peaky, along chosen or along what the model itself says."""
    changes, method = summary.changes(), run.method
    if not settled(summary, changes):
        return None
    before = changes.value_at_start("entropy_mean")
    after = before + changes.entropy.mean
    own = summary.samples.value("greedy_logp") if summary.samples and summary.samples.grew_sure else None
    where = ["along the chosen responses"] * changes.entropy_collapsed + ["in own answers"] * (own is not None)
    said = f" Its own greedy answers cost {-own[0]:.2f} nats per token and now {-own[1]:.2f}." if own else ""
    along = f"Along chosen entropy moved from {before:.2f} to {after:.2f} nats per position ({changes.entropy})."
    return Finding(
        "entropy_collapse",
        WARNING,
        f"entropy collapse {' and '.join(where)}",
        f"{along if changes.entropy.known else ''}{said} "
        "Samples will be alike and may repeat; whether that is bad depends on the task.",
        ({"entropy_start": before, "entropy_end": after} if changes.entropy.known else {})
        | ({"greedy_logp_start": own[0], "greedy_logp_end": own[1]} if own else {}),
        f"entropy on chosen, or -log-probability per token of the model's own greedy answers, falls by at least "
        f"{ENTROPY_COLLAPSE:.0%} of its start; {COUNTS}.",
        "Stop earlier, lower the learning rate or use fewer epochs"
        + ("; add an entropy bonus (entropy_coef) or raise epsilon_high." if method == "grpo" else "."),
    )


@rule(end_of_turn_loss=WARNING)
@over_finite_probes
def end_of_turn_loss(summary: Summary, run: Run) -> Finding | None:
    """The model forgets to stop after a good answer."""
    changes = summary.changes()
    if not changes.eos.down(MIN_EOS_FALL):
        return None
    return Finding(
        "end_of_turn_loss",
        WARNING,
        "the model is less willing to stop after chosen",
        f"The log-probability of the end-of-turn token right after the chosen responses moved {changes.eos} nats. "
        "Expect longer, perhaps endless answers.",
        {"eos_change": changes.eos.mean},
        f"log-probability of the end-of-turn token after chosen falls by at least {MIN_EOS_FALL} nats; {COUNTS}.",
        "Check that training examples end with the end-of-turn token and are not all cut at max_length.",
    )


@rule(improvement=INFO)
@over_finite_probes
def improvement(summary: Summary, run: Run) -> Finding | None:
    """Chosen rises and no other fluent answer pays."""
    changes = summary.changes()
    others = changes.bystanders
    paid = changes.falling(bystander_types(summary.types)) or settled(summary, changes) or degeneration(summary, run)
    if not changes.chosen.up() or not others.known or paid:
        return None
    pulled = unrelated_pull_up(summary, run)
    if fall_from_peak(summary, run) or (pulled and pulled.severity == WARNING):
        return None
    # Good news would deny what speaks against the run.
    rest = [found for other in RULES.values() if other is not improvement and (found := other(summary, run))]
    if any(found.severity == ALERT or found.name in OBJECTIVE for found in rest):
        return None
    return Finding(
        "improvement",
        INFO,
        "chosen rose without side effects on other fluent answers",
        f"Chosen moved {changes.chosen} nats per token by step {changes.end}; other fluent answers moved {others}, "
        f"the gap to the likeliest token {changes.gap}.",
        {
            "chosen_change": changes.chosen.mean,
            "other_fluent_answers_change": others.mean,
            "gap_change": changes.gap.mean,
        },
        f"chosen rises by at least {MIN_EFFECT} nats per token and keeps it, while no type of {FLUENT} falls by "
        f"{MIN_EFFECT}, entropy does not collapse, greedy answers do not degenerate, unrelated_pull_up gives no "
        f"warning, and nothing else is an alert or speaks against the training loss; {COUNTS}.",
        "Carry on.",
    )


RULES: dict[str, Rule] = {
    "not_finite": not_finite,
    "loss_above_reference": loss_above_reference,
    "accuracy_below_half": accuracy_below_half,
    "squeezing": squeezing,
    "displacement": displacement,
    "fall_from_peak": fall_from_peak,
    "bystander_loss": bystander_loss,
    "margin_by_rejection": margin_by_rejection,
    "unrelated_pull_up": unrelated_pull_up,
    "entropy_collapse": entropy_collapse,
    "end_of_turn_loss": end_of_turn_loss,
    "degeneration": degeneration,
    "improvement": improvement,
}
