"""Metrics against loops over the rows, with types that some probes lack and rows in any order."""

import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from synthetic_runs import SQUEEZED, STEPS, VOCAB_SIZE, records
from trl_dynamics.paths import metrics
from trl_dynamics.paths.summary import QUANTILES, summarise

MISSING = ("rejected", "other_test", "chosen_self_rephrase")


@pytest.fixture(scope="module")
def frame():
    ordered = records(
        SQUEEZED, argmax=0.4, entropy=-0.3, drained=0.1, eos=-0.2, missing=MISSING, num_probes=10, noise=0.1
    )
    return ordered.sample(frac=1.0, random_state=3).reset_index(drop=True)


def rows_of(frame, response_type):
    """{step: {probe_id: row}} by plain loops."""
    found = {}
    for row in frame.to_dict("records"):
        if row["response_type"] == response_type:
            found.setdefault(row["step"], {})[row["probe_id"]] = row
    return found


def mean(values):
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values)


def looped_change(frame, response_type, column, step):
    rows = rows_of(frame, response_type)
    return mean([row[column] - rows[STEPS[0]][probe][column] for probe, row in rows[step].items()])


def looped_chosen(frame, step, value):
    return mean([value(row) for row in rows_of(frame, "chosen")[step].values()])


def looped_margin(frame, step):
    chosen, rejected = rows_of(frame, "chosen"), rows_of(frame, "rejected")

    def margin(probe, at):
        return chosen[at][probe]["logp_sum"] - rejected[at][probe]["logp_sum"]

    return mean([margin(probe, step) - margin(probe, STEPS[0]) for probe in rejected[step]])


REFERENCES = {
    "argmax_logp": lambda f, s: looped_chosen(f, s, lambda r: r["argmax_logp_sum"] / r["num_tokens"]),
    "argmax_minus_chosen": lambda f, s: looped_chosen(
        f, s, lambda r: (r["argmax_logp_sum"] - r["logp_sum"]) / r["num_tokens"]
    ),
    "entropy": lambda f, s: looped_chosen(f, s, lambda r: r["entropy_mean"]),
    "eos_logp": lambda f, s: looped_chosen(f, s, lambda r: r["eos_logp"]),
    "drained_mass": lambda f, s: -looped_change(f, "rejected", "rest_mass_mean", s),
    "margin": looped_margin,
    "third_party_logp": lambda f, s: mean(
        [
            looped_change(f, name, "logp_mean", s)
            for name in set(f["response_type"]) - {"chosen", "rejected", "chosen_initial"}
        ]
    ),
    "other_fluent_logp": lambda f, s: mean(
        [
            looped_change(f, name, "logp_mean", s)
            for name in set(f["response_type"]) - {"chosen", "rejected", "chosen_initial"}
            if "permuted" not in name and name != "random_words" and not name.startswith("rejected_")
        ]
    ),
}


def looped(response_type, value):
    return lambda frame, step: mean([value(row) for row in rows_of(frame, response_type)[step].values()])


def residual(row):
    return math.sqrt(1 - 2 * row["prob_mean"] + row["sum_sq_mean"])


def normalizer(row):
    return math.sqrt(VOCAB_SIZE - 2 + VOCAB_SIZE * row["sum_sq_mean"])


REFERENCES |= {
    "displacement": lambda f, s: looped_change(f, "chosen", "logp_mean", s),
    "miss_chosen": looped("chosen", lambda row: 1 - row["prob_mean"]),
    "residual_chosen": looped("chosen", residual),
    "residual_rejected": looped("rejected", residual),
    "normalizer_chosen": looped("chosen", normalizer),
    "normalizer_rejected": looped("rejected", normalizer),
}


def test_every_metric_has_a_reference_here():
    assert set(REFERENCES) == set(metrics.METRICS)


@pytest.mark.parametrize("name", REFERENCES)
def test_metric_equals_a_loop_over_rows(frame, name):
    series = summarise(frame, VOCAB_SIZE).metric(name)
    assert list(series.index) == list(STEPS)
    for step in STEPS:
        assert series[step] == pytest.approx(REFERENCES[name](frame, step), abs=1e-12)


def test_row_order_does_not_matter(frame):
    ordered = frame.sort_values(["response_type", "step", "probe_id"])
    pd.testing.assert_frame_equal(summarise(frame).metric_table(), summarise(ordered).metric_table(), rtol=1e-12)
    pd.testing.assert_frame_equal(summarise(frame).bands(), summarise(ordered).bands(), rtol=1e-12)


def test_path_is_the_mean_over_probes(frame):
    path = summarise(frame).path("logp_sum")
    for name in path.columns:
        for step, rows in rows_of(frame, name).items():
            assert path.at[step, name] == pytest.approx(mean([row["logp_sum"] for row in rows.values()]))
    assert list(path.columns[:3]) == ["chosen", "rejected", "chosen_initial"]


def test_changes_are_paired_by_probe(frame):
    """Dropping a probe at the end must drop it at the start as well: the change is not a difference of means."""
    last = STEPS[-1]
    gone = (frame["probe_id"] == "p001") & (frame["step"] == last)
    holed = frame[~gone]
    change = summarise(holed).change_since_start()
    expected = looped_change(holed, "chosen", "logp_mean", last)
    assert change.at[last, "chosen"] == pytest.approx(expected)
    path = summarise(holed).path()["chosen"]
    assert abs(path[last] - path[STEPS[0]] - expected) > 1e-3


