"""Greedy answers over a run: what they look like at every step, as numbers for trackers, findings and the report.

The teacher-forced argmax of [`paths.metrics`] asks what the model finds likeliest along an answer that it is given;
these answers are free-running: the model reads its own tokens, as it does when somebody uses it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from trl_dynamics.drawing.terms import Metric, described
from trl_dynamics.findings.effects import Effect, clustered_effect
from trl_dynamics.paths.changes import ENTROPY_COLLAPSE
from trl_dynamics.paths.kinds import SAMPLES
from trl_dynamics.paths.metrics import mean
from trl_dynamics.store.store import DynamicsStore, read_runs

# What is read of every step; ids and texts are for those who ask for them.
NUMBERS = ["num_tokens", "ended", *SAMPLES.values]
# Every metric by its name, in the order of pages and tables.
SAMPLE_METRICS: dict[str, Metric] = {}


@described(
    SAMPLE_METRICS,
    title="distinct-2",
    meaning="How varied the model's own answers are: different pairs among all pairs of neighbouring tokens.",
    formula="mean over probes of distinct pairs / pairs",
    unit="share, 0 to 1",
    healthy="above 0.9 for answers of some dozen tokens; below a half the answers are loops",
)
def distinct_2(rows: pd.DataFrame) -> float:
    return _mean(rows, "distinct_2")


@described(
    SAMPLE_METRICS,
    title="longest repeat",
    meaning="The longest run of tokens that an answer says twice; the two may overlap.",
    formula="mean over probes of max { l : the same l tokens stand at two places }",
    unit="tokens",
    healthy="a few; near the answer's length it is a loop",
)
def longest_repeat(rows: pd.DataFrame) -> float:
    return _mean(rows, "longest_repeat")


@described(
    SAMPLE_METRICS,
    title="immediate repetition",
    meaning="Tokens of an answer in a run that stands right after itself, such as “very very”.",
    formula="mean over probes of tokens in such runs / tokens",
    unit="share, 0 to 1",
    healthy="below 0.1; near 1 the answers are loops",
)
def repeat_share(rows: pd.DataFrame) -> float:
    return _mean(rows, "repeat_share")


@described(
    SAMPLE_METRICS,
    title="same answer to different prompts",
    meaning="How often two different prompts are answered with the very same tokens.",
    formula="mean over probes of (other prompts with the same answer) / (other prompts)",
    unit="share, 0 to 1",
    healthy="0 where prompts ask different things; rising means that the model falls back on a phrase",
)
def same_share(rows: pd.DataFrame) -> float:
    return _mean(rows, "same_share")


@described(
    SAMPLE_METRICS,
    title="length of answers",
    meaning="Tokens of an answer, without the end-of-turn token.",
    formula="mean over probes of tokens",
    unit="tokens, at most probe_sample_tokens",
    healthy="near that of the training answers; at the limit answers never end",
)
def length(rows: pd.DataFrame) -> float:
    return _mean(rows, "num_tokens")


@described(
    SAMPLE_METRICS,
    title="answers that end",
    meaning="Answers that the model ended by itself; the others were cut.",
    formula="mean over probes of [ended]",
    unit="share, 0 to 1",
    healthy="constant or rising, if the limit leaves room for a usual answer",
)
def ended(rows: pd.DataFrame) -> float:
    return _mean(rows, "ended")


@described(
    SAMPLE_METRICS,
    title="greedy log-probability",
    meaning="How sure the model is of what it says itself, reading its own tokens; argmax along chosen reads chosen.",
    formula="mean over probes of Σ max_v log π(v | prompt, own tokens) / tokens",
    unit="nats per token",
    healthy="rises slowly; loops are nearly certain once they have begun, so near 0 is a warning",
)
def greedy_logp(rows: pd.DataFrame) -> float:
    return _mean(rows, "logp_mean")


@described(
    SAMPLE_METRICS,
    title="greedy log-probability of the answer",
    meaning="The same, summed over the answer.",
    formula="mean over probes of Σ max_v log π(v | prompt, own tokens)",
    unit="nats per answer",
    healthy="moves with the length of the answers",
)
def greedy_logp_sum(rows: pd.DataFrame) -> float:
    return _mean(rows, "logp_sum")


@described(
    SAMPLE_METRICS,
    title="distinct-1",
    meaning="Different tokens among all tokens of an answer.",
    formula="mean over probes of distinct tokens / tokens",
    unit="share, 0 to 1",
    healthy="constant at about equal length",
)
def distinct_1(rows: pd.DataFrame) -> float:
    return _mean(rows, "distinct_1")


@described(
    SAMPLE_METRICS,
    title="distinct-3",
    meaning="Different triples among all triples of neighbouring tokens.",
    formula="mean over probes of distinct triples / triples",
    unit="share, 0 to 1",
    healthy="near 1",
)
def distinct_3(rows: pd.DataFrame) -> float:
    return _mean(rows, "distinct_3")


def sample_scalars(rows: pd.DataFrame) -> dict[str, float]:
    """`samples/<metric>` of the answers of one step, for trackers; what no answer has is left out.

    Means are over finite answers, those whose tokens all have a finite log-probability: another one was not chosen by
    the model. Where none is finite the keys stay, with NaN. `samples/not_finite` is the share of the others.
    """
    lost, finite = not_finite(rows), finite_only(rows)
    values = {f"samples/{name}": metric(finite) for name, metric in SAMPLE_METRICS.items()}
    known = {key: value for key, value in values.items() if lost.any() or not np.isnan(value)}
    return known | {"samples/not_finite": float(lost.mean())}


def not_finite(rows: pd.DataFrame) -> pd.Series:
    """Which answers have a token without a finite log-probability: the model's logits were NaN or infinite there."""
    ended_at_once = rows["ended"] & (rows["num_tokens"] == 0) & ~np.isfinite(rows["eos_logp"])
    return ended_at_once | ~np.isfinite(rows["logp_sum"])


