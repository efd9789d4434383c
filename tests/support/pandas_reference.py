"""Paths, changes, bands and metrics as pivots of the whole frame: slow, obvious, and what the fast ones must equal."""

import pandas as pd

from synthetic_runs import VOCAB_SIZE

THIRD_PARTIES_EXCEPT = ("chosen", "rejected", "chosen_initial")
NOT_FLUENT_OR_MEANT_TO_FALL = (
    *("chosen_permuted", "other_test_permuted", "random_words"),
    *("rejected_rephrase_semantic", "rejected_rephrase_format"),
)


def pivot(frame, column, types=None):
    """steps x (response_type, probe_id), every step of the frame, NaN where not scored."""
    steps = sorted(frame["step"].unique())
    kept = frame if types is None else frame[frame["response_type"].isin(types)]
    return kept.pivot(index="step", columns=["response_type", "probe_id"], values=column).reindex(steps)


def change(table):
    return table - table.iloc[0]


def by_type(table):
    """Mean over probes: steps x response_type."""
    return table.T.groupby(level="response_type").mean().T


def bands(frame, column, since_start):
    """{(step, type): (mean, num_probes, q10, q50, q90)} where at least one probe has a value."""
    table = change(pivot(frame, column)) if since_start else pivot(frame, column)
    found = {}
    for step, row in table.iterrows():
        for name, values in row.groupby(level="response_type"):
            known = values.dropna()
            if len(known):
                found[step, name] = (known.mean(), len(known), *known.quantile([0.1, 0.5, 0.9]))
    return found


def of_chosen(frame, value):
    return of_type(frame, "chosen", value)


def of_type(frame, name, value):
    rows = frame[frame["response_type"] == name]
    return pivot(rows.assign(value=value(rows)), "value").mean(axis=1)


def margin(frame):
    both = pivot(frame, "logp_sum")
    return change(both["chosen"] - both["rejected"]).mean(axis=1)


def third_party_logp(frame):
    types = set(frame["response_type"]) - set(THIRD_PARTIES_EXCEPT)
    return by_type(change(pivot(frame, "logp_mean", types))).mean(axis=1)


def other_fluent_logp(frame):
    types = set(frame["response_type"]) - set(THIRD_PARTIES_EXCEPT) - set(NOT_FLUENT_OR_MEANT_TO_FALL)
    return by_type(change(pivot(frame, "logp_mean", types))).mean(axis=1)


def residual(rows):
    return (1 - 2 * rows["prob_mean"] + rows["sum_sq_mean"]).clip(lower=0) ** 0.5


def normalizer(rows):
    return (VOCAB_SIZE - 2 + VOCAB_SIZE * rows["sum_sq_mean"]) ** 0.5


METRICS = {
    "argmax_logp": lambda f: of_chosen(f, lambda rows: rows["argmax_logp_sum"] / rows["num_tokens"]),
    "argmax_minus_chosen": lambda f: of_chosen(
        f, lambda rows: (rows["argmax_logp_sum"] - rows["logp_sum"]) / rows["num_tokens"]
    ),
    "entropy": lambda f: of_chosen(f, lambda rows: rows["entropy_mean"]),
    "eos_logp": lambda f: of_chosen(f, lambda rows: rows["eos_logp"]),
    "drained_mass": lambda f: -change(pivot(f, "rest_mass_mean", ["rejected"])).mean(axis=1),
    "margin": margin,
    "third_party_logp": third_party_logp,
    "other_fluent_logp": other_fluent_logp,
    "displacement": lambda f: change(pivot(f, "logp_mean", ["chosen"])).mean(axis=1),
    "miss_chosen": lambda f: of_chosen(f, lambda rows: 1 - rows["prob_mean"]),
    "residual_chosen": lambda f: of_chosen(f, residual),
    "residual_rejected": lambda f: of_type(f, "rejected", residual),
    "normalizer_chosen": lambda f: of_chosen(f, normalizer),
    "normalizer_rejected": lambda f: of_type(f, "rejected", normalizer),
}


def metric(frame, name) -> pd.Series:
    return METRICS[name](frame).dropna()
