"""Greedy answers as a run would write them, from how much of each is a loop."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from synthetic_runs import STEPS
from trl_dynamics.paths.kinds import SAMPLES
from trl_dynamics.scoring.repetition import distinct_share, longest_repeat, repeat_share, same_shares


def answers(
    loop: float = 0.0,
    *,
    steps: Sequence[int] = STEPS,
    num_probes: int = 8,
    start: int = 24,
    end: int = 24,
    text: str = "answer of step {step}",
    alike: float = 0.0,
    model: str = "policy",
    seed: int = 0,
) -> pd.DataFrame:
    """Answers of one model.

    Args:
        loop: Share of an answer that is two tokens again and again at the last step; it grows from none at the first.
        alike: Share of the probes that get one and the same answer at the last step.
        start, end: Tokens of an answer at the first and at the last step.
    """
    rng, rows = np.random.default_rng(seed), []
    for step in steps:
        t = (step - steps[0]) / max(steps[-1] - steps[0], 1)
        for index in range(num_probes):
            count = round(start + (end - start) * t) + index % 3
            looped = round(loop * t * count)
            count = count if t < 1 or index >= alike * num_probes else start
            ids = [*rng.integers(0, 500, count - looped).tolist(), *([7, 8] * count)[:looped]]
            ids = ids if t < 1 or index >= alike * num_probes else list(range(start))
            logp = -1.0 * (count - looped) - 0.01 * looped
            rows.append(
                {
                    "model": model,
                    "step": step,
                    "probe_id": f"p{index:03d}",
                    "num_tokens": count,
                    "ended": bool(index % 2) and looped == 0,
                    "logp_sum": logp,
                    "logp_mean": logp / count if count else np.nan,
                    "eos_logp": -0.3 if index % 2 and looped == 0 else np.nan,
                    **{f"distinct_{n}": distinct_share(ids, n) for n in (1, 2, 3)},
                    "longest_repeat": float(longest_repeat(ids)),
                    "repeat_share": repeat_share(ids),
                    "same_share": 0.0,
                    "token_ids": ids,
                    "text": text.format(step=step),
                }
            )
    frame = pd.DataFrame(rows)[SAMPLES.schema.names]
    for _, own in frame.groupby("step"):
        frame.loc[own.index, "same_share"] = same_shares(own["token_ids"].tolist())
    return frame
