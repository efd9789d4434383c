"""Findings: failure signatures (and successes) in the records of a run, in words, with numbers, rule and remedy.

A finding says only what the records support; what counts as a change is defined in [`tracking.effects`].
"""

from collections.abc import Callable

import pandas as pd

from trl_dynamics.tracking.aggregate import Summary, summarise
from trl_dynamics.tracking.displacement import bystander_loss, displacement, margin_by_rejection
from trl_dynamics.tracking.effects import (
    ALERT_GAP,
    COUNTS,
    MIN_ARGMAX_RISE,
    MIN_EFFECT,
    Changes,
    bystander_types,
)
from trl_dynamics.tracking.finding import ALERT, INFO, REMEDIES, SEVERITIES, WARNING, Finding
from trl_dynamics.tracking.influence_findings import find_in_influence
from trl_dynamics.tracking.influence_summary import InfluenceSummary

# Share of the starting entropy whose loss is called a collapse.
ENTROPY_COLLAPSE = 0.5
# End-of-turn log-probability, nats.
MIN_EOS_FALL = 0.5
# Greedy answers: shares of distinct pairs of tokens, and tokens of the longest run said twice. Longer answers repeat
# a little more by themselves.
MIN_DISTINCT_FALL, ALERT_DISTINCT_FALL, MIN_REPEAT_GROWTH = 0.1, 0.3, 3.0
# Share of their length that greedy answers lose when they become stubs; how much likelier two prompts get one answer.
MIN_SHORTENING, MIN_SAMENESS = 0.5, 0.1


def find(records: pd.DataFrame | Summary, meta: dict, influence: InfluenceSummary | None = None) -> list[Finding]:
    """Findings of one run and one model, the most severe first; empty when the records support none.

    Args:
        records (`pandas.DataFrame` or [`Summary`]): Records of one run and one model, any order, or what
            [`summarise_store`] made of a store too large for a frame.
        meta (`dict`): The run's meta.json; `method` decides which rules apply.
        influence ([`InfluenceSummary`], *optional*): What was recorded with `akg_every`, for rules of its own.
    """
    summary, found = summarise(records), []
    if len(summary.steps) > 1:
        changes, method = summary.changes(), meta.get("method", "track")
        found = [rule(summary, changes, method) for rule in RULES.values()]
    if influence is not None:
        found += find_in_influence(influence)
    return sorted((f for f in found if f), key=lambda finding: SEVERITIES.index(finding.severity))


def summary_text(findings: list[Finding], run_name: str) -> str:
    """One console line per finding, or one line that says there is none."""
    if not findings:
        return f"{run_name}: no finding: no rule fired ({', '.join(RULES)}); {COUNTS}"
    return "\n".join(f"{run_name}: {f.severity}: {f.title}. {f.text}" for f in findings)


