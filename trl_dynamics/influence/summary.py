"""What recorded influence says, read one step at a time: means by type, the error of the first order, what ranks hold.

Everything is per token of an answer, in nats, so that long answers count as short ones do.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import pandas as pd

from trl_dynamics.influence.kind import BATCH, INFLUENCE
from trl_dynamics.probing.schema import order_types
from trl_dynamics.statistics import Agreement, rank_agreement, weighted_spearman
from trl_dynamics.store.store import DynamicsStore

# What of a step does it -> its column: this batch's gradient, the optimiser's memory of earlier ones, weight decay.
PARTS = {"gradient": "update_sum", "momentum": "momentum_sum", "decay": "decay_sum"}
SUMS = {"logp": "logp_sum", "predicted": "predicted_sum", "true": "true_sum", "slack": "error_sum"} | PARTS
# Read of every step; what each token does is read of few.
COLUMNS = ("num_tokens", "lr", *SUMS.values())
# Every type of answer together.
ALL = ""
# Bounds of what is compared by rank: stretches between neighbours, steps of the matrix, pairs, bootstrap resamples.
MAX_STRETCHES, MAX_MATRIX, MAX_PAIRS, NUM_RESAMPLES = 40, 12, 2000, 200
# Standard deviation of a token's measured change that is rounding alone, nats, by the dtype of the weights: the
# embedded model's and stories260k's against float64, rounded up. Tokens are independent.
ROUNDING = {"float64": 0.0, "float32": 4e-6, "float16": 6e-3, "bfloat16": 5e-2}


class InfluenceSummary:
    """Recorded influence of one model of a run; what is asked for is read then, never all rows at once.

    Args:
        steps (`Sequence[int]`): The recorded steps, each the number of optimiser steps done before.
        read (`Callable`): The rows of one step, with [`COLUMNS`] or the columns asked for.
        dtype (`str`, *optional*): What the true changes were computed in; tells how much of them is rounding.
    """

    def __init__(self, steps: Sequence[int], read: Callable[..., pd.DataFrame], dtype: str = "float32"):
        self.steps, self.read, self.dtype = sorted(int(step) for step in steps), read, dtype

    @cached_property
    def updates(self) -> list[str]:
        """The batch first, then the hypothetical updates in the usual order of types."""
        found = {*self.means["update"]}
        return [*(name for name in (BATCH,) if name in found), *order_types(found - {BATCH})]

    @cached_property
    def types(self) -> list[str]:
        return order_types(set(self.means["response_type"]))

    @cached_property
    def num_probes(self) -> int:
        """Probes observed at the last step."""
        return self.read(self.steps[-1])["probe_id"].nunique()

    @property
    def means(self) -> pd.DataFrame:
        """Per step, update and response type: mean of `predicted`, `true` and `logp` over answers, `num_answers`."""
        return self._tables[0]

    @property
    def errors(self) -> pd.DataFrame:
        """Per step and response type ([`ALL`]: all together) of the batch: `error`, `rounding`, `moved`.

        error = ||predicted - true|| / ||true|| over the `num_answers`; rounding is what it would be from rounding
        alone, of derivatives that were not computed exactly too; moved = ||true||, nats per token.
        """
        return self._tables[1]

    @property
    def parts(self) -> pd.DataFrame:
        """Per step: root mean square over answers of what the batch's step and each part of it do, and `lr`."""
        return self._tables[2]

    @property
    def not_finite(self) -> pd.Series:
        """Steps with changes that are NaN or infinite -> how many answers have one, over all updates.

        Means and errors are of the finite ones.
        """
        return self._tables[3]

    @cached_property
    def stretches(self) -> pd.DataFrame:
        """Spearman's correlation of the fixed updates' influence between neighbouring recorded steps.

        Columns: before, after, value, low, high (95 % bootstrap interval over probes). Evenly spaced stretches where
        there are more than [`MAX_STRETCHES`]; empty without a fixed update.
        """
        rows, known = [], {}
        for index in _spaced(len(self.steps) - 1, MAX_STRETCHES):
            before, after = self.steps[index : index + 2]
            known = {step: known[step] if step in known else self._ranked(step) for step in (before, after)}
            found = _agreement(known[before], known[after])
            if found is not None and not np.isnan(found.value):
                rows.append(
                    {"before": before, "after": after, **{n: getattr(found, n) for n in ("value", "low", "high")}}
                )
        return pd.DataFrame(rows, columns=["before", "after", "value", "low", "high"])

    @cached_property
    def matrix(self) -> pd.DataFrame:
        """Spearman's correlation of every two steps: steps x steps, evenly spaced ones where there are many."""
        steps = [self.steps[index] for index in _spaced(len(self.steps), MAX_MATRIX)]
        table = pd.concat({step: self._ranked(step) for step in steps}, axis=1).dropna(axis=1, how="all").dropna()
        steps = list(table)
        if len(table) < 3:
            return pd.DataFrame()
        ones = np.ones((1, len(table)))
        values = [[weighted_spearman(table[a].to_numpy(), table[b].to_numpy(), ones)[0] for b in steps] for a in steps]
        return pd.DataFrame(values, steps, steps)

    @cached_property
    def num_pairs(self) -> int:
        """How many pairs of a fixed update and an answer are ranked."""
        return len(self._ranked(self.steps[-1]))

    def _ranked(self, step: int) -> pd.Series:
        """Predicted change per token of the fixed updates' pairs, of the first probes if there are too many pairs."""
        rows = per_token(self.read(step))
        rows = rows[rows["update"] != BATCH]
        pairs_so_far = rows.groupby("probe_id", sort=True).size().cumsum()
        kept = rows[rows["probe_id"].isin(pairs_so_far.index[pairs_so_far <= MAX_PAIRS])]
        keys = ["update", "probe_id", "response_type"]
        return kept["predicted"].set_axis(pd.MultiIndex.from_frame(kept[keys]))

    @cached_property
    def _tables(self) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.Series]:
        *found, lost = zip(*(self._reduced(self.read(step)) for step in self.steps), strict=True)
        means, errors, parts = (pd.concat(tables, ignore_index=True) for tables in found)
        not_finite = pd.Series(lost, self.steps, dtype=int)
        return means, errors, parts, not_finite[not_finite > 0]

    def _reduced(self, rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, int]:
        rows = per_token(rows)
        keys = ["step", "update", "response_type"]
        grouped = rows.groupby(keys, sort=False)
        means = grouped[["predicted", "true", "logp"]].mean().assign(num_answers=grouped.size()).reset_index()
        batch = rows[rows["update"] == BATCH]
        known = batch.dropna(subset=["predicted", "true"])
        errors = [_error(known, ALL, ROUNDING[self.dtype])] if len(known) else []
        errors += [_error(own, name, ROUNDING[self.dtype]) for name, own in known.groupby("response_type")]
        return means, pd.DataFrame(errors), _parts(batch), _num_not_finite(rows)


