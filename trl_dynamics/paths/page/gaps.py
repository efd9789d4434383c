"""Values that are not finite: at which steps, of how many answers, and how the page and its charts say so."""

import numpy as np
import pandas as pd

from trl_dynamics.drawing.spec import finite
from trl_dynamics.paths.metrics import METRICS, PER_TOKEN
from trl_dynamics.paths.summary import Summary


def bands(summary: Summary, column: str = PER_TOKEN, *, since_start: bool = False) -> pd.DataFrame:
    """[`Summary.bands`] by step and type, with a row wherever a type was scored; NaN where nothing is finite."""
    scored = [(part.step, name) for name in summary.types for part in summary.parts if name in part.types]
    found = summary.bands(column, since_start=since_start).set_index(["step", "response_type"])
    found = finite(found.reindex(pd.MultiIndex.from_tuples(scored, names=found.index.names)))
    return found.assign(num_probes=found["num_probes"].fillna(0).astype(int))


def curve(summary: Summary, name: str) -> pd.Series:
    """One metric of [`paths.metrics.METRICS`] at every recorded step; NaN where it is not finite."""
    return finite(summary.metric(name).reindex(summary.steps))


def metric_table(summary: Summary) -> pd.DataFrame:
    """Every metric that has a value, tidy: columns metric, step, value, the latter NaN where it is not finite."""
    curves = {name: curve(summary, name) for name in METRICS}
    known = {name: values for name, values in curves.items() if values.notna().any()}
    tables = [pd.DataFrame({"metric": n, "step": v.index, "value": v.to_numpy()}) for n, v in known.items()]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["metric", "step", "value"])


def scored_answers(summary: Summary) -> dict[str, int]:
    """Response type -> how many answers of it are scored, finite or not."""
    first = summary.first
    return dict(zip(first.types, (~np.isnan(first.values("num_tokens"))).sum(axis=1).tolist(), strict=True))


def lost_answers(summary: Summary) -> dict[int, int]:
    """Steps at which answers are not finite -> how many of them."""
    return {part.step: part.not_finite[0] for part in summary.parts if part.not_finite[0]}


def remark(summary: Summary) -> str:
    """What a chart's title adds where values are not finite: from which step on, or at how many steps; else empty."""
    lost = list(lost_answers(summary))
    return f"; values not all finite {_where(summary, lost)}" if lost else ""


def note(summary: Summary) -> str:
    """The same in sentences, for the page; empty where every value is finite."""
    lost = lost_answers(summary)
    if not lost:
        return ""
    steps = list(lost)
    most, of = max(lost.values()), max(scored for _, scored in (part.not_finite for part in summary.parts))
    up_to = "up to " if min(lost.values()) < most else ""
    text = f"Not finite: {_where(summary, steps)}, {up_to}{most:,} of {of:,} answers have no finite log-probability. "
    text += "Means are over the finite values; charts have a gap where there is none."
    if steps[0] == summary.steps[0]:
        text += " What is not finite at the start has no change since then: choose log-probability per token above."
    return text


def _where(summary: Summary, lost: list[int]) -> str:
    """`from step 2 on`, `at step 2` or `at 3 of 9 steps from step 2 on`."""
    since = [step for step in summary.steps if step >= lost[0]]
    if len(summary.steps) == 1 or (len(lost) == 1 < len(since)):
        return f"at step {lost[0]:,}"
    if lost == since:
        return f"from step {lost[0]:,} on"
    return f"at {len(lost):,} of {len(summary.steps):,} steps, the first of them step {lost[0]:,}"
