"""Effects: how much a mean over probes changed between two steps, and how sure that is.

A change counts when it is larger than its minimum effect and larger than two standard errors over the probes (more
for few probes: Student's t).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from trl_dynamics.probing.schema import RANDOM, group_of
from trl_dynamics.tracking.metrics import PER_TOKEN, third_party_types, wide

# Smallest changes worth a word, nats per token. Typical runs move by 0.1 to 1; float32 noise is below 1e-4.
MIN_EFFECT = 0.05
STANDARD_ERRORS = 2.0
MIN_PROBES = 4

COUNTS = (
    f"a change counts when it exceeds both its threshold and {STANDARD_ERRORS:g} standard errors over probes "
    f"(more for few probes, by Student's t; at least {MIN_PROBES} probes)"
)


@dataclass(frozen=True)
class Effect:
    """Mean change over probes with its standard error; NaN where nothing could be paired."""

    mean: float
    se: float
    num_probes: int

    @property
    def known(self) -> bool:
        return self.num_probes > 0

    def up(self, minimum: float = MIN_EFFECT, standard_errors: float = STANDARD_ERRORS) -> bool:
        """Whether the mean rose by more than `minimum` and by more than its noise."""
        if self.num_probes < MIN_PROBES:
            return False
        return self.mean >= minimum and self.mean > _critical(standard_errors, self.num_probes) * self.se

    def down(self, minimum: float = MIN_EFFECT, standard_errors: float = STANDARD_ERRORS) -> bool:
        """Whether the mean fell by more than `minimum` and by more than its noise."""
        return Effect(-self.mean, self.se, self.num_probes).up(minimum, standard_errors)

    def __str__(self) -> str:
        digits = 2 if self.se >= 0.01 else 3
        return f"{self.mean:+.{digits}f} ± {self.se:.{digits}f}"


class Changes:
    """Paired changes between two steps of one run and model, as effects over probes."""

    def __init__(self, frame: pd.DataFrame, start: int | None = None, end: int | None = None):
        self.start = int(frame["step"].min()) if start is None else start
        self.end = int(frame["step"].max()) if end is None else end
        self.frame = frame[frame["step"].isin([self.start, self.end])]

    @cached_property
    def chosen(self) -> Effect:
        return self.of_types(["chosen"])

    @cached_property
    def rejected(self) -> Effect:
        return self.of_types(["rejected"])

    @cached_property
    def argmax(self) -> Effect:
        """Along chosen, the likeliest token, nats per token."""
        return self._of_chosen(lambda rows: rows["argmax_logp_sum"] / rows["num_tokens"])

    @cached_property
    def gap(self) -> Effect:
        """Along chosen, the likeliest token minus the chosen one, nats per token."""
        return clustered_effect(self.gap_delta)

    @cached_property
    def gap_delta(self) -> pd.DataFrame:
        """The change of the gap probe by probe: probes x 1."""
        return self._chosen_delta(lambda rows: (rows["argmax_logp_sum"] - rows["logp_sum"]) / rows["num_tokens"])

    @cached_property
    def entropy(self) -> Effect:
        return self._of_chosen(lambda rows: rows["entropy_mean"])

    @cached_property
    def eos(self) -> Effect:
        return self._of_chosen(lambda rows: rows["eos_logp"])

    @cached_property
    def third_parties(self) -> Effect:
        return self.of_types(third_party_types(self.frame))

    @cached_property
    def bystanders(self) -> Effect:
        """The third parties that are fluent text."""
        return self.of_types(bystander_types(self.frame))

    def of_types(self, types: Sequence[str], column: str = PER_TOKEN) -> Effect:
        """Mean over `types` of the mean over probes of the change of `column`; types nobody has are left out."""
        return clustered_effect(self.delta(types, column))

    def falling(self, types: Sequence[str]) -> list[str]:
        """Those of `types` that fell, each judged by itself."""
        return [name for name in types if self.of_types([name]).down()]

    def delta(self, types: Sequence[str], column: str = PER_TOKEN) -> pd.DataFrame:
        """The change of `column` probe by probe: probes x types, NaN where a probe lacks a type."""
        return self._delta(self.frame[self.frame["response_type"].isin(list(types))], column)

    def difference(self, first: str, second: str, column: str = PER_TOKEN) -> Effect:
        """Change of `first` minus change of `second`, on the probes that have both."""
        delta = self.delta([first, second], column)
        if not {first, second} <= set(delta.columns):
            return clustered_effect(pd.DataFrame())
        return clustered_effect((delta[first] - delta[second]).to_frame())

    def value_at_start(self, column: str, response_type: str = "chosen") -> float:
        """Mean over probes of `column` at the start."""
        frame = self.frame[(self.frame["step"] == self.start) & (self.frame["response_type"] == response_type)]
        return float(frame[column].mean())

    def _of_chosen(self, value: Callable[[pd.DataFrame], pd.Series]) -> Effect:
        return clustered_effect(self._chosen_delta(value))

    def _chosen_delta(self, value: Callable[[pd.DataFrame], pd.Series]) -> pd.DataFrame:
        rows = self.frame[self.frame["response_type"] == "chosen"]
        return self._delta(rows.assign(value=value(rows)), "value")

    def _delta(self, frame: pd.DataFrame, column: str) -> pd.DataFrame:
        table = wide(frame, column)
        if self.start not in table.index or self.end not in table.index:
            return pd.DataFrame()
        return (table.loc[self.end] - table.loc[self.start]).unstack("response_type")


def clustered_effect(delta: pd.DataFrame) -> Effect:
    """Mean over types of the mean over probes, with a standard error that knows a probe's types move together.

    Args:
        delta (`pandas.DataFrame`): probes x types, NaN where a probe lacks a type.
    """
    values = delta.to_numpy(dtype=float)
    present = ~np.isnan(values)
    values, present = values[:, present.any(axis=0)], present[:, present.any(axis=0)]
    num_probes = int(present.any(axis=1).sum())
    if num_probes == 0:
        return Effect(np.nan, np.nan, 0)
    means = np.nanmean(values, axis=0)
    share = np.where(present, (values - means) / present.sum(axis=0), 0.0).sum(axis=1) / len(means)
    correction = num_probes / (num_probes - 1) if num_probes > 1 else np.nan
    return Effect(float(means.mean()), float(np.sqrt(correction * (share**2).sum())), num_probes)


def bystander_types(frame: pd.DataFrame) -> list[str]:
    """Third-party types that are fluent text: paraphrases, unrelated answers and types of the user's own."""
    return [name for name in third_party_types(frame) if group_of(name) != RANDOM]


def _critical(standard_errors: float, num_probes: int) -> float:
    """How many standard errors give the normal law's error rate under Student's t (Cornish-Fisher expansion)."""
    z, dof = standard_errors, num_probes - 1
    return z + (z**3 + z) / (4 * dof) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * dof**2)
