"""Findings against the truth: what is asked of each, confusion tables with intervals.

Rates have Wilson's 95 % interval. It takes runs as independent; runs of one seed share their data and often the model
that they start from, so the intervals are somewhat too narrow.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from outcomes import HELD_OUT, SAMPLED, TRAINING, Outcome

from trl_dynamics.findings.finding import ALERT, INFO, WARNING
from trl_dynamics.paths import rules
from trl_dynamics.paths.changes import Changes
from trl_dynamics.paths.summary import Summary

Z_95 = 1.959964


@dataclass(frozen=True)
class Case:
    """A run: what was found, and what became of its model.

    Args:
        seed (`int`): Of data and training.
        arm (`str`): Name of its settings.
        method (`str`): `"sft"` or `"dpo"`.
        summary ([`Summary`]): Its records.
        found (`Mapping[str, str]`): Severity of each finding, by name.
        outcome ([`Outcome`], *optional*): By the checker; not known of a model that lives outside the world.
        squeezes (`bool`, *optional*): Whether it squeezes by construction; None where that cannot be said.
    """

    seed: int
    arm: str
    method: str
    summary: Summary
    found: Mapping[str, str]
    outcome: Outcome | None
    squeezes: bool | None

    @cached_property
    def changes(self) -> Changes:
        """From the first to the last step."""
        return self.summary.changes()


@dataclass(frozen=True)
class Question:
    """What is asked of a finding.

    Args:
        name (`str`): The finding, in words.
        truth (`str`): A class of `outcomes.CLASSES` or `LEVELS`, `"not better"`, or `"squeezes"`.
        fired (`Callable[[Case], bool]`): Whether the finding is there.
        among (`Callable[[Case], bool]`): The runs it is asked of.
    """

    name: str
    truth: str
    fired: Callable[[Case], bool]
    among: Callable[[Case], bool] = lambda case: True

    def is_true(self, case: Case, kind: str | None = None) -> bool | None:
        """The truth of a run, by the answers of its class or by others; None where it is not known."""
        if self.truth == "squeezes":
            return case.squeezes
        if case.outcome is None:
            return None
        name = self.truth.removeprefix("not ")
        return case.outcome.is_(name, kind) != (name != self.truth)

    def is_clear(self, case: Case) -> bool:
        """Whether the truth of a run is beyond noise."""
        return self.truth == "squeezes" or case.outcome.is_clear(self.truth.removeprefix("not "))


def is_dpo(case: Case) -> bool:
    return case.method == "dpo"


def is_plain(case: Case) -> bool:
    """Whether the run trains with DPO's sigmoid loss alone, so that ln 2 is what the reference has."""
    return is_dpo(case) and case.summary.training is not None and case.summary.training.is_plain_sigmoid


def is_other_dpo(case: Case) -> bool:
    return is_dpo(case) and not is_plain(case)


def is_sft(case: Case) -> bool:
    return case.method == "sft"


def was_asked(case: Case) -> bool:
    """Whether the run kept greedy answers, without which nothing is said about them."""
    return case.summary.samples is not None


def has(name: str, *severities: str) -> Callable[[Case], bool]:
    """Whether a finding of that name is there, of one of the severities where some are given."""
    return lambda case: name in case.found and (not severities or case.found[name] in severities)


