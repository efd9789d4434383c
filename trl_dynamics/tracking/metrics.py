"""Squeezing metrics: where does probability go while a model learns, and which answers pay for it?

Input are the records of one run and one model (see [`tracking.records`]), nothing else. "Start" is the first recorded
step. Everything that is called a change is paired: a probe counts only where it was scored at both steps.

    frame   rows keyed by (step, probe_id, response_type), any order
    wide    a frame with one row per step and one column per (response_type, probe_id)
"""

from collections.abc import Callable, Iterable

import pandas as pd

from trl_dynamics.probing.schema import order_types

# Third parties are what training neither pushes up nor down by name. The model's own first answer is left out: it is
# close to what the model says anyway, and so often wins where the others lose.
NOT_THIRD_PARTY = ("chosen", "rejected", "chosen_initial")
QUANTILES = (0.1, 0.5, 0.9)

PER_TOKEN, PER_SEQUENCE = "logp_mean", "logp_sum"


def wide(frame: pd.DataFrame, column: str = PER_TOKEN, types: Iterable[str] | None = None) -> pd.DataFrame:
    """One column of the records as steps x (response_type, probe_id): every step of the frame, NaN where not scored.

    Args:
        frame (`pandas.DataFrame`): Records of one run and one model.
        column (`str`, *optional*): A value column of the records.
        types (`Iterable[str]`, *optional*): Response types to keep; by default all.

    Raises:
        ValueError: If the frame holds several runs or models.
    """
    for key in ("run", "model"):
        if key in frame and frame[key].nunique() > 1:
            found = sorted(frame[key].unique())
            raise ValueError(f"metrics need the records of one {key}, got {found}; select one first")
    steps = sorted(frame["step"].unique())
    if types is not None:
        frame = frame[frame["response_type"].isin(list(types))]
    table = frame.pivot(index="step", columns=["response_type", "probe_id"], values=column)
    return table.reindex(steps).sort_index(axis=1)


def change(table: pd.DataFrame) -> pd.DataFrame:
    """A [`wide`] table minus its first step, pair by pair; NaN where either step lacks the pair."""
    return table - table.iloc[0] if len(table) else table