def test_bands_are_quantiles_over_probes(frame):
    bands = summarise(frame).bands(since_start=True).set_index(["response_type", "step"])
    rows = rows_of(frame, "rejected")
    deltas = [row["logp_mean"] - rows[0][probe]["logp_mean"] for probe, row in rows[40].items()]
    found = bands.loc[("rejected", 40)]
    assert found["num_probes"] == 5
    assert found[["q10", "q50", "q90"]].tolist() == pytest.approx(np.quantile(deltas, QUANTILES).tolist())


def test_scalars_are_the_last_values(frame):
    scalars = metrics.scalars(frame, VOCAB_SIZE)
    assert scalars["probe/rejected/logp_mean"] == pytest.approx(summarise(frame).path()["rejected"].iloc[-1])
    for name in metrics.METRICS:
        assert scalars[f"squeeze/{name}"] == pytest.approx(summarise(frame, VOCAB_SIZE).metric(name).iloc[-1])
    assert all(key == key.lower() and key.count("/") <= 2 for key in scalars)


def test_other_fluent_answers_are_what_findings_speak_of(frame):
    found = summarise(frame)
    assert found.metric("other_fluent_logp").iloc[-1] == pytest.approx(found.changes().bystanders.mean, abs=1e-12)


def test_baseline_and_last_step_alone_give_the_same_scalars(frame):
    ends = frame[frame["step"].isin([STEPS[0], STEPS[-1]])]
    assert metrics.scalars(ends) == pytest.approx(metrics.scalars(frame))


def test_a_single_step_has_levels_and_zero_changes():
    frame = records(steps=[0], num_probes=3)
    scalars = metrics.scalars(frame)
    assert scalars["squeeze/margin"] == scalars["squeeze/third_party_logp"] == scalars["squeeze/drained_mass"] == 0.0
    assert scalars["squeeze/argmax_minus_chosen"] > 0


def test_metrics_without_their_types_are_left_out():
    frame = records(types=["good", "bad"], num_probes=3)
    changes = {"third_party_logp", "other_fluent_logp"}
    assert set(summarise(frame).metric_table()["metric"]) == changes
    assert set(metrics.scalars(frame)) == {
        "probe/good/logp_mean",
        "probe/bad/logp_mean",
        "probe/not_finite",
        *(f"squeeze/{name}" for name in changes),
    }
    assert set(summarise(records(types=["chosen"])).metric_table()["metric"]) == {
        "argmax_logp",
        "argmax_minus_chosen",
        "entropy",
        "eos_logp",
        "displacement",
        "miss_chosen",
        "residual_chosen",
    }


def test_forces_are_those_of_a_distribution():
    """Columns made from logits: the norms of the vector pi - e_y and of the matrix I - 1 pi^T."""
    rng = np.random.default_rng(0)
    frame = records(types=["chosen"], steps=[0], num_probes=4)
    residuals, normalizers = [], []
    for index in frame.index:
        prob, label = np.exp(rng.standard_normal(VOCAB_SIZE)), int(rng.integers(VOCAB_SIZE))
        prob /= prob.sum()
        frame.loc[index, ["prob_mean", "sum_sq_mean"]] = prob[label], (prob**2).sum()
        residuals.append(np.linalg.norm(prob - np.eye(VOCAB_SIZE)[label]))
        normalizers.append(np.linalg.norm(np.eye(VOCAB_SIZE) - np.ones((VOCAB_SIZE, 1)) * prob))
    summary = summarise(frame, VOCAB_SIZE)
    assert summary.metric("residual_chosen")[0] == pytest.approx(np.mean(residuals), rel=1e-12)
    assert summary.metric("normalizer_chosen")[0] == pytest.approx(np.mean(normalizers), rel=1e-12)
    assert summarise(frame).metric("normalizer_chosen").empty, "without the vocabulary's size it cannot be known"


def test_end_of_turn_is_left_out_where_every_response_was_cut():
    frame = records(num_probes=3).assign(eos_logp=np.nan)
    assert summarise(frame).metric("eos_logp").empty and "squeeze/eos_logp" not in metrics.scalars(frame)


def test_a_type_without_start_has_a_path_but_no_change():
    frame = records(num_probes=3)
    late = frame[(frame["response_type"] != "other_test") | (frame["step"] > 0)]
    assert "other_test" not in summarise(late).change_since_start()
    assert summarise(late).path()["other_test"].notna().sum() == len(STEPS) - 1


def test_frames_of_several_models_are_refused():
    frame = pd.concat([records(num_probes=2), records(num_probes=2, model="other")])
    with pytest.raises(ValueError, match=r"one model, got \['other', 'policy'\]"):
        metrics.scalars(frame)


@pytest.mark.parametrize("module", ["paths.metrics", "paths.rules", "report.page", "report.export"])
def test_modules_load_no_torch(module):
    code = f"import trl_dynamics.{module}, sys; print(sorted({{'torch', 'trl', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
