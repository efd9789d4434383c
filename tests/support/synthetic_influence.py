"""Influence as a training run would record it, from a few numbers: for tests of everything that reads it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from synthetic_runs import meta, probe_set, records
from trl_dynamics.influence.kind import INFLUENCE
from trl_dynamics.influence.summary import InfluenceSummary
from trl_dynamics.paths.records import probe_set_files
from trl_dynamics.store.store import DynamicsStore

TYPES = ("chosen", "rejected", "other_test")
UPDATES = ("batch", "chosen", "rejected")
STEPS = (0, 10, 20, 30)


def influence(
    *,
    error: float | Callable[[int], float] = 0.02,
    drift: float = 0.0,
    size: float = 1e-3,
    momentum: float = 0.25,
    types: Sequence[str] = TYPES,
    updates: Sequence[str] = UPDATES,
    steps: Sequence[int] = STEPS,
    num_probes: int = 12,
    num_tokens: int = 6,
    model: str = "policy",
    seed: int = 0,
) -> pd.DataFrame:
    """Rows of one model; what an update does to an answer differs by both, and by token.

    Args:
        error: Of the first order, relative, over all answers of a step; may depend on the step.
        drift: How much of an influence is drawn anew between two recorded steps, 0 to 1.
        size: Standard deviation of the predicted changes, nats per token.
        momentum: Share of the batch's step that its momentum makes; NaN for an optimiser without parts.
    """
    rng = np.random.default_rng(seed)
    answers = [(f"p{index:03d}", name) for index in range(num_probes) for name in types]
    shape = (len(updates), len(answers), num_tokens)
    change = size * rng.standard_normal((*shape[:2], 1)) + 0.3 * size * rng.standard_normal(shape)
    rows = []
    for step in steps:
        wrong = error(step) if callable(error) else error
        noise = rng.standard_normal(shape[1:])
        sums = change[0].sum(axis=1), noise.sum(axis=1)
        # Of the true changes' sums, so that the relative error over answers is `wrong` to first order.
        noise *= wrong * np.linalg.norm(sums[0]) / np.linalg.norm(sums[1])
        for update, changes in zip(updates, change, strict=True):
            actual = update == "batch"
            for (probe_id, name), predicted, extra in zip(answers, changes, noise, strict=True):
                total = predicted.sum()
                rows.append(
                    {
                        "model": model,
                        "step": step,
                        "update": update,
                        "probe_id": probe_id,
                        "response_type": name,
                        "num_tokens": num_tokens,
                        "logp_sum": -2.0 * num_tokens,
                        "predicted_sum": total,
                        "update_sum": (1 - momentum) * total if actual else total,
                        "momentum_sum": momentum * total if actual else np.nan,
                        "decay_sum": 0.0 * momentum if actual else np.nan,
                        "error_sum": np.nan,
                        "true_sum": (predicted + extra).sum() if actual else np.nan,
                        "force_norm": np.nan,
                        "grad_norm": 1.0,
                        "lr": 1e-5,
                        "token_ids": list(range(num_tokens)),
                        "predicted": predicted.tolist(),
                        "true": (predicted + extra).tolist() if actual else [],
                    }
                )
        change = (1 - drift) * change + drift * size * rng.standard_normal((*shape[:2], 1))
    return pd.DataFrame(rows)


def set_value(frame: pd.DataFrame, rows: pd.Series, column: str, value: float) -> pd.DataFrame:
    """A copy in which `column`, `"predicted"` or `"true"`, is `value` in all tokens of these rows, and in the sum."""
    frame = frame.copy()
    frame.loc[rows, f"{column}_sum"] = value
    lists = [[value] * len(old) if hit else old for old, hit in zip(frame[column], rows, strict=True)]
    frame[column] = pd.Series(lists, frame.index)
    return frame


def write_influence(folder: Path, frame: pd.DataFrame, texts: list[list[str]] | None = None) -> Path:
    """Write `frame` into a run's store, a file per step; by default a token's text is its id after a blank and a t."""
    texts = texts or [[f" t{token}" for token in tokens] for tokens in frame["token_ids"]]
    names = INFLUENCE.schema.names
    # A column that is not set here is one that an exact, dense step has no value for.
    for _, rows in frame.assign(token_texts=texts).reindex(columns=names).groupby("step"):
        table = INFLUENCE.table({name: rows[name].tolist() for name in names})
        DynamicsStore(folder).write(int(rows["step"].iloc[0]), {INFLUENCE: table})
    return folder


def write_alone(folder: Path, frame: pd.DataFrame) -> Path:
    """Write `frame` as a run that tracked no probe set and recorded influence alone."""
    scored = records(types=[*frame["response_type"].unique()], num_probes=frame["probe_id"].nunique(), steps=[0])
    probes = probe_set(scored)
    DynamicsStore(folder).create(meta(scored, probes), {}, probe_set_files(probes))
    return write_influence(folder, frame)


def summary_of(frame: pd.DataFrame, dtype: str = "float32") -> InfluenceSummary:
    """What is read of a run that recorded `frame`."""
    return InfluenceSummary(frame["step"].unique(), lambda step, columns=None: frame[frame["step"] == step], dtype)
