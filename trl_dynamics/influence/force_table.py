"""The rows of a force map ([`influence.single_steps`]) in short: means by type, how well predictions held, as text."""

import numpy as np
import pandas as pd

from trl_dynamics.influence.kind import INFLUENCE
from trl_dynamics.plain import finite_or_none
from trl_dynamics.probing.schema import order_types

MODEL = "policy"


def not_finite(frame: pd.DataFrame) -> tuple[int, int]:
    """How many rows (an update and an observed answer each) have a number that is not finite, and how many rows."""
    names = [name for name in frame if name.endswith("_sum") or name.startswith("delta_sum/") or name == "update_loss"]
    return int((~np.isfinite(frame[names])).any(axis=1).sum()), len(frame)


def as_influence(frame: pd.DataFrame, learning_rate: float) -> dict[str, list]:
    """The columns of [`influence.kind`] for rows with `tokens`, all of step 0: no optimiser step was done before.

    An update is named by what was trained on; where several rows of the data were, its row comes first: `"3 chosen"`.
    """
    names = frame["update_type"]
    if frame["update_row"].nunique() > 1:
        names = frame["update_row"].astype(str) + " " + names
    rows = frame.assign(model=MODEL, step=0, update=names, lr=learning_rate)
    names = INFLUENCE.schema.names
    return {name: list(rows[name]) if name in rows else [np.nan] * len(rows) for name in names}


def without_tokens(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows without what `tokens` adds to them."""
    added = {
        "predicted_sum",
        "update_sum",
        "momentum_sum",
        "decay_sum",
        "token_ids",
        "token_texts",
        "predicted",
        "true",
    }
    return frame.drop(columns=[name for name in frame if name in added])


def summary(frame: pd.DataFrame) -> dict:
    """Means over updates and probes, and how well predictions held, for programs; None where not finite."""
    found = {
        "num_updates": int(frame.groupby(["update_row", "update_type"]).ngroups),
        "delta_mean": {
            f"{update}/{observed}": finite_or_none(value)
            for (update, observed), value in _per_token(frame, "delta_sum").items()
        },
        "num_not_finite": not_finite(frame)[0],
    }
    if "true_sum" in frame:
        for name, predicted in (("", "delta_sum"), ("_fixed_features", "fixed_features_sum")):
            errors = relative_errors(frame, predicted)
            found[f"relative_error{name}"] = {kind: finite_or_none(error) for kind, error in errors.items()}
    return found


def relative_errors(frame: pd.DataFrame, predicted: str = "delta_sum") -> dict[str, float | None]:
    """||predicted - true|| / ||true|| over all observed answers, by type of update; None where nothing moved."""
    errors: dict[str, float | None] = {}
    for kind, rows in frame.groupby("update_type"):
        scale = rows["true_sum"].pow(2).sum(skipna=False)
        off = (rows[predicted] - rows["true_sum"]).pow(2).sum(skipna=False)
        errors[kind] = float((off / scale) ** 0.5) if scale else None
    return errors


def lines(frame: pd.DataFrame, step: str, dtype: str) -> list[str]:
    """For the console: the force map, and how well it held where steps were taken.

    Args:
        step (`str`): What the step was, in words.
        dtype (`str`): Of the weights.
    """
    own = frame[frame["same_prompt"]]
    found = [f"predicted change of ln pi per token (nats) in one step, {step}"]
    for title, rows in (
        ("answers to the update's own prompt", own),
        ("answers to other prompts", frame.drop(own.index)),
    ):
        if len(rows):
            table = pd.Series(_per_token(rows, "delta_sum")).unstack(0)
            order = order_types(table.index)
            found += [
                "",
                f"{title} (rows), by what was trained on:",
                table.loc[order].map("{:+.2e}".format).to_string(),
            ]
    if "true_sum" in frame:
        shown, fixed = (_shown(relative_errors(frame, name), dtype) for name in ("delta_sum", "fixed_features_sum"))
        found += ["", f"against the real steps, relative error: {shown}; {_rounding_text(frame)}"]
        found += [f"the same with fixed features, where the head alone moves: {fixed}"]
    return [*found, ""]


def _rounding_text(frame: pd.DataFrame) -> str:
    """How much of the measured changes rounding may be."""
    rounding, moved = (frame[name].pow(2).sum(skipna=False) for name in ("rounding_sum", "true_sum"))
    share = (rounding / max(moved, 1e-300)) ** 0.5
    if not np.isfinite(share):
        return "what rounding makes of it is not finite"
    return f"rounding alone makes some {share:.1%}" if share < 1 else "rounding hides the steps: raise the rate"


def _shown(errors: dict[str, float | None], dtype: str) -> str:
    unmoved = f"no change that {dtype} can tell"
    texts = {
        kind: unmoved if error is None else f"{error:.1%}" if np.isfinite(error) else "not finite"
        for kind, error in errors.items()
    }
    return ", ".join(f"{kind} {text}" for kind, text in texts.items())


def _per_token(frame: pd.DataFrame, column: str) -> dict[tuple[str, str], float]:
    means = (frame[column] / frame["num_tokens"]).groupby([frame["update_type"], frame["response_type"]]).mean()
    return {key: float(value) for key, value in means.items()}
