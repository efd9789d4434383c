"""How strongly two kinds of answers are tied, from records alone: the paper's stand-ins for the size of K.

From |Delta ln pi(y_o)| <= eta ||A_o|| ||K_ou|| ||G_u||, what an observed change leaves for K when A and G are divided
out is a lower bound of it (LBK, arXiv 2407.10490, appendix); SignDelta keeps the change's sign.
"""

from collections.abc import Collection

import numpy as np
import pandas as pd

COLUMNS = ("step", "probe_id", "response_type", "logp_mean", "prob_mean", "sum_sq_mean")


def lower_bounds(frame: pd.DataFrame, trained_on: str | Collection[str], vocab_size: int) -> pd.DataFrame:
    """LBK and SignDelta of every response type at every two neighbouring steps of a run.

    With Delta the change of logp_mean between the steps and all else as of the first: LBK is the root mean square over
    probes of Delta, SignDelta its mean, both over mean ||A_o|| and mean ||G_u||; ||A||_F^2 = V - 2 + V ||pi||^2 and
    ||G||^2 = 1 - 2 pi(y) + ||pi||^2 at a position, root mean squares along an answer. The paper takes sums of
    log-probabilities, norms over probes, and the root of ||A||_F; here neither length nor number of probes counts. The
    learning rate does, and how many steps are in between: compare runs of the same ones. Sums over the run are the
    paper's accumulated influence.

    Args:
        frame (`pd.DataFrame`): Records of one model of one run: `step`, `probe_id`, `response_type`, `logp_mean`,
            `prob_mean`, `sum_sq_mean`.
        trained_on (`str` or `Collection[str]`): The response types that the run trains on, u.
        vocab_size (`int`): V.

    Returns:
        A row per step but the first and response type: `step`, `response_type`, `lbk`, `sign_delta` (both nats), and
        `amplification`, mean ||A_o||, and `force`, mean ||G_u||, which were divided by.

    Raises:
        ValueError: If columns are missing, a record is there twice, there are fewer than 2 steps, or no record is of
            a type that is trained on.
    """
    if missing := [name for name in COLUMNS if name not in frame]:
        raise ValueError(f"the frame has no column {missing[0]!r}; expected {', '.join(COLUMNS)}")
    trained_on = [trained_on] if isinstance(trained_on, str) else list(trained_on)
    if absent := sorted(set(trained_on) - set(frame["response_type"])):
        raise ValueError(f"no record is of the type {absent[0]!r}; types are {sorted(set(frame['response_type']))}")
    if frame.duplicated(["step", "probe_id", "response_type"]).any():
        raise ValueError("an answer was recorded twice at a step; give the records of one model of one run")
    if frame["step"].nunique() < 2:
        raise ValueError(f"got records of {frame['step'].nunique()} step, expected at least 2 to compare")
    size = np.sqrt(vocab_size - 2 + vocab_size * frame["sum_sq_mean"])
    force = np.sqrt((1 - 2 * frame["prob_mean"] + frame["sum_sq_mean"]).clip(lower=0))
    known = frame.assign(amplification=size, force=force).pivot(
        index="step", columns=["response_type", "probe_id"], values=["logp_mean", "amplification", "force"]
    )
    delta, before = known["logp_mean"].diff().iloc[1:], known.shift().iloc[1:]
    pushed = before["force"][trained_on].mean(axis=1)
    types = delta.columns.get_level_values("response_type")
    amplified = before["amplification"].T.groupby(types).mean().T
    divisor = amplified.mul(pushed, axis=0)
    found = {
        "lbk": (delta**2).T.groupby(types).mean().T ** 0.5 / divisor,
        "sign_delta": delta.T.groupby(types).mean().T / divisor,
        "amplification": amplified,
    }
    rows = pd.concat(
        {name: table.rename_axis(columns="response_type").stack() for name, table in found.items()}, axis=1
    )
    return rows.reset_index().assign(force=lambda rows: rows["step"].map(pushed))
