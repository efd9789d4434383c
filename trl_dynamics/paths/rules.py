"""Findings: failure signatures (and successes) in the records of a run, in words, with numbers, rule and remedy.

A finding says only what the records support; what counts as a change is defined in [`paths.changes`].
"""

from collections.abc import Callable
from dataclasses import replace

import pandas as pd

from trl_dynamics.findings.effects import COUNTS, MIN_EFFECT, MIN_PROBES
from trl_dynamics.findings.finding import ALERT, INFO, REMEDIES, SEVERITIES, WARNING, Finding
from trl_dynamics.influence.rules import find_in_influence
from trl_dynamics.influence.summary import InfluenceSummary
from trl_dynamics.paths.changes import ALERT_GAP, ENTROPY_COLLAPSE, FLUENT, MIN_ARGMAX_RISE, Changes, bystander_types
from trl_dynamics.paths.degeneration import degeneration, got_worse
from trl_dynamics.paths.displacement import (
    bystander_loss,
    displacement,
    fall_from_peak,
    margin_by_rejection,
    settled,
    settled_unbroken,
)
from trl_dynamics.paths.finiteness import not_finite
from trl_dynamics.paths.objective import accuracy_below_half, loss_above_reference
from trl_dynamics.paths.summary import Summary, summarise

# End-of-turn log-probability, nats.
MIN_EOS_FALL = 0.5
CALM = "what moved is too little to count, or is as it should be"
OBJECTIVE = ("loss_above_reference", "accuracy_below_half")


def find(records: pd.DataFrame | Summary, meta: dict, influence: InfluenceSummary | None = None) -> list[Finding]:
    """Findings of one run and one model, the most severe first; empty when the records support none.

    With a single step there is no change, and only levels are judged: what is not finite, and answers that are loops.

    Args:
        records (`pandas.DataFrame` or [`Summary`]): Records of one run and one model, any order, or what
            [`summarise_store`] made of a store, with its greedy answers and its trainer's log.
        meta (`dict`): The run's meta.json; `method` decides which rules apply.
        influence ([`InfluenceSummary`], *optional*): What was recorded with `akg_every`, for rules of its own.
    """
    summary = summarise(records)
    changes, method = summary.changes(), meta.get("method", "track")
    found = [finding for rule in RULES.values() if (finding := rule(summary, changes, method))]
    if found and any(part.not_finite[0] for part in summary.parts):
        found = _of_the_finite(found, changes)
    # Good news would deny what speaks against the run.
    if any(finding.severity == ALERT or finding.name in OBJECTIVE for finding in found):
        found = [finding for finding in found if finding.name != "improvement"]
    if influence is not None:
        found += find_in_influence(influence)
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def summary_text(findings: list[Finding], run_name: str, calm: str = CALM) -> str:
    """One console line per finding, or one sentence that there is none; `calm` says what that means."""
    if not findings:
        return f"{run_name}: no finding: {calm}."
    return "\n".join(f"{run_name}: {f.severity}: {f.title}. {f.text}" for f in findings)


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


def _of_the_finite(found: list[Finding], changes: Changes) -> list[Finding]:
    """The findings, with a sentence that says over how many probes changes are taken."""
    finite, number = changes.num_finite
    note = f" Changes are over the {finite} of {number} probes that are finite at both ends."
    apart = ("not_finite", "degeneration", *OBJECTIVE)
    return [f if f.name in apart else replace(f, text=f.text + note) for f in found]


def squeezing(summary: Summary, changes: Changes, method: str) -> Finding | None:
    """Mass moves to tokens that are likely already, and not to the answers that were preferred."""
    others, since = changes.bystanders, summary.squeezed_since()
    if since is None or method == "sft":
        return None
    severe = changes.chosen.down() or changes.gap.mean >= ALERT_GAP
    # Likely tokens gain as well where the model settles on few answers, which may be good ones.
    severe = severe and not settled_unbroken(summary, changes, got_worse(summary, method))
    drained = summary.metric("drained_mass")
    if severe or degeneration(summary, changes, method):
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
        f"Use the checkpoint before step {since}. {cause if method == 'dpo' else ''}"
        f"{REMEDIES.get(method, REMEDIES['track'])}",
    )


def unrelated_pull_up(summary: Summary, changes: Changes, method: str) -> Finding | None:
    """SFT also raises answers to other training prompts: the model may answer one question with another's facts."""
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


def entropy_collapse(summary: Summary, changes: Changes, method: str) -> Finding | None:
    """The next-token distribution becomes peaky, along chosen or along what the model itself says."""
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


def end_of_turn_loss(summary: Summary, changes: Changes, method: str) -> Finding | None:
    """The model forgets to stop after a good answer."""
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


def improvement(summary: Summary, changes: Changes, method: str) -> Finding | None:
    """Chosen rises and no other fluent answer pays."""
    others = changes.bystanders
    paid = (
        changes.falling(bystander_types(summary.types))
        or settled(summary, changes)
        or degeneration(summary, changes, method)
    )
    if not changes.chosen.up() or not others.known or paid:
        return None
    pulled = unrelated_pull_up(summary, changes, method)
    if fall_from_peak(summary, changes, method) or (pulled and pulled.severity == WARNING):
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


RULES: dict[str, Callable[[Summary, Changes, str], Finding | None]] = {
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
