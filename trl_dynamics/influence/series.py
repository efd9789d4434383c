"""Recorded influence over time: does its ranking of pairs hold still, does its sum explain what was learnt?"""

import numpy as np
import pandas as pd

from trl_dynamics.influence.kind import BATCH
from trl_dynamics.statistics import Stability, rank_stability

EVERY_STEP, SAMPLED = "every step", "sampled"


def influence_stability(frame: pd.DataFrame, *, seed: int = 0) -> Stability:
    """How far the ranking of (update, probe, response type) by predicted change per token holds over recorded steps.

    Only hypothetical updates count, since they are the same at every step, and only pairs that every step has; the
    bootstrap draws probes. What moves is A K G as a whole, with the optimiser's scaling, not K alone.

    Args:
        frame (`pd.DataFrame`): Of one model: `step`, `update`, `probe_id`, `response_type`, `num_tokens`,
            `predicted_sum`; give a part of it to rank within one update.
        seed (`int`): Of the bootstrap.

    Raises:
        ValueError: If columns are missing, no hypothetical update or fewer than 2 steps were recorded, or rows repeat.
    """
    keys = ["update", "probe_id", "response_type"]
    _check(frame, ["step", *keys, "num_tokens", "predicted_sum"])
    fixed = frame[(frame["update"] != BATCH) & (frame["num_tokens"] > 0)]
    if fixed.empty:
        raise ValueError("only the steps' own batches were recorded, which differ; name fixed updates in akg_updates")
    table = _per_token(fixed, "predicted_sum").set_axis(pd.MultiIndex.from_frame(fixed[["step", *keys]]))
    if table.index.has_duplicates:
        raise ValueError("a step has an update's influence on an answer twice; give the rows of one model and run")
    table = table.unstack("step").dropna().sort_index(axis=1)
    return rank_stability(dict(table.items()), [table.index.get_level_values("probe_id")], seed=seed)


def accumulated_influence(frame: pd.DataFrame) -> pd.DataFrame:
    """The sum of predicted changes along a run beside what was observed (the thesis' accumulated influence).

    Rows of the steps' own batches alone are used. Numbers are means over probes, nats per token, summed over the
    recorded steps from the first to this one.

    Args:
        frame (`pd.DataFrame`): `model`, `step` (optimiser steps done before it), `update`, `probe_id`,
            `response_type`, `num_tokens`, `predicted_sum`, `true_sum`, and `logp_sum` for `path`.

    Returns:
        A row per model, response type and recorded step: `step` (optimiser steps done after it), `predicted` and
        `observed`, the changes in these very steps; `path`, the change from before the first recorded step to after
        this one, steps without a record included (NaN without `logp_sum`); `coverage`, `"every step"` or, where some
        between the first and this one have no record, `"sampled"`: then the first two are a part of the path.

    Raises:
        ValueError: If columns or values are missing, or rows repeat.
    """
    keys = ["model", "response_type", "step"]
    _check(frame, [*keys, "update", "probe_id", "num_tokens", "predicted_sum", "true_sum"])
    taken = frame[(frame["update"] == BATCH) & (frame["num_tokens"] > 0)]
    if taken[["predicted_sum", "true_sum"]].isna().any(axis=None):
        raise ValueError("a step's own batch has no predicted or no true change; give the rows as they were recorded")
    if taken.duplicated([*keys, "probe_id"]).any():
        raise ValueError("a step has an answer twice; give the rows of one run")
    values = {"predicted": _per_token(taken, "predicted_sum"), "observed": _per_token(taken, "true_sum")}
    values["before"] = _per_token(taken, "logp_sum") if "logp_sum" in taken else np.nan
    means = taken[keys].assign(**values).groupby(keys, sort=True).mean()
    columns = [*keys, "predicted", "observed", "path", "coverage"]
    found = [
        _accumulated(rows.droplevel([0, 1])).assign(model=model, response_type=response_type)
        for (model, response_type), rows in means.groupby(level=[0, 1])
    ]
    return pd.concat(found, ignore_index=True)[columns] if found else pd.DataFrame(columns=columns)


def _accumulated(means: pd.DataFrame) -> pd.DataFrame:
    step_S = means.index.to_numpy()
    whole_S = step_S - step_S[0] == np.arange(len(step_S))
    sums = means[["predicted", "observed"]].cumsum()
    path_S = means["before"] + means["observed"] - means["before"].iloc[0]
    coverage_S = np.where(whole_S, EVERY_STEP, SAMPLED)
    return sums.assign(step=step_S + 1, path=path_S, coverage=coverage_S)


def _per_token(frame: pd.DataFrame, column: str) -> pd.Series:
    return frame[column] / frame["num_tokens"]


def _check(frame: pd.DataFrame, columns: list[str]) -> None:
    if missing := [name for name in columns if name not in frame]:
        raise ValueError(f"the frame has no column {missing[0]!r}; expected {', '.join(columns)}")