def squeezing(summary: Summary, changes: Changes, method: str) -> Finding | None:
    """Mass moves to tokens that are likely already, and nobody who was asked for gets it."""
    others, since = changes.bystanders, summary.squeezed_since()
    if since is None:
        return None
    severe = changes.chosen.down() or changes.gap.mean >= ALERT_GAP
    drained = summary.metric("drained_mass")
    if severe:
        outlook = "Expect broken or repetitive samples."
    else:
        outlook = "Answers may be fine all the same: check with `trl-dynamics judge`, or read them (probe_samples)."
    cause = "Off-policy rejected answers, which the model finds unlikely, are the usual cause. "
    return Finding(
        "squeezing",
        ALERT if severe else WARNING,
        "squeezing: probability moves to tokens that were likely already",
        f"By step {changes.end} the likeliest token along the chosen responses moved {changes.argmax} nats per token, "
        f"chosen itself {changes.chosen}, the gap between them {changes.gap}; other fluent answers, which nothing "
        f"pushes down by name, moved {others}. All of it holds from step {since} on. {outlook}",
        {
            "argmax_change": changes.argmax.mean,
            "chosen_change": changes.chosen.mean,
            "gap_change": changes.gap.mean,
            "bystander_change": others.mean,
            "since_step": float(since),
            **({"drained_mass": float(drained.iloc[-1])} if len(drained) else {}),
        },
        f"argmax along chosen rises by at least {MIN_ARGMAX_RISE} nats per token while chosen does not rise by "
        f"{MIN_EFFECT}, the gap argmax minus chosen widens by at least {MIN_EFFECT}, and chosen or bystanders (third "
        f"parties except shuffled words and paraphrases of rejected) fall by at least {MIN_EFFECT}, start to end; "
        f"{COUNTS}. Alert if chosen falls by {MIN_EFFECT} or the gap widens by {ALERT_GAP}.",
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
    """The next-token distribution along chosen becomes peaky."""
    before = changes.value_at_start("entropy_mean")
    if not changes.entropy.down(ENTROPY_COLLAPSE * before):
        return None
    after = before + changes.entropy.mean
    return Finding(
        "entropy_collapse",
        WARNING,
        "entropy collapse along the chosen responses",
        f"Entropy fell from {before:.2f} to {after:.2f} nats per position ({changes.entropy}), "
        f"{-changes.entropy.mean / before:.0%} of what there was. Samples will be alike and may repeat.",
        {"entropy_start": before, "entropy_end": after},
        f"entropy on chosen falls by at least {ENTROPY_COLLAPSE:.0%} of its start; {COUNTS}.",
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


def degeneration(summary: Summary, changes: Changes, method: str) -> Finding | None:
    """The model's own greedy answers become loops, stubs of what they were, or one phrase for many prompts."""
    samples = summary.samples
    if samples is None or len(samples.steps) < 2:
        return None
    distinct, repeat = samples.change("distinct_2"), samples.change("longest_repeat")
    loops, lengths, ends = (samples.value(name) for name in ("repeat_share", "length", "ended"))
    repeats = distinct.down(MIN_DISTINCT_FALL) and repeat.up(MIN_REPEAT_GROWTH)
    may_shrink = method == "sft" or ends[0] < 0.5
    same, alike = samples.change("same_share"), samples.value("same_share")
    signs = {
        "repeat themselves": repeats,
        "are the same for different prompts": same.up(MIN_SAMENESS),
        "shrink to stubs": not may_shrink and samples.change("num_tokens").down(MIN_SHORTENING * lengths[0]),
    }
    if not any(signs.values()):
        return None
    return Finding(
        "degeneration",
        ALERT if repeats and -distinct.mean >= ALERT_DISTINCT_FALL else WARNING,
        f"degeneration: the model's own answers {' and '.join(sign for sign, holds in signs.items() if holds)}",
        f"From step {samples.steps[0]} to {samples.steps[-1]} the share of distinct token pairs in greedy answers "
        f"moved {distinct}, the longest run that an answer says twice {repeat} tokens. Of their tokens {loops[0]:.0%} "
        f"stood in immediate repetitions at the start and {loops[1]:.0%} do now; answers have {lengths[1]:.0f} tokens "
        f"(before {lengths[0]:.0f}), and {ends[1]:.0%} end by themselves (before {ends[0]:.0%}). Two different "
        f"prompts get the same answer in {alike[1]:.0%} of cases (before {alike[0]:.0%}).",
        {
            "distinct_2_change": distinct.mean,
            "longest_repeat_change": repeat.mean,
            "repeat_share_start": loops[0],
            "repeat_share_end": loops[1],
            "same_share_change": same.mean,
            "length_start": lengths[0],
            "length_end": lengths[1],
            "num_answers": float(distinct.num_probes),
        },
        f"greedy answers, first to last step: distinct-2 falls by at least {MIN_DISTINCT_FALL} and the longest repeat "
        f"grows by at least {MIN_REPEAT_GROWTH:g} tokens; or two prompts get the same answer in {MIN_SAMENESS:.0%} "
        f"more of cases; or their length falls by {MIN_SHORTENING:.0%}, but not for SFT, which teaches lengths, nor "
        f"where less than half ended by themselves at the start; {COUNTS}. Alert from {ALERT_DISTINCT_FALL} of "
        "distinct-2.",
        "Read the answers in the probe explorer, and use a checkpoint from before. "
        f"{REMEDIES.get(method, REMEDIES['track'])} Decoding options (a repetition penalty, sampling) hide it without "
        "mending it.",
    )


def improvement(summary: Summary, changes: Changes, method: str) -> Finding | None:
    """Chosen rises and nobody else pays."""
    others = changes.bystanders
    paid = (
        changes.falling(bystander_types(summary.types))
        or changes.entropy.down(ENTROPY_COLLAPSE * changes.value_at_start("entropy_mean"))
        or degeneration(summary, changes, method)
    )
    if not changes.chosen.up() or not others.known or paid:
        return None
    pulled = unrelated_pull_up(summary, changes, method)
    if displacement(summary, changes, method) or (pulled and pulled.severity == WARNING):
        return None
    return Finding(
        "improvement",
        INFO,
        "chosen rose without side effects on other answers",
        f"Chosen moved {changes.chosen} nats per token by step {changes.end}; other fluent answers moved {others}, "
        f"the gap to the likeliest token {changes.gap}.",
        {"chosen_change": changes.chosen.mean, "bystander_change": others.mean, "gap_change": changes.gap.mean},
        f"chosen rises by at least {MIN_EFFECT} nats per token and keeps it, while no bystander type falls by "
        f"{MIN_EFFECT}, entropy does not collapse, greedy answers do not degenerate and unrelated_pull_up gives no "
        f"warning; {COUNTS}.",
        "Carry on.",
    )


RULES: dict[str, Callable[[Summary, Changes, str], Finding | None]] = {
    "squeezing": squeezing,
    "displacement": displacement,
    "bystander_loss": bystander_loss,
    "margin_by_rejection": margin_by_rejection,
    "unrelated_pull_up": unrelated_pull_up,
    "entropy_collapse": entropy_collapse,
    "end_of_turn_loss": end_of_turn_loss,
    "degeneration": degeneration,
    "improvement": improvement,
}