def mean_by_type(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over the probes of a [`wide`] table: steps x response_type, the types in the usual order."""
    means = table.T.groupby(level="response_type").mean().T
    return means[order_types(means.columns)]


def path(frame: pd.DataFrame, column: str = PER_TOKEN) -> pd.DataFrame:
    """Mean over probes per response type: steps x response_type, in the column's unit (nats)."""
    return mean_by_type(wide(frame, column))


def change_since_start(frame: pd.DataFrame, column: str = PER_TOKEN) -> pd.DataFrame:
    """Mean over probes of (value now - value at the start), paired by probe: steps x response_type, nats.

    Differs from the difference of two [`path`] rows wherever a probe lacks a type at one of the steps.
    """
    return mean_by_type(change(wide(frame, column))).dropna(axis=1, how="all")


def bands(frame: pd.DataFrame, column: str = PER_TOKEN, *, since_start: bool = False) -> pd.DataFrame:
    """Mean and quantiles over probes, tidy: columns step, response_type, mean, q10, q50, q90, num_probes.

    Args:
        since_start (`bool`, *optional*): Describe the paired changes since the start instead of the values.
    """
    table = wide(frame, column)
    table = change(table) if since_start else table
    groups = table.T.groupby(level="response_type")
    parts = {"mean": groups.mean(), "num_probes": groups.count()}
    parts |= {f"q{round(100 * q)}": groups.quantile(q) for q in QUANTILES}
    tidy = pd.DataFrame({name: part.stack() for name, part in parts.items()}).reset_index()
    tidy["num_probes"] = tidy["num_probes"].astype(int)
    tidy = tidy[tidy["num_probes"] > 0]
    rank = {name: index for index, name in enumerate(order_types(tidy["response_type"]))}
    order = tidy["response_type"].map(rank)
    return tidy.assign(order=order).sort_values(["order", "step"], ignore_index=True).drop(columns="order")


def third_party_types(frame: pd.DataFrame) -> list[str]:
    """The response types that training does not touch by name: all but chosen, rejected and chosen_initial."""
    return [name for name in order_types(frame["response_type"]) if name not in NOT_THIRD_PARTY]


def argmax_logp(frame: pd.DataFrame) -> pd.Series:
    """Log-probability of the likeliest token along the chosen response, teacher-forced.

    mean over probes of [ sum over positions of max_v log pi(v | prompt, chosen prefix) ] / num_tokens, on `chosen`.

    Unit: nats per token, at most 0. Healthy: rises together with chosen. Suspicious: rises while chosen does not.
    """
    return _chosen_mean(frame, lambda rows: rows["argmax_logp_sum"] / rows["num_tokens"])


def argmax_minus_chosen(frame: pd.DataFrame) -> pd.Series:
    """How far the chosen token lies below the likeliest token, on average over the chosen response.

    mean over probes of (argmax_logp_sum - logp_sum) / num_tokens, on `chosen`.

    Unit: nats per token, at least 0. Healthy: constant or falling. Widening means that what gains is neither chosen.
    """
    return _chosen_mean(frame, lambda rows: (rows["argmax_logp_sum"] - rows["logp_sum"]) / rows["num_tokens"])


def drained_mass(frame: pd.DataFrame) -> pd.Series:
    """Probability that the rejected response's positions lost to y-, y* and nothing else, since the start.

    mean over probes of rest(start) - rest(now), rest = mean over positions of 1 - pi(y-) - pi(y*), on `rejected`;
    y* is the likeliest label besides y- at the baseline and stays the same one ever after.

    Unit: probability per position, in [-1, 1]. Healthy: about 0. Positive: every other label pays for y*.
    """
    return -_series(mean_by_type(change(wide(frame, "rest_mass_mean", ["rejected"]))), "rejected")


def third_party_logp(frame: pd.DataFrame) -> pd.Series:
    """What happened to the answers nobody trained on: mean change of their log-probability since the start.

    mean over third-party types of the mean over probes of logp_mean(now) - logp_mean(start).

    Unit: nats per token. Healthy: about 0, or rising a little with chosen. Falling: side effects on other answers.
    """
    changes = mean_by_type(change(wide(frame, PER_TOKEN, third_party_types(frame))))
    return changes.mean(axis=1).dropna()


def entropy(frame: pd.DataFrame) -> pd.Series:
    """Entropy of the next-token distribution along the chosen response.

    mean over probes of the mean over positions of - sum_v pi(v) log pi(v), on `chosen`.

    Unit: nats. Healthy: falls slowly. Halving within a run is a collapse: sampling will repeat itself.
    """
    return _chosen_mean(frame, lambda rows: rows["entropy_mean"])


def margin(frame: pd.DataFrame) -> pd.Series:
    """Growth of the preference margin since the start: DPO's reward margin over beta, if the start is pi_ref.

    mean over probes of [ logp_sum(chosen) - logp_sum(rejected) ](now) - [ same ](start).

    Unit: nats per sequence. Healthy: rises because chosen rises. Rising only because rejected falls is fragile.
    """
    both = wide(frame, PER_SEQUENCE, ["chosen", "rejected"])
    if both.columns.get_level_values("response_type").nunique() < 2:
        return pd.Series(dtype=float)
    return change(both["chosen"] - both["rejected"]).mean(axis=1).dropna()


def eos_logp(frame: pd.DataFrame) -> pd.Series:
    """Log-probability of the end-of-turn token right after the chosen response; cut responses do not count.

    mean over probes of eos_logp, on `chosen`.

    Unit: nats. Healthy: constant or rising. Falling: answers get longer, or never stop.
    """
    return _chosen_mean(frame, lambda rows: rows["eos_logp"])


def metric_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Every metric of [`METRICS`] whose response types the records have, tidy: columns metric, step, value."""
    rows = [
        {"metric": name, "step": int(step), "value": float(value)}
        for name, function in METRICS.items()
        for step, value in function(frame).items()
    ]
    return pd.DataFrame(rows, columns=["metric", "step", "value"])


def scalars(frame: pd.DataFrame) -> dict[str, float]:
    """The last step's values for trackers: `probe/<type>/logp_mean` (nats per token) and `squeeze/<metric>`.

    A metric whose response types are missing is left out.
    """
    steps = frame["step"]
    ends = frame[steps.isin([steps.min(), steps.max()])]
    means = path(ends).iloc[-1].dropna()
    values = {f"probe/{name.lower()}/logp_mean": float(value) for name, value in means.items()}
    for name, function in METRICS.items():
        series = function(ends)
        if len(series) and series.index[-1] == steps.max():
            values[f"squeeze/{name}"] = float(series.iloc[-1])
    return values


def _chosen_mean(frame: pd.DataFrame, value: Callable[[pd.DataFrame], pd.Series]) -> pd.Series:
    rows = frame[frame["response_type"] == "chosen"]
    return _series(mean_by_type(wide(rows.assign(value=value(rows)), "value")), "chosen")


def _series(table: pd.DataFrame, response_type: str) -> pd.Series:
    return table[response_type].dropna() if response_type in table else pd.Series(dtype=float)


METRICS: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "argmax_minus_chosen": argmax_minus_chosen,
    "argmax_logp": argmax_logp,
    "third_party_logp": third_party_logp,
    "drained_mass": drained_mass,
    "entropy": entropy,
    "margin": margin,
    "eos_logp": eos_logp,
}
