"""When records of two set-ups agree: bit by bit before the first update, within rounding after it."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

import trl_dynamics
from trl_dynamics.paths.samples import load_samples

KEYS = ["step", "probe_id", "response_type"]
STEPS = [0, 1, 2, 4]


def records(run: Path, steps: Sequence[int] = STEPS) -> pd.DataFrame:
    """The records of a run that was probed at `steps`, one row per key."""
    frame = trl_dynamics.load_records(run).drop(columns="run").set_index(KEYS).sort_index()
    assert frame.index.is_unique
    assert sorted(frame.index.unique("step")) == list(steps)
    return frame


def batch_plan(run: Path) -> dict:
    return json.loads((run / "dynamics/meta.json").read_text())["batch_plan"]


def values(frame: pd.DataFrame) -> list[str]:
    return [name for name in frame.columns if name.endswith(("_sum", "_mean")) or name == "eos_logp"]


def assert_same_start(run: Path, other: Path) -> None:
    """The same rows at the same steps, and at step 0 the same bits: the same weights in the same batches."""
    ours, theirs = records(run), records(other)
    assert ours.index.equals(theirs.index)
    assert ours["num_tokens"].equals(theirs["num_tokens"])
    assert batch_plan(run)["fingerprint"] == batch_plan(other)["fingerprint"]
    pd.testing.assert_frame_equal(ours.loc[[0]], theirs.loc[[0]], check_exact=True)


def assert_same_course(run: Path, other: Path) -> None:
    """The same start, and then what gradients summed in another order may change."""
    assert_same_start(run, other)
    ours, theirs = records(run), records(other)
    for name in values(ours):
        bound = 1e-5 * ours["num_tokens"] + 1e-4 if name.endswith("_sum") else 1e-4
        assert ((ours[name] - theirs[name]).abs() <= bound).all(), name
    moved = (ours.loc[4, "logp_sum"] - ours.loc[0, "logp_sum"]).abs()
    assert (moved > 1e-2).all(), "training moved nothing, so agreement means nothing"


def assert_same_answers(run: Path, other: Path) -> None:
    """The same greedy answers, at step 0 bit by bit, and each at every step once."""
    ours, theirs = (load_samples(folder).set_index(["step", "probe_id"]).sort_index() for folder in (run, other))
    assert ours.index.is_unique and ours.index.equals(theirs.index)
    assert sorted(ours.index.unique("step")) == STEPS and len(ours) == 5 * len(STEPS)
    assert ours["text"].equals(theirs["text"]) and ours["ended"].equals(theirs["ended"])
    pd.testing.assert_series_equal(ours.loc[[0], "logp_sum"], theirs.loc[[0], "logp_sum"], check_exact=True)
    assert (ours["logp_sum"] - theirs["logp_sum"]).abs().max() < 1e-3
    assert ours["text"].nunique() > 10, "all answers are alike, so agreement means nothing"


def assert_consistent(run: Path) -> None:
    """Records that say the same in several columns, where no other run draws the same samples to compare with."""
    frame = records(run)
    np.testing.assert_allclose(frame["logp_sum"], frame["logp_mean"] * frame["num_tokens"], rtol=1e-12)
    assert (frame["logp_sum"] <= frame["argmax_logp_sum"]).all()
    assert frame["prob_mean"].between(0, 1).all() and frame["rest_mass_mean"].between(0, 1).all()
    assert (frame["entropy_mean"] >= 0).all() and (frame["sum_sq_mean"] <= frame["topk_mass_mean"]).all()
    assert not frame.loc[0, values(frame)].equals(frame.loc[4, values(frame)])
