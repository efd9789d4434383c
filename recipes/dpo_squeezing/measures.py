"""Curves of the study's runs, read from their stores, and what two arms differ by.

A value with ± is a mean over seeds and its standard error; two arms are compared seed by seed: at equal steps (the
last that both have), or where both have the same margin, or the same held-out accuracy: the largest that both reach,
at the step, interpolated, where each first reaches it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from trl_dynamics.findings.effects import Effect, clustered_effect
from trl_dynamics.paths.changes import bystander_types
from trl_dynamics.paths.summary import Summary, summarise_store
from trl_dynamics.report.sections import scalar_curves
from trl_dynamics.store.store import open_store

MIN_SEEDS = 5
# Changes since the run's start: nats per token, but for drained mass (probability) and margin (nats per sequence).
# Bystanders are the third parties that are fluent and should hold: no shuffled words, no paraphrases of rejected.
CHANGES = ("chosen", "rejected", "third parties", "bystanders", "argmax", "gap", "drained mass", "margin", "accuracy")
EQUAL_STEPS, EQUAL_MARGIN, EQUAL_ACCURACY = "equal steps", "equal margin", "equal accuracy"
EQUALITIES = {EQUAL_STEPS: None, EQUAL_MARGIN: "margin", EQUAL_ACCURACY: "accuracy"}
HOLDS, REVERSED, UNDECIDED = "holds", "the reverse holds", "undecided"


class Run:
    """The curves of one arm of one seed, by step."""

    def __init__(self, path: Path):
        self.store = open_store(path)
        self.summary: Summary = summarise_store(self.store)["policy"]

    @cached_property
    def types(self) -> pd.DataFrame:
        """Change of every response type since the start: steps x types, nats per token."""
        return self.summary.change_since_start()

    @cached_property
    def curves(self) -> dict[str, pd.Series]:
        """Every one of `CHANGES`, from step 0 on; accuracy is TRL's, on held-out pairs, 0 at the start (all tie)."""
        argmax, gap = (self.summary.metric(name) for name in ("argmax_logp", "argmax_minus_chosen"))
        accuracy = scalar_curves(self.store.read_trainer_log()).get("eval_rewards/accuracies", pd.Series(dtype=float))
        if len(accuracy):
            accuracy = pd.concat([pd.Series({0: 0.0}), accuracy])
        return {
            "chosen": self.types["chosen"],
            "rejected": self.types["rejected"],
            "third parties": self.summary.metric("third_party_logp"),
            "bystanders": self.types[bystander_types(self.types)].mean(axis=1),
            "argmax": argmax - argmax.iloc[0],
            "gap": gap - gap.iloc[0],
            "drained mass": self.summary.metric("drained_mass"),
            "margin": self.summary.metric("margin"),
            "accuracy": accuracy,
        }

    def end(self, name: str) -> float:
        """The last value of a curve; NaN of a curve that was not recorded."""
        return float(self.curves[name].iloc[-1]) if len(self.curves[name]) else np.nan

    def start(self, response_type: str) -> float:
        """Mean log-probability per token of a response type at step 0."""
        return self.summary.levels(response_type)[0]

    def at(self, name: str, level_of: str, level: float) -> float:
        """A curve where `level_of` first reaches `level`."""
        return value_at_level(self.curves[name], self.curves[level_of], level)


def value_at_level(curve: pd.Series, level_curve: pd.Series, level: float) -> float:
    """`curve` at the step, interpolated, where `level_curve` first reaches `level`; NaN if it never does."""
    if not len(level_curve) or not level_curve.max() >= level:
        return np.nan
    steps, values = level_curve.index.to_numpy(float), level_curve.to_numpy()
    after = int(np.argmax(values >= level))
    before = max(after - 1, 0)
    rise = values[after] - values[before]
    share = (level - values[before]) / rise if rise > 0 else 1.0
    step = steps[before] + share * (steps[after] - steps[before])
    return float(np.interp(step, curve.index.to_numpy(float), curve.to_numpy()))


def end_difference(mine: pd.Series, theirs: pd.Series) -> float:
    """Difference of two curves at the shorter one's end; NaN where one was not recorded."""
    if not len(mine) or not len(theirs):
        return np.nan
    step = min(mine.index[-1], theirs.index[-1])
    values = [np.interp(step, curve.index.to_numpy(float), curve.to_numpy()) for curve in (mine, theirs)]
    return float(values[0] - values[1])


class Study:
    """All runs of some seeds.

    Args:
        folders (`Mapping[int, Path]`): Folder of each seed.
        arms (`Sequence[str]`): Arms that every seed has.
    """

    def __init__(self, folders: Mapping[int, Path], arms: Sequence[str]):
        self.folders, self.arms = dict(folders), list(arms)
        self.runs = {arm: [Run(folder / arm) for folder in self.folders.values()] for arm in arms}

    def has(self, *arms: str) -> bool:
        return set(arms) <= set(self.arms)

    def method(self, arm: str) -> str:
        return self.runs[arm][0].store.read_meta()["method"]

    def mean(self, arm: str, value: Callable[[Run], float]) -> Effect:
        """Mean over seeds, with its standard error over seeds."""
        return over_seeds([value(run) for run in self.runs[arm]])

    def end(self, arm: str, name: str) -> Effect:
        return self.mean(arm, lambda run: run.end(name))

    def difference(self, arm: str, other: str, name: str, equality: str = EQUAL_STEPS) -> Effect:
        """Paired difference of a change, `arm` minus `other`."""
        level_of = EQUALITIES[equality]
        found = []
        for mine, theirs in zip(self.runs[arm], self.runs[other], strict=True):
            if level_of is None:
                found.append(end_difference(mine.curves[name], theirs.curves[name]))
            else:
                level = min(mine.curves[level_of].max(), theirs.curves[level_of].max())
                found.append(mine.at(name, level_of, level) - theirs.at(name, level_of, level))
        return over_seeds(found)

    def mean_curve(self, arm: str, name: str) -> pd.Series:
        return pd.concat([run.curves[name] for run in self.runs[arm]], axis=1).mean(axis=1)


def over_seeds(values: Sequence[float]) -> Effect:
    """Mean and standard error over seeds; seeds without a value are left out."""
    return clustered_effect(np.array(values, dtype=float)[:, None])


def verdict(effect: Effect, up: bool, unless: str = "") -> str:
    """Whether a change or paired difference goes the claimed way: beyond two standard errors, by Student's t.

    "holds", "the reverse holds" or "undecided", or that it does not hold for the reason `unless`; below five seeds
    nothing is decided.
    """
    if effect.num_probes < MIN_SEEDS:
        return f"no verdict, {effect.num_probes} of {MIN_SEEDS} seeds"
    if unless:
        return f"does not hold: {unless}"
    if effect.up(minimum=0.0):
        return HOLDS if up else REVERSED
    if effect.down(minimum=0.0):
        return REVERSED if up else HOLDS
    return UNDECIDED


def count_verdict(hits: Sequence[bool]) -> str:
    """A claim about single seeds holds if at least four of five show it."""
    shown = f"{sum(hits)} of {len(hits)} seeds"
    if len(hits) < MIN_SEEDS:
        return f"{shown}; no verdict"
    return f"{'holds' if sum(hits) >= 0.8 * len(hits) else 'does not hold'}, {shown}"


def shown(effect: Effect, sign: str = "+") -> str:
    """A mean ± its standard error; without the error where one seed is all there is, a dash where nothing is known."""
    if not effect.known:
        return "-"
    mean = f"{effect.mean:{sign}.3f}"
    return mean if np.isnan(effect.se) else f"{mean} ± {effect.se:.3f}"