def summarise_influence(store: DynamicsStore) -> dict[str, InfluenceSummary]:
    """Recorded influence of a store: model -> summary; empty where none was recorded.

    Raises:
        ValueError: If a file is damaged.
    """
    steps = store.steps(INFLUENCE)
    if not steps:
        return {}
    dtype = store.read_meta().get("akg", {}).get("dtype", "float32")

    def reading(model: str) -> Callable[..., pd.DataFrame]:
        def read(step: int, columns: Sequence[str] = COLUMNS) -> pd.DataFrame:
            rows = store.read(INFLUENCE, {step}, list(columns))
            return rows[rows["model"] == model]

        return read

    models = store.read(INFLUENCE, {steps[0]}, [])["model"].unique()
    return {str(model): InfluenceSummary(steps, reading(str(model)), dtype) for model in models}


def per_token(rows: pd.DataFrame) -> pd.DataFrame:
    """Keys, `num_tokens`, `lr`, and [`SUMS`] over the number of tokens; answers without any are left out.

    What is infinite, as of a run that diverged, is NaN here; but not `slack`, of which NaN says that there is none.
    """
    rows = rows[rows["num_tokens"] > 0]
    keys = rows[["step", "update", "probe_id", "response_type", "num_tokens", "lr"]]
    values = pd.DataFrame({name: rows[column] / rows["num_tokens"] for name, column in SUMS.items()})
    return keys.join(values.where(np.isfinite(values.assign(slack=0.0))))


def _spaced(count: int, limit: int) -> list[int]:
    """At most `limit` of the first `count` numbers, evenly spaced, with the first and the last of them."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, limit))}) if count > 0 else []


def _error(known: pd.DataFrame, name: str, rounding: float) -> dict:
    squares = float((known["true"] ** 2).sum())
    wrong = float(((known["predicted"] - known["true"]) ** 2).sum())
    noise = float((rounding**2 / known["num_tokens"] + known["slack"].fillna(0.0) ** 2).sum())
    return {
        "step": int(known["step"].iloc[0]),
        "response_type": name,
        "error": (wrong / squares) ** 0.5 if squares else np.nan,
        "rounding": (noise / squares) ** 0.5 if squares else np.inf,
        "moved": squares**0.5,
        "num_answers": len(known),
    }


def _num_not_finite(rows: pd.DataFrame) -> int:
    """Answers with a change that is NaN: a predicted one, or of the batch's step a measured one."""
    lost = rows["predicted"].isna() | ((rows["update"] == BATCH) & rows["true"].isna())
    return len(rows.loc[lost, ["probe_id", "response_type"]].drop_duplicates())


def _parts(batch: pd.DataFrame) -> pd.DataFrame:
    if batch.empty:
        return pd.DataFrame()
    sizes = (batch[["predicted", *PARTS]] ** 2).mean() ** 0.5
    row = {"step": int(batch["step"].iloc[0]), "lr": float(batch["lr"].iloc[0]), "whole": sizes["predicted"]}
    return pd.DataFrame([row | {name: sizes[name] for name in PARTS}])


def _agreement(before: pd.Series, after: pd.Series) -> Agreement | None:
    table = pd.concat({"before": before, "after": after}, axis=1).dropna()
    if len(table) < 3:
        return None
    probes = table.index.get_level_values("probe_id")
    return rank_agreement(table["before"], table["after"], [probes], num_resamples=NUM_RESAMPLES)
