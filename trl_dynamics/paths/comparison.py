"""Where runs that were scored on the same probe set differ: findings that compare."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from trl_dynamics.findings.chapter import Comparison
from trl_dynamics.findings.effects import COUNTS, MIN_EFFECT, clustered_effect
from trl_dynamics.findings.finding import INFO, WARNING, Finding
from trl_dynamics.paths.changes import Changes, bystander_types
from trl_dynamics.paths.summary import Summary, summarise


def compare_comparable(subjects: Mapping[str, Summary]) -> Comparison:
    """What was recorded of models, compared with the first of them; those that do not compare are left out."""
    own = {label: summary.own for label, summary in subjects.items()}
    (reference, first), *others = own.items()
    reasons = {label: why_not_comparable({reference: first, label: other}) for label, other in others}
    compared = [label for label, reason in reasons.items() if not reason]
    findings = compare({label: own[label] for label in (reference, *compared)})
    return Comparison(reference, findings, compared, {label: reason for label, reason in reasons.items() if reason})


def why_not_comparable(two: Mapping[str, Summary]) -> str:
    """Why two runs, by their labels, cannot be compared probe by probe; empty where they can."""
    first, other = two.values()
    if first.fingerprint != other.fingerprint:
        return "another probe set"
    shared_steps = set(first.steps) & set(other.steps)
    if not shared_steps or max(shared_steps) <= max(first.steps[0], other.steps[0]):
        return "no common step after the start"
    ours, theirs = other.first, first.first
    difference = ours.values("num_tokens") - theirs.like(ours).values("num_tokens")
    if (np.abs(difference) > 0).any():
        return "another tokenizer or length limit, so values per token do not compare"
    for label, one in two.items():
        for step in (one.steps[0], max(shared_steps)):
            if not one.any_finite(step):
                return f"no value of {label} is finite at step {step:,}"
    return ""


def compare(runs: Mapping[str, pd.DataFrame | Summary]) -> list[Finding]:
    """Where runs differ from the first one, at the last step that both recorded, paired by probe.

    Args:
        runs (`Mapping[str, pandas.DataFrame | Summary]`): Records of one model per entry, all of the same probe set;
            the first entry is what the others are compared with.
    """
    (reference, base), *others = ((name, summarise(records)) for name, records in runs.items())
    found = []
    for name, other in others:
        common = sorted(set(base.steps) & set(other.steps))
        if common and common[-1] > max(base.steps[0], other.steps[0]):
            found += _not_finite({reference: base, name: other}, common[-1])
            found += _differences(name, other.changes(end=common[-1]), reference, base.changes(end=common[-1]))
    return found


def _not_finite(runs: Mapping[str, Summary], step: int) -> list[Finding]:
    """What a comparison at `step` leaves out."""
    counts = {name: run.table(step).not_finite for name, run in runs.items()}
    parts = [f"{lost:,} of {number:,} in {name}" for name, (lost, number) in counts.items() if lost]
    if not parts:
        return []
    return [
        Finding(
            "compare_not_finite",
            WARNING,
            f"answers are NaN or infinite: {' and '.join(parts)}",
            f"At step {step} scored answers are NaN or infinite: {' and '.join(parts)}. They are left out here, so "
            "that runs may seem alike that are not.",
            {"not_finite": float(sum(lost for lost, _ in counts.values()))},
            "a scored answer is not finite at the last common step.",
        )
    ]


def _differences(name: str, ours: Changes, reference: str, theirs: Changes) -> list[Finding]:
    quantities = {
        "chosen": ("chosen", ours.delta(["chosen"]), theirs.delta(["chosen"])),
        "rejected": ("rejected", ours.delta(["rejected"]), theirs.delta(["rejected"])),
        "other_fluent_answers": (
            "other fluent answers",
            ours.delta(bystander_types(ours.types)),
            theirs.delta(bystander_types(theirs.types)),
        ),
        "gap": ("the gap argmax minus chosen", ours.gap_delta(), theirs.gap_delta()),
    }
    found = []
    for key, (label, mine, other) in quantities.items():
        difference = clustered_effect(mine - other)
        if not (difference.up() or difference.down()):
            continue
        higher = "higher" if difference.mean > 0 else "lower"
        was, now = clustered_effect(other), clustered_effect(mine)
        found.append(
            Finding(
                f"compare_{key}",
                INFO,
                f"{name}: {label} {abs(difference.mean):.2f} nats per token {higher} than in {reference}",
                f"By step {ours.end}, since the start, {label} moved {now} nats per token in {name} and {was} in "
                f"{reference}; paired difference {difference} over {difference.num_probes} probes.",
                {f"{key}_difference": difference.mean, f"{key}_change": now.mean, f"{key}_reference": was.mean},
                f"paired difference of the changes since the start at the last common step of at least {MIN_EFFECT} "
                f"nats per token; {COUNTS}.",
            )
        )
    return found
