"""A verdict per claim (C10 to C14, extended SFT, the guard) from the runs of the study."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from measures import (
    EQUAL_ACCURACY,
    EQUAL_MARGIN,
    EQUALITIES,
    HOLDS,
    UNDECIDED,
    Study,
    count_verdict,
    over_seeds,
    shown,
    verdict,
)

SHUFFLED = ("chosen_permuted", "other_test_permuted")
# Smallest step down of chosen that counts as a fall in "rises throughout", nats per token.
NOISE = 0.02
# Share of a run that is its beginning.
EARLY = 0.05


def sft_claims(study: Study) -> list[tuple[str, str]]:
    """C10 on the arm `sft`."""
    if not study.has("sft"):
        return []
    types = [run.types for run in study.runs["sft"]]
    early = [table[(table.index > 0) & (table.index <= max(1, EARLY * table.index[-1]))] for table in types]

    def last_quarter(table: pd.DataFrame, name: str) -> float:
        steps = table.index.to_numpy(float)
        return table[name].iloc[-1] - np.interp(0.75 * steps[-1], steps, table[name].to_numpy())

    rephrases = [name for name in types[0] if "rephrase" in name]
    late = over_seeds([last_quarter(table, "other_train") for table in types])
    rises = [t["chosen"].iloc[-1] > 0 and t["chosen"].diff().min() >= -NOISE for t in types]
    bell = [
        all(_rises_then_falls(t[name]) or t[name].iloc[-1] < t["chosen"].iloc[-1] / 2 for name in rephrases)
        for t in types
    ]
    shuffled = [all(e[name].min() < 0 for name in SHUFFLED) for e in early]
    fluent = [e["chosen_rephrase_semantic"].max() > 0 for e in early]
    return [
        (f"C10: chosen rises throughout (no step down of more than {NOISE:g})", count_verdict(rises)),
        ("C10: every rephrase rises then falls, or rises less than half as much as chosen", count_verdict(bell)),
        (f"C10: other_train still rises in the last quarter ({shown(late)})", verdict(late, up=True)),
        ("C10: both shuffled types are below their start within 5 % of the run", count_verdict(shuffled)),
        ("C10: the semantic rephrase of chosen is above its start then", count_verdict(fluent)),
    ]


def _rises_then_falls(curve: pd.Series) -> bool:
    return curve.max() > NOISE and curve.max() - curve.iloc[-1] > NOISE


def peak_claims(study: Study) -> list[tuple[str, str]]:
    """C11 and C12: where chosen peaks, and how it falls."""
    found = []
    arm = next((name for name in ("dpo_from_base_long", "dpo_from_base") if study.has(name)), None)
    if arm:
        curve = study.mean_curve(arm, "chosen")
        peak = int(curve.idxmax())
        inside = 0 < peak < curve.index[-1]
        fall = over_seeds(falls_from_others_peak([run.curves["chosen"] for run in study.runs[arm]]))
        said = verdict(fall, up=True, unless="" if inside else "the peak is at an end")
        claim = f"C11, from base: chosen peaks inside the run (step {peak}) and falls from there ({shown(fall)})"
        found.append((claim, said))
        most = [run.types.iloc[-1].idxmin() == "rejected" for run in study.runs[arm]]
        found.append(("C11, from base: no type falls as much as rejected", count_verdict(most)))
        rises = [_rank_with_step(run.curves["argmax"]) > 0.8 for run in study.runs[arm]]
        found.append(("C11, from base: argmax rises (Spearman with the step above 0.8)", count_verdict(rises)))
    if study.has("dpo"):
        curve = study.mean_curve("dpo", "chosen")
        peak, fall = int(curve.idxmax()), study.end("dpo", "chosen")
        is_early = peak <= EARLY * curve.index[-1]
        said = verdict(fall, up=False, unless="" if is_early else f"it peaks at step {peak}")
        found.append((f"C12, after long SFT: chosen falls from the start ({shown(fall)} at the end)", said))
    if study.has("dpo", "dpo_after_short_sft"):
        worse = study.difference("dpo", "dpo_after_short_sft", "chosen")
        found.append((f"C12: longer SFT makes chosen fall more in DPO ({shown(worse)})", verdict(worse, up=False)))
    return found


def falls_from_others_peak(curves: Sequence[pd.Series]) -> list[float]:
    """Per seed, how far the curve falls to its end from the step where the mean of all *other* seeds peaks.

    A peak that is picked on the seeds that it is tested on would hold by noise alone in a tenth of cases.
    """
    if len(curves) < 2:
        return [curve.max() - curve.iloc[-1] for curve in curves]
    table = pd.concat(curves, axis=1, keys=range(len(curves)))
    peaks = [table.drop(columns=seed).mean(axis=1).idxmax() for seed in table]
    return [float(curve.loc[peak] - curve.iloc[-1]) for curve, peak in zip(curves, peaks, strict=True)]


def _rank_with_step(curve: pd.Series) -> float:
    return float(curve.rank().corr(pd.Series(curve.index, curve.index).rank()))


def squeezing_claims(study: Study) -> list[tuple[str, str]]:
    """C14 and squeezing itself: plain DPO by itself, and against both controls."""
    controls = ("dpo_on_policy", "more_sft")
    if not study.has("dpo", *controls):
        return []
    rows = []
    for name, way, up in (("gap", "widens", True), ("third parties", "fall", False), ("bystanders", "fall", False)):
        effect = study.end("dpo", name)
        rows.append((f"Squeezing: {name} {way} in plain DPO ({shown(effect)})", verdict(effect, up=up)))
        for control in controls:
            effect = study.difference("dpo", control, name)
            label = "C14" if control == "dpo_on_policy" else "Squeezing"
            rows.append((f"{label}: {name} {way} more than in {control} ({shown(effect)})", verdict(effect, up=up)))
    return [*rows, whole("Squeezing in plain DPO, beyond both controls", rows)]


def extended_claims(study: Study) -> list[tuple[str, str]]:
    """C13: DPO after extended SFT against DPO after plain SFT and after its two controls."""
    found, arm = [], "dpo_after_both"
    others = ("dpo", "dpo_after_chosen_twice", "dpo_after_chosen_and_other")
    if not study.has(arm, *others):
        return []
    pairs = zip(study.runs[arm], study.runs["dpo"], strict=True)
    lift = over_seeds([extended.start("rejected") - plain.start("rejected") for extended, plain in pairs])
    claim = f"C13: rejected starts higher after extended SFT than after plain SFT ({shown(lift)})"
    found.append((claim, verdict(lift, up=True)))
    for equality in EQUALITIES:
        rows = []
        for other in others:
            for name, up in (("chosen", True), ("argmax", False)):
                effect = study.difference(arm, other, name, equality)
                way = "falls less" if up else "grows less"
                rows.append(
                    (f"C13, {equality}: {name} {way} than in {other} ({shown(effect)})", verdict(effect, up=up))
                )
        found += [*rows, whole(f"C13, {equality}: extended SFT beats plain SFT and both controls", rows)]
    return found


def guard_claims(study: Study) -> list[tuple[str, str]]:
    """Whether the guard drains less than each of its controls and competitors."""
    rivals = [arm for arm in ("guard_uniform", "guard_shuffled", "gate", "low_rate") if study.has("guard", arm)]
    rows = []
    for other in rivals:
        for equality in (EQUAL_MARGIN, EQUAL_ACCURACY):
            effect = study.difference("guard", other, "drained mass", equality)
            claim = f"squeeze_guard, {equality}: drains less than {other} ({shown(effect)})"
            rows.append((claim, verdict(effect, up=False)))
    return [*rows, whole("squeeze_guard succeeds: it drains less than each", rows)] if rows else []


def whole(claim: str, rows: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """A claim that holds only if all its parts do, and is refuted only if one of them is."""
    said = [part for _, part in rows]
    if any(part.startswith("no verdict") for part in said):
        return f"**{claim}**", "no verdict"
    if set(said) == {HOLDS}:
        return f"**{claim}**", "**holds**"
    return f"**{claim}**", "**not established**" if set(said) <= {HOLDS, UNDECIDED} else "**does not hold**"


def all_claims(study: Study) -> list[tuple[str, str]]:
    """Every claim whose arms were run, with its verdict."""
    parts = (sft_claims, peak_claims, squeezing_claims, extended_claims, guard_claims)
    return [row for part in parts for row in part(study)]
