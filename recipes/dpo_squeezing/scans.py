"""The rules of the findings as functions of one threshold each, everything else as it is: how good is which value?

A rule is repeated here because its constants are no arguments there; a test holds both together at the value in use.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from confusion import QUESTIONS, Case, Question, confusion, header, row

from trl_dynamics.findings import effects
from trl_dynamics.findings.effects import Effect
from trl_dynamics.paths import changes
from trl_dynamics.paths.changes import bystander_types, paraphrases_of_chosen
from trl_dynamics.paths.rules import degeneration, displacement, objective

SMALL = (0.02, 0.05, 0.1, 0.15, 0.2)
LARGE = (0.05, 0.1, 0.15, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Scan:
    """A rule and one of its thresholds.

    Args:
        threshold (`str`): Name of the constant, and what it is applied to.
        current (`float`): Its value.
        grid (`tuple[float, ...]`): Values to try, the current one among them.
        question (`str`): Name of the question that the finding is scored on.
        fires (`Callable[[Case, float], bool]`): Whether the finding is there at a value.
    """

    threshold: str
    current: float
    grid: tuple[float, ...]
    question: str
    fires: Callable[[Case, float], bool]

    def at(self, value: float) -> Question:
        """The question with the threshold at a value."""
        asked = next(question for question in QUESTIONS if question.name == self.question)
        return replace(asked, fired=lambda case: self.fires(case, value))


def squeezing(case: Case, argmax=changes.MIN_ARGMAX_RISE, gap=effects.MIN_EFFECT, paid=effects.MIN_EFFECT) -> bool:
    """The rule at its last step, with a threshold for each part."""
    squeeze = case.changes.squeeze
    gained = case.method != "sft" and squeeze.argmax.up(argmax) and squeeze.gap.up(gap) and not squeeze.chosen.up()
    return gained and (squeeze.chosen.down(paid) or squeeze.bystanders.down(paid))


def squeezing_alert(case: Case, alert: float) -> bool:
    squeeze = case.changes.squeeze
    broken = degeneration.got_worse(case.summary, case.method)
    if case.method == "sft" or displacement.settled_unbroken(case.summary, case.changes, broken):
        return False
    return squeeze.holds and (squeeze.chosen.down() or squeeze.gap.mean >= alert)


def harmful(case: Case, chosen=effects.MIN_EFFECT, others=effects.MIN_EFFECT) -> bool:
    """The rule with a threshold for chosen and one for the others."""
    changes, broken = case.changes, degeneration.got_worse(case.summary, case.method)
    squeezed = case.method != "sft" and changes.squeeze.holds
    if displacement.settled_unbroken(case.summary, changes, broken) or (case.method == "sft" and not broken):
        return False
    paraphrases = paraphrases_of_chosen(changes.types)
    beside: list[Effect] = [changes.bystanders, changes.of_types(paraphrases)]
    beside += [changes.of_types([name]) for name in paraphrases]
    worse = broken or squeezed or any(effect.down(others) for effect in beside)
    return changes.chosen.down(chosen) and worse


def harmful_alert(case: Case, alert: float) -> bool:
    """The severity with another threshold on what chosen or other fluent answers lose."""
    changes = case.changes
    return harmful(case) and (-changes.chosen.mean >= alert or -changes.bystanders.mean >= alert)


def bystander_loss(case: Case, least: float) -> bool:
    types = bystander_types(case.changes.types)
    return not case.changes.chosen.down() and any(case.changes.of_types([name]).down(least) for name in types)


def margin_by_rejection(case: Case, least: float) -> bool:
    """With another threshold on the fall of rejected and on the margin; chosen as it is."""
    changes = case.changes
    margin = changes.difference("chosen", "rejected")
    whole = changes.difference("chosen", "rejected", "logp_sum")
    grows = case.method != "sft" and margin.up(least) and whole.up()
    return grows and changes.rejected.down(least) and not changes.chosen.up()


def _degeneration(case: Case, **changed: float) -> bool:
    limits = {"distinct": degeneration.MIN_DISTINCT_FALL, "repeat": degeneration.MIN_REPEAT_GROWTH}
    limits |= {
        "loops": degeneration.MIN_LOOPS,
        "sameness": degeneration.MIN_SAMENESS,
        "shortening": degeneration.MIN_SHORTENING,
        "level": degeneration.LOOPING_SHARE,
    } | changed
    samples = case.summary.samples
    if samples is None:
        return False
    may_shrink = case.method == "sft" or samples.value("ended")[0] < 0.5
    shorter = samples.change("num_tokens").down(limits["shortening"] * samples.value("length")[0])
    repeats = samples.change("distinct_2").down(limits["distinct"])
    repeats = repeats and samples.change("longest_repeat").up(limits["repeat"])
    repeats = repeats or degeneration.more_loops(samples, limits["loops"])
    repeats = repeats or degeneration.are_loops(samples, limits["level"]) or degeneration.are_one(samples)
    return repeats or samples.change("same_share").up(limits["sameness"]) or (shorter and not may_shrink)


def degenerates(name: str) -> Callable[[Case, float], bool]:
    """The rule with one of its thresholds changed."""
    return lambda case, value: _degeneration(case, **{name: value})


def unrelated_pull_up(case: Case, excess: float) -> bool:
    changes = case.changes
    rises = changes.chosen.up() and changes.of_types(["other_train"]).up()
    return case.method == "sft" and rises and changes.difference("other_train", "other_test").up(excess)


def entropy_collapse(case: Case, share: float) -> bool:
    samples = case.summary.samples
    surer = samples is not None and samples.change("logp_mean").up(-share * samples.value("greedy_logp")[0])
    return surer or case.changes.entropy.down(share * case.changes.value_at_start("entropy_mean"))


def degeneration_alert(case: Case, share: float) -> bool:
    """With another share of loops at the end from which degeneration is an alert."""
    samples = case.summary.samples
    if samples is None or not _degeneration(case):
        return False
    repeats = degeneration.worse_signs(samples, case.method)["repeat themselves"]
    fell = repeats and -samples.change("distinct_2").mean >= degeneration.ALERT_DISTINCT_FALL
    return fell or degeneration.are_loops(samples, share)


def loss_above(case: Case, excess: float) -> bool:
    return objective.loss_is_above(case.summary, case.method, excess)


def accuracy_below(case: Case, lack: float) -> bool:
    return objective.accuracy_is_below(case.summary, case.changes, case.method, lack)


SCANS = (
    Scan(
        "MIN_ARGMAX_RISE",
        changes.MIN_ARGMAX_RISE,
        (0.0, 0.01, 0.02, 0.03, 0.05, 0.1),
        "squeezing",
        lambda case, value: squeezing(case, argmax=value),
    ),
    Scan(
        "MIN_EFFECT of the gap",
        effects.MIN_EFFECT,
        (0.02, 0.05, 0.07, 0.1, 0.15),
        "squeezing",
        lambda case, value: squeezing(case, gap=value),
    ),
    Scan(
        "MIN_EFFECT of chosen or bystanders",
        effects.MIN_EFFECT,
        SMALL,
        "squeezing",
        lambda case, value: squeezing(case, paid=value),
    ),
    Scan("ALERT_GAP", changes.ALERT_GAP, LARGE, "squeezing alert, as harm", squeezing_alert),
    Scan(
        "MIN_EFFECT of chosen",
        effects.MIN_EFFECT,
        SMALL,
        "displacement_harmful",
        lambda case, value: harmful(case, chosen=value),
    ),
    Scan(
        "MIN_EFFECT of the others",
        effects.MIN_EFFECT,
        SMALL,
        "displacement_harmful",
        lambda case, value: harmful(case, others=value),
    ),
    Scan("ALERT_EFFECT", changes.ALERT_EFFECT, LARGE, "displacement_harmful, alert", harmful_alert),
    Scan("MIN_BYSTANDER_FALL", changes.MIN_BYSTANDER_FALL, LARGE, "bystander_loss", bystander_loss),
    Scan("MIN_EFFECT of rejected", effects.MIN_EFFECT, LARGE, "margin_by_rejection, as harm", margin_by_rejection),
    Scan(
        "MIN_DISTINCT_FALL",
        degeneration.MIN_DISTINCT_FALL,
        (0.02, 0.05, 0.1, 0.2),
        "degeneration",
        degenerates("distinct"),
    ),
    Scan(
        "MIN_REPEAT_GROWTH",
        degeneration.MIN_REPEAT_GROWTH,
        (1.0, 2.0, 3.0, 5.0),
        "degeneration",
        degenerates("repeat"),
    ),
    Scan("MIN_LOOPS", degeneration.MIN_LOOPS, (1, 2, 3, 4), "degeneration, of loops", degenerates("loops")),
    Scan("MIN_SAMENESS", degeneration.MIN_SAMENESS, (0.02, 0.05, 0.1, 0.2), "degeneration", degenerates("sameness")),
    Scan(
        "MIN_SHORTENING",
        degeneration.MIN_SHORTENING,
        (0.05, 0.1, 0.25, 0.5),
        "degeneration",
        degenerates("shortening"),
    ),
    Scan(
        "LOOPING_SHARE",
        degeneration.LOOPING_SHARE,
        (0.1, 0.25, 0.5, 0.75),
        "degeneration, of loops at the end",
        degenerates("level"),
    ),
    Scan(
        "ALERT_LOOP_SHARE",
        degeneration.ALERT_LOOP_SHARE,
        (0.25, 0.5, 0.75, 1.0),
        "degeneration, alert",
        degeneration_alert,
    ),
    Scan(
        "MIN_LOSS_EXCESS",
        objective.MIN_LOSS_EXCESS,
        (0.0, 0.02, 0.1, 0.3),
        "loss_above_reference",
        loss_above,
    ),
    Scan(
        "MIN_ACCURACY_LACK",
        objective.MIN_ACCURACY_LACK,
        (0.0, 0.02, 0.05, 0.1),
        "accuracy_below_half",
        accuracy_below,
    ),
    Scan(
        "MIN_EFFECT of other_train over other_test",
        effects.MIN_EFFECT,
        (0.02, 0.05, 0.1, 0.15, 0.25, 0.5),
        "unrelated_pull_up, warning",
        unrelated_pull_up,
    ),
    Scan(
        "ENTROPY_COLLAPSE",
        changes.ENTROPY_COLLAPSE,
        (0.1, 0.2, 0.3, 0.5, 0.7, 0.9),
        "entropy_collapse",
        entropy_collapse,
    ),
)


def scan_table(cases: Sequence[Case]) -> list[str]:
    """Markdown: per threshold and value, recall, false alarms and balanced accuracy; the value in use is bold."""
    lines = header("threshold", "finding", "value: recall, false alarms, balanced accuracy")
    for scan in SCANS:
        cells = []
        for value in scan.grid:
            found = confusion(cases, scan.at(value))
            rates = ", ".join(f"{hits}/{of}" for hits, of in (found.recall, found.false_alarms))
            balanced = "-" if np.isnan(found.balanced_accuracy) else f"{found.balanced_accuracy:.2f}"
            shown = f"{value:g}: {rates}, {balanced}"
            cells.append(f"**{shown}**" if value == scan.current else shown)
        lines.append(row(scan.threshold, scan.question, "; ".join(cells)))
    return lines
