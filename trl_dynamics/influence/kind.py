"""What single steps of a run were predicted to do to every observed answer, and what they did.

Everything is in nats and of an answer's own tokens, without the end-of-turn token, as in the records. `step` counts
the optimiser steps done *before* the one that is predicted. The update `"batch"` is the step that training took. Any
other name is that of a response type: its rows say what the gradient of the SFT loss of all observed answers of that
type would have done, had the optimiser taken it in place of the batch's. What the optimiser remembers of earlier
steps, and weight decay, are not part of them.
"""

from pathlib import Path

import pandas as pd
import pyarrow as pa

from trl_dynamics.store.kind import BEFORE, Kind
from trl_dynamics.store.store import read_runs

BATCH = "batch"

INFLUENCE = Kind(
    "influence",
    keys=("model", "step", "update", "probe_id", "response_type"),
    columns={
        "num_tokens": pa.int32(),
        # Where a step has no such part: NaN.
        "logp_sum": "log pi(answer | prompt) before the step, summed over the answer's tokens",
        "predicted_sum": "its change in the step, predicted to first order: the sum of the next three",
        "update_sum": "the part that this step's gradient makes",
        "momentum_sum": "the part that gradients of earlier steps make",
        "decay_sum": "the part that weight decay makes",
        "error_sum": "by how much predicted_sum is off as a derivative, at 99.9 % confidence; NaN where it is exact",
        "true_sum": "its change as measured after the step; NaN for steps that were not taken",
        "force_norm": "norm of dL/dz over all positions and labels of the update; NaN where L is not known",
        "grad_norm": "norm of the update's gradient before clipping",
        "lr": "learning rate of the step",
        # Per token of the answer, in order; `true` is empty for steps that were not taken.
        "token_ids": pa.list_(pa.int32()),
        "token_texts": pa.list_(pa.string()),
        "predicted": pa.list_(pa.float32()),
        "true": pa.list_(pa.float32()),
    },
    # A run that goes on after step s takes the step that rows of s predict again.
    kept=BEFORE,
)


def load_influence(*output_dirs: str | Path) -> pd.DataFrame:
    """Influence of one or more runs as one frame, unique by (run, model, step, update, probe_id, response_type).

    Args:
        output_dirs: Runs' output directories (or their `dynamics/` folders).

    Returns:
        `pandas.DataFrame`: The columns of [`INFLUENCE`] with `run` in front; no rows where the runs were not
        asked for it (`akg_every`).

    Raises:
        ValueError: If a folder is no run.
    """
    return read_runs("load_influence", output_dirs, lambda store: store.read(INFLUENCE))