QUESTIONS = (
    Question("squeezing", "squeezes", has("squeezing")),
    Question("squeezing, alert", "squeezes", has("squeezing", ALERT)),
    Question("squeezing, as harm", "harmed", has("squeezing"), is_dpo),
    Question("squeezing alert, as harm", "harmed", has("squeezing", ALERT), is_dpo),
    Question("displacement_harmful", "harmed", has("displacement_harmful"), is_dpo),
    Question("displacement_harmful, alert", "harmed", has("displacement_harmful", ALERT), is_dpo),
    Question(
        "harmful, among harmful and benign",
        "harmed",
        has("displacement_harmful"),
        lambda case: bool({"displacement_harmful", "displacement_benign"} & set(case.found)),
    ),
    Question("fall_from_peak", "not better", has("fall_from_peak")),
    Question("fall_from_peak, warning, as harm", "harmed", has("fall_from_peak", WARNING)),
    Question("bystander_loss", "harmed", has("bystander_loss"), is_dpo),
    Question("margin_by_rejection", "not better", has("margin_by_rejection"), is_dpo),
    Question("margin_by_rejection, as harm", "harmed", has("margin_by_rejection"), is_dpo),
    Question("degeneration", "degenerate", has("degeneration"), was_asked),
    Question("degeneration, of loops", "loops", has("degeneration"), was_asked),
    Question("degeneration, of loops at the end", "looping", has("degeneration"), was_asked),
    Question("degeneration, alert", "looping", has("degeneration", ALERT), was_asked),
    Question("unrelated_pull_up, warning", "wrong_facts", has("unrelated_pull_up", "warning"), is_sft),
    Question("entropy_collapse", "alike", has("entropy_collapse")),
    Question("loss_above_reference", "harmed", has("loss_above_reference"), is_plain),
    Question("accuracy_below_half", "harmed", has("accuracy_below_half"), is_other_dpo),
    Question("not_finite", "harmed", has("not_finite")),
    Question("improvement", "better", has("improvement")),
    Question("any alert", "harmed", lambda case: ALERT in case.found.values()),
    Question("any alert or warning", "harmed", lambda case: bool(set(case.found.values()) - {INFO})),
)


@dataclass(frozen=True)
class Confusion:
    """Runs by truth and finding."""

    true_fired: int
    true_silent: int
    false_fired: int
    false_silent: int

    @property
    def recall(self) -> tuple[int, int]:
        """Hits among the runs where the finding should be there."""
        return self.true_fired, self.true_fired + self.true_silent

    @property
    def precision(self) -> tuple[int, int]:
        """Hits among the runs where it is there."""
        return self.true_fired, self.true_fired + self.false_fired

    @property
    def false_alarms(self) -> tuple[int, int]:
        """Wrong ones among the runs where it should not be there."""
        return self.false_fired, self.false_fired + self.false_silent

    @property
    def balanced_accuracy(self) -> float:
        """(recall + 1 - false alarm rate) / 2; NaN where a class is empty."""
        (hits, positives), (wrong, negatives) = self.recall, self.false_alarms
        return (hits / positives + 1 - wrong / negatives) / 2 if positives and negatives else math.nan


def confusion(cases: Sequence[Case], question: Question, kind: str | None = None, clear: bool = False) -> Confusion:
    """Count the runs of a question.

    Args:
        kind (`str`, *optional*): Take the truth from other answers.
        clear (`bool`, *optional*): Leave out runs whose truth is within noise.
    """
    pairs = [
        (truth, question.fired(case))
        for case in cases
        if question.among(case)
        and (truth := question.is_true(case, kind)) is not None
        and (not clear or question.is_clear(case))
    ]
    return Confusion(*(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))))


def wilson(hits: int, of: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's interval of a rate: all p with |hits/of - p| <= z sqrt(p (1 - p) / of); (0, 1) of nothing."""
    if of == 0:
        return 0.0, 1.0
    rate, spread = hits / of, z**2 / of
    middle = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (rate * (1 - rate) + spread / 4)) / (1 + spread)
    return max(0.0, min(rate, middle - half)), min(1.0, max(rate, middle + half))


def shown_rate(hits: int, of: int) -> str:
    """A rate with its interval."""
    low, high = wilson(hits, of)
    return f"{hits / of:.2f} ({low:.2f}-{high:.2f})" if of else "-"


def confusion_table(stages: Mapping[str, Sequence[Case]]) -> list[str]:
    """Markdown: every question in every stage."""
    lines = header(
        "finding",
        "truth",
        "runs of",
        "true, found",
        "true, not found",
        "false, found",
        "false, not found",
        "recall",
        "precision",
        "false alarms",
    )
    for question in QUESTIONS:
        for stage, cases in stages.items():
            found = confusion(cases, question)
            counts = (found.true_fired, found.true_silent, found.false_fired, found.false_silent)
            if sum(counts):
                rates = (shown_rate(*rate) for rate in (found.recall, found.precision, found.false_alarms))
                lines.append(row(question.name, question.truth, stage, *map(str, counts), *rates))
    return lines