def finite_only(rows: pd.DataFrame) -> pd.DataFrame:
    """The same rows, with NaN in all numbers of answers that are not finite."""
    lost = not_finite(rows)
    if not lost.any():
        return rows
    return rows.assign(**{name: rows[name].astype(float).where(~lost) for name in NUMBERS})


@dataclass(frozen=True)
class Samples:
    """The numbers of one run and model's greedy answers.

    Args:
        rows (`pandas.DataFrame`): One per (step, probe_id), with the columns [`NUMBERS`]; at least one.
        read (`Callable[[set[int]], pandas.DataFrame]`, *optional*): All columns at some steps, texts among them.
    """

    rows: pd.DataFrame
    read: Callable[[set[int]], pd.DataFrame] | None = None

    @cached_property
    def finite(self) -> pd.DataFrame:
        """The rows that every number here is computed from: NaN where an answer is not finite."""
        return finite_only(self.rows)

    @cached_property
    def not_finite(self) -> dict[int, tuple[int, int]]:
        """Per step, how many answers are not finite, and how many were taken."""
        lost = not_finite(self.rows).groupby(self.rows["step"])
        return {int(step): (int(own.sum()), len(own)) for step, own in lost}

    @cached_property
    def steps(self) -> list[int]:
        """Steps with answers, ascending."""
        return sorted(int(step) for step in self.rows["step"].unique())

    def metric(self, name: str) -> pd.Series:
        """One of [`SAMPLE_METRICS`] over the steps that have it."""
        values = {step: SAMPLE_METRICS[name](rows) for step, rows in self.finite.groupby("step")}
        return pd.Series(values, dtype=float).dropna()

    def metric_table(self) -> pd.DataFrame:
        """Every metric under its name for trackers, tidy: columns metric, step, value."""
        tables = [
            pd.DataFrame({"metric": f"samples/{name}", "step": curve.index, "value": curve.to_numpy()})
            for name, curve in ((name, self.metric(name)) for name in SAMPLE_METRICS)
        ]
        return pd.concat(tables, ignore_index=True)

    def change(self, column: str) -> Effect:
        """Change of a column from the first to the last step, paired by probe."""
        start, end = (self._at(step).set_index("probe_id")[column] for step in self._ends)
        return clustered_effect((end - start.reindex(end.index)).to_frame())

    def value(self, name: str) -> tuple[float, float]:
        """One of [`SAMPLE_METRICS`] at the first and at the last step."""
        start, end = (SAMPLE_METRICS[name](self._at(step)) for step in self._ends)
        return start, end

    @property
    def grew_sure(self) -> bool:
        """Whether -log-probability per token of greedy answers lost [`effects.ENTROPY_COLLAPSE`] of its start."""
        return self.change("logp_mean").up(-ENTROPY_COLLAPSE * self.value("greedy_logp")[0])

    def _at(self, step: int) -> pd.DataFrame:
        return self.finite[self.finite["step"] == step]

    @property
    def _ends(self) -> tuple[int, int]:
        return self.steps[0], self.steps[-1]


def summarise_samples(store: DynamicsStore) -> dict[str, Samples]:
    """The numbers of a store's greedy answers by model; empty where none were taken."""
    frame = store.read(SAMPLES, columns=NUMBERS)

    def reading(model: str) -> Callable[[set[int]], pd.DataFrame]:
        def read(steps: set[int]) -> pd.DataFrame:
            whole = store.read(SAMPLES, steps)
            return whole[whole["model"] == model]

        return read

    return {str(model): Samples(rows, reading(str(model))) for model, rows in frame.groupby("model", sort=False)}


def load_samples(*output_dirs: str | Path) -> pd.DataFrame:
    """Greedy answers of one or more runs as one frame, unique by (run, model, step, probe_id).

    Args:
        output_dirs: Runs' output directories (or their `dynamics/` folders).

    Returns:
        `pandas.DataFrame`: The columns of [`paths.kinds.SAMPLES`] with `run` in front; no rows where the
        runs were not asked for answers (`probe_samples`).

    Raises:
        ValueError: If a folder is no run.
    """
    return read_runs("load_samples", output_dirs, lambda store: store.read(SAMPLES))


def _mean(rows: pd.DataFrame, column: str) -> float:
    return mean(rows[column].to_numpy(dtype=float))
