"""What changed between two steps of a run, as effects over probes: chosen, the likeliest token, others, the gap."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from trl_dynamics.findings.effects import Effect, clustered_effect
from trl_dynamics.paths.metrics import (
    PER_TOKEN,
    argmax_per_token,
    bystander_types,
    gap_per_token,
    mean,
)
from trl_dynamics.paths.step_table import StepTable
from trl_dynamics.probing.schema import REPHRASE, group_of

# From here on a harmful displacement is an alert, by what chosen or other fluent answers lose; a squeeze, by its gap.
ALERT_EFFECT, ALERT_GAP = 0.1, 0.25
# What one type of other fluent answers loses, hard.
MIN_BYSTANDER_FALL = 0.25
# The likeliest token along chosen is likely from the start, and so has little to gain: 0.03 to 0.05 where plain DPO
# squeezes the embedded model after SFT.
MIN_ARGMAX_RISE = 0.02
# Share of the starting entropy whose loss is called a collapse.
ENTROPY_COLLAPSE = 0.5
# How rules name the group whose mean change is `Changes.bystanders`.
FLUENT = "other fluent answers (all but chosen, rejected, chosen_initial, shuffled words and paraphrases of rejected)"


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


def paraphrases_of_chosen(types: Iterable[str]) -> list[str]:
    """Those of `types` that say what chosen says, or in its form, in other words."""
    return [name for name in bystander_types(types) if name.startswith("chosen_") and group_of(name) == REPHRASE]