def verdict_table(stages: Mapping[str, Sequence[Case]]) -> list[str]:
    """Markdown: the runs whose chosen ended below its start, by what the checker says and by what was found."""
    verdicts = {
        "harmful, alert": has("displacement_harmful", ALERT),
        "harmful, warning": has("displacement_harmful", WARNING),
        "cannot be told": has("displacement"),
        "benign": has("displacement_benign"),
    }
    lines = header("runs of", "method", "checker", "runs", *verdicts)
    for stage, cases in stages.items():
        fallen = [case for case in cases if case.changes.chosen.down() and case.outcome]
        for method, harmed in itertools.product(("dpo", "sft"), (True, False)):
            own = [case for case in fallen if case.method == method and case.outcome.is_("harmed") == harmed]
            counts = (sum(map(holds, own)) for holds in verdicts.values())
            lines.append(row(stage, method, "harmed" if harmed else "no harm", str(len(own)), *map(str, counts)))
    return lines


def unasked_table(stages: Mapping[str, Sequence[Case]]) -> list[str]:
    """Markdown: alerts of the runs that kept greedy answers, and what were left of them had none been kept."""
    lines = header("runs of", "method", "checker", "runs", "with an alert", "with an alert had none been kept")
    for stage, cases in stages.items():
        for method, harmed in itertools.product(("dpo", "sft"), (True, False)):
            own = [case for case in cases if case.method == method and was_asked(case) and case.outcome]
            own = [case for case in own if case.outcome.is_("harmed") == harmed]
            alerts = (sum(ALERT in case.found.values() for case in own), sum(map(_alerts_unasked, own)))
            lines.append(row(stage, method, "harmed" if harmed else "no harm", str(len(own)), *map(str, alerts)))
    return lines


def _alerts_unasked(case: Case) -> bool:
    silent = replace(case.summary, samples=None)
    return any(finding.severity == ALERT for finding in rules.find(silent, {"method": case.method}))


def robustness_table(stages: Mapping[str, Sequence[Case]]) -> list[str]:
    """Markdown: recall and false alarms where only clear cases count, or the truth is taken from other answers."""
    variants = {
        "as above": {},
        "clear cases only": {"clear": True},
        "by answers to training prompts": {"kind": TRAINING},
        "by samples at temperature 1": {"kind": SAMPLED},
    }
    lines = header("finding", "runs of", *(f"{name}: recall, false alarms" for name in variants))
    for question in QUESTIONS:
        if question.truth in ("squeezes", "alike"):
            continue
        for stage, cases in stages.items():
            cells = []
            for options in variants.values():
                found = confusion(cases, question, **options)
                cells.append(", ".join(f"{hits}/{of}" for hits, of in (found.recall, found.false_alarms)))
            lines.append(row(question.name, stage, *cells))
    return lines


def arm_table(cases: Sequence[Case]) -> list[str]:
    """Markdown: by arm, what changed by the checker (mean over seeds, and range), and how often what was found."""
    columns = ((HELD_OUT, "good"), (HELD_OUT, "grammatical"), (HELD_OUT, "borrowed"), (HELD_OUT, "loop"))
    columns += ((TRAINING, "good"), (SAMPLED, "good"), (SAMPLED, "likeness"))
    heads = [f"{column}, {kind}" for kind, column in columns]
    lines = header("arm", "runs", *heads, "harmed", "findings")
    for arm in dict.fromkeys(case.arm for case in cases):
        own = [case for case in cases if case.arm == arm]
        judged = [case for case in own if case.outcome]
        cells = [_range([case.outcome.change(*column).mean for case in judged]) for column in columns]
        counts: dict[str, int] = {}
        for case in own:
            for name, severity in case.found.items():
                counts[f"{name} ({severity})"] = counts.get(f"{name} ({severity})", 0) + 1
        found = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        harmed = str(sum(case.outcome.is_("harmed") for case in judged))
        lines.append(row(arm, str(len(own)), *cells, harmed, found or "-"))
    return lines


def _range(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" [{min(values):+.2f}, {max(values):+.2f}]" if len(values) > 1 else ""
    return f"{np.mean(values):+.2f}{spread}"


def header(*heads: str) -> list[str]:
    return [row(*heads), row(*["---"] * len(heads))]


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
