"""Effects: how much a mean over probes changed between two steps, and how sure that is.

A change counts when it is larger than its minimum effect and larger than two standard errors over the probes (more
for few probes: Student's t).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from trl_dynamics.probing.schema import REPHRASE, group_of
from trl_dynamics.tracking.metrics import (
    PER_TOKEN,
    argmax_per_token,
    bystander_types,
    gap_per_token,
    mean,
    third_party_types,
)
from trl_dynamics.tracking.step_table import StepTable

# Smallest changes worth a word, nats per token. Typical runs move by 0.1 to 1; float32 noise is below 1e-4.
MIN_EFFECT = 0.05
# From here on a harmful displacement is an alert, by what chosen or other fluent answers lose; a squeeze, by its gap.
ALERT_EFFECT, ALERT_GAP = 0.1, 0.25
# What one type of other fluent answers loses, hard.
MIN_BYSTANDER_FALL = 0.25
# The likeliest token along chosen is likely from the start, and so has little to gain: 0.03 to 0.05 where plain DPO
# squeezes the embedded model after SFT.
MIN_ARGMAX_RISE = 0.02
# Share of the starting entropy whose loss is called a collapse.
ENTROPY_COLLAPSE = 0.5
STANDARD_ERRORS = 2.0
MIN_PROBES = 4

COUNTS = (
    f"a change counts when it exceeds both its threshold and {STANDARD_ERRORS:g} standard errors over probes "
    f"(more for few probes, by Student's t; at least {MIN_PROBES} probes)"
)

# How rules name the group whose mean change is `Changes.bystanders`.
FLUENT = "other fluent answers (all but chosen, rejected, chosen_initial, shuffled words and paraphrases of rejected)"


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
        if np.isnan(self.se):
            return f"{self.mean:+.2f} (one probe)" if self.known else "by an unknown amount"
        digits = 2 if self.se >= 0.01 else 3
        return f"{self.mean:+.{digits}f} ± {self.se:.{digits}f}"


@dataclass(frozen=True)
class Squeeze:
    """The four changes that make up squeezing, nats per token."""

    argmax: Effect
    gap: Effect
    chosen: Effect
    bystanders: Effect

    @property
    def holds(self) -> bool:
        """Whether likely tokens gained, chosen fell behind them without a gain, and it or fluent others lost."""
        gained = self.argmax.up(MIN_ARGMAX_RISE) and self.gap.up() and not self.chosen.up()
        return gained and (self.chosen.down() or self.bystanders.down())


class Changes:
    """Paired changes between two steps of one run and model, as effects over probes.

    Args:
        start ([`StepTable`]): The earlier step, in any layout.
        end ([`StepTable`]): The later one.
    """

    def __init__(self, start: StepTable, end: StepTable):
        self.start, self.end = start.step, end.step
        self._first, self._start, self._end = start, start.like(end), end

    @property
    def types(self) -> list[str]:
        """Response types of the later step."""
        return self._end.types

    @cached_property
    def chosen(self) -> Effect:
        return self.of_types(["chosen"])

    @cached_property
    def rejected(self) -> Effect:
        return self.of_types(["rejected"])

    @cached_property
    def argmax(self) -> Effect:
        """Along chosen, the likeliest token, nats per token."""
        return clustered_effect(self._delta(argmax_per_token))

    @cached_property
    def gap(self) -> Effect:
        """Along chosen, the likeliest token minus the chosen one, nats per token."""
        return clustered_effect(self._delta(gap_per_token))

    @cached_property
    def entropy(self) -> Effect:
        return clustered_effect(self._delta(lambda step: step.row("chosen", "entropy_mean")))

    @cached_property
    def entropy_collapsed(self) -> bool:
        """Whether the next-token distribution along chosen lost [`ENTROPY_COLLAPSE`] of its entropy."""
        return self.entropy.down(ENTROPY_COLLAPSE * self.value_at_start("entropy_mean"))

    @cached_property
    def eos(self) -> Effect:
        return clustered_effect(self._delta(lambda step: step.row("chosen", "eos_logp")))

    @cached_property
    def third_parties(self) -> Effect:
        return self.of_types(third_party_types(self.types))

    @cached_property
    def bystanders(self) -> Effect:
        """Other fluent answers: what the metric `other_fluent_logp` is the mean of."""
        return self.of_types(bystander_types(self.types))

    @cached_property
    def num_finite(self) -> tuple[int, int]:
        """How many probes have an answer that is finite at both steps, and how many the later step has."""
        changed = self._end.values(PER_TOKEN) - self._start.values(PER_TOKEN)
        return int((~np.isnan(changed)).any(axis=0).sum()), len(self._end.probe_ids)

    @property
    def squeeze(self) -> Squeeze:
        return Squeeze(self.argmax, self.gap, self.chosen, self.bystanders)

    def of_types(self, types: Sequence[str], column: str = PER_TOKEN) -> Effect:
        """Mean over `types` of the mean over probes of the change of `column`; types nobody has are left out."""
        return clustered_effect(self._delta_of(types, column))

    def falling(self, types: Sequence[str]) -> list[str]:
        """Those of `types` that fell, each judged by itself."""
        return [name for name in types if self.of_types([name]).down()]

    def delta(self, types: Sequence[str], column: str = PER_TOKEN) -> pd.DataFrame:
        """The change of `column` probe by probe: probes x types, NaN where a probe lacks a type."""
        return pd.DataFrame(self._delta_of(types, column), self._end.probe_ids.to_pandas(), list(types))

    def gap_delta(self) -> pd.DataFrame:
        """The change of the gap probe by probe: probes x 1."""
        return pd.DataFrame(self._delta(gap_per_token), self._end.probe_ids.to_pandas())

    def difference(self, first: str, second: str, column: str = PER_TOKEN) -> Effect:
        """Change of `first` minus change of `second`, on the probes that have both."""
        delta = self._delta_of([first, second], column)
        return clustered_effect(delta[:, :1] - delta[:, 1:])

    def value_at_start(self, column: str, response_type: str = "chosen") -> float:
        """Mean over probes of `column` at the start."""
        return mean(self._first.row(response_type, column))

    def _delta_of(self, types: Sequence[str], column: str) -> np.ndarray:
        rows = [self._end.row(name, column) - self._start.row(name, column) for name in types]
        return np.stack(rows, axis=1) if rows else np.empty((len(self._end.probe_ids), 0))

    def _delta(self, value: Callable[[StepTable], np.ndarray]) -> np.ndarray:
        return (value(self._end) - value(self._start))[:, None]


def clustered_effect(delta: np.ndarray | pd.DataFrame) -> Effect:
    """Mean over types of the mean over probes, with a standard error that knows a probe's types move together.

    A probe's share in the mean's error is sum_t r_pt / sqrt(n_t (n_t - 1)) / T, r_pt what is left of the mean of type
    t over its n_t probes; squares of shares are added (CR2 of cluster-robust variances, exact for unrelated types),
    and multiplied by what they miss for types that move together. Without holes that is s / sqrt(n) of the probes'
    means. NaN where no type has two probes.

    Args:
        delta: probes x types, NaN where a probe lacks a type.
    """
    values = np.asarray(delta, dtype=float)
    present = ~np.isnan(values)
    values, present = values[:, present.any(axis=0)], present[:, present.any(axis=0)]
    num_probes = int(present.any(axis=1).sum())
    if num_probes == 0:
        return Effect(np.nan, np.nan, 0)
    counts = present.sum(axis=0)
    means = np.where(present, values, 0.0).sum(axis=0) / counts
    left = np.where(present, values - means, 0.0)
    repeated = counts > 1
    if not repeated.any():
        return Effect(float(means.mean()), np.nan, num_probes)
    scale = np.sqrt(counts * (counts - 1.0))
    share = (left[:, repeated] / scale[repeated]).sum(axis=1) / len(means)
    variance = _missed(left, present, counts, scale) * (share**2).sum()
    return Effect(float(means.mean()), float(np.sqrt(variance)), num_probes)


def _missed(left: np.ndarray, present: np.ndarray, counts: np.ndarray, scale: np.ndarray) -> float:
    """The variance of the mean over the expected sum of squared shares, for types of one variance and correlation.

    Of types s and t with n_st probes in common, residuals' products add up to their covariance times
    k_st = n_st (1 - 1/n_s - 1/n_t + n_st / (n_s n_t)) on average, which also tells the correlation. Types with one
    probe have no residuals; they are taken to vary as the others do.
    """
    common = present.T.astype(float) @ present
    expected = common * (1 - 1 / counts[:, None] - 1 / counts) + common**2 / np.outer(counts, counts)
    of_mean = common / np.outer(counts, counts)
    repeated, same = counts > 1, np.eye(len(counts), dtype=bool)
    seen, scales = np.outer(repeated, repeated), np.outer(scale, scale)
    of_shares = np.divide(expected, scales, out=np.zeros_like(expected), where=seen)
    products, others = left.T @ left, seen & ~same
    variance = products[same].sum() / expected[same].sum()
    pairs = expected[others].sum()
    covariance = products[others].sum() / pairs if pairs > 0 else 0.0
    correlation = min(max(covariance / variance, 0.0), 1.0) if variance > 0 else 0.0
    true, found = (v[same].sum() + correlation * v[~same].sum() for v in (of_mean, of_shares))
    return float(true / found)


def paraphrases_of_chosen(types: Iterable[str]) -> list[str]:
    """Those of `types` that say what chosen says, or in its form, in other words."""
    return [name for name in bystander_types(types) if name.startswith("chosen_") and group_of(name) == REPHRASE]


def _critical(standard_errors: float, num_probes: int) -> float:
    """How many standard errors give the normal law's error rate under Student's t (Cornish-Fisher expansion)."""
    z, dof = standard_errors, num_probes - 1
    return z + (z**3 + z) / (4 * dof) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * dof**2)
