"""Influence over steps and accumulated influence, against pandas and sums by hand."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from trl_dynamics.influence.series import EVERY_STEP, SAMPLED, accumulated_influence, influence_stability
from trl_dynamics.statistics import rank_agreement


def records(steps, seed: int = 0) -> pd.DataFrame:
    """Three probes' two answers at some of twelve steps, whose true changes are the predicted ones and an error."""
    rng = np.random.default_rng(seed)
    rows, logp = [], {}
    for step in range(12):
        for probe in "abc":
            for kind, tokens in (("chosen", 4), ("rejected", 8)):
                before = logp.get((probe, kind), -10.0)
                predicted, error = rng.normal(), 0.1 * rng.normal()
                logp[probe, kind] = before + predicted + error
                row = {"model": "policy", "step": step, "probe_id": probe, "response_type": kind}
                row |= {"num_tokens": tokens, "logp_sum": before}
                rows.append(row | {"update": "batch", "predicted_sum": predicted, "true_sum": predicted + error})
                fixed = {"update": "chosen", "predicted_sum": ord(probe) + tokens * step, "true_sum": np.nan}
                rows.append(row | fixed)
    frame = pd.DataFrame(rows)
    return frame[frame["step"].isin(steps)]


def test_accumulated_influence_is_the_sum_of_predicted_changes_beside_the_path():
    frame = records(range(12))
    found = accumulated_influence(frame)
    batch = frame[(frame["update"] == "batch") & (frame["response_type"] == "rejected")]
    last = found[(found["response_type"] == "rejected") & (found["step"] == 12)].iloc[0]
    assert last["predicted"] == pytest.approx(batch["predicted_sum"].sum() / 8 / 3)
    assert last["observed"] == pytest.approx(batch["true_sum"].sum() / 8 / 3)
    np.testing.assert_allclose(found["path"], found["observed"])
    assert set(found["coverage"]) == {EVERY_STEP} and found["step"].max() == 12
    assert accumulated_influence(frame.sample(frac=1, random_state=0)).round(12).equals(found.round(12))


def test_gaps_are_labelled_and_the_path_counts_them():
    whole, found = accumulated_influence(records(range(12))), accumulated_influence(records([2, 3, 7, 11]))
    assert found["coverage"].tolist() == [EVERY_STEP, EVERY_STEP, SAMPLED, SAMPLED] * 2
    chosen, all_chosen = (frame[frame["response_type"] == "chosen"].set_index("step") for frame in (found, whole))
    assert chosen.loc[12, "path"] == pytest.approx(all_chosen.loc[12, "path"] - all_chosen.loc[2, "path"])
    assert chosen.loc[12, "observed"] == pytest.approx(
        all_chosen["observed"].diff().loc[[3, 4, 8, 12]].sum()
    ) and chosen.loc[12, "observed"] != pytest.approx(chosen.loc[12, "path"])
    assert accumulated_influence(records([2, 3]).drop(columns="logp_sum"))["path"].isna().all()


def test_stability_of_influence_ranks_fixed_updates_per_token_and_draws_probes():
    frame = records([0, 1, 5])
    found = influence_stability(frame)
    fixed = frame[frame["update"] == "chosen"]
    table = fixed.assign(value=fixed["predicted_sum"] / fixed["num_tokens"]).pivot(
        index=["probe_id", "response_type"], columns="step", values="value"
    )
    expected = table.corr("spearman").to_numpy()
    np.testing.assert_allclose(found.value_SS, expected, atol=1e-12)
    assert found.steps == [0, 1, 5] and found.num_pairs == 6
    one = rank_agreement(table[0], table[5], [table.index.get_level_values("probe_id")])
    assert (found.low_SS[0, 2], found.high_SS[0, 2]) == (one.low, one.high)
    missing = frame.drop(frame[(frame["step"] == 5) & (frame["probe_id"] == "a")].index)
    assert influence_stability(missing).num_pairs == 4


def test_bad_records_are_told():
    frame = records([0, 1])
    batch = frame[frame["update"] == "batch"]
    with pytest.raises(ValueError, match="own batches were recorded"):
        influence_stability(batch)
    with pytest.raises(ValueError, match="no column 'num_tokens'"):
        influence_stability(frame.drop(columns="num_tokens"))
    with pytest.raises(ValueError, match="answer twice"):
        influence_stability(pd.concat([frame, frame]))
    with pytest.raises(ValueError, match="answer twice"):
        accumulated_influence(pd.concat([frame, frame]))
    with pytest.raises(ValueError, match="no predicted or no true change"):
        accumulated_influence(batch.assign(true_sum=np.nan))
    assert accumulated_influence(frame[frame["update"] == "chosen"]).empty


def test_the_report_can_use_it_without_torch():
    code = "import trl_dynamics.influence.series, sys; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
