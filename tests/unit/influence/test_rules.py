"""Recorded influence, reduced step by step, against loops and pandas; and the two findings that it supports."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from synthetic_influence import STEPS, TYPES, influence, set_value, summary_of, write_alone, write_influence
from synthetic_runs import SQUEEZED, meta, probe_set, records, write_run
from trl_dynamics import chapters
from trl_dynamics.cli.main import main
from trl_dynamics.findings.rules import Run, found_by
from trl_dynamics.findings.verdicts import Judged, findings_of
from trl_dynamics.influence import summary as summary_module
from trl_dynamics.influence.rules import RULES, judged_steps
from trl_dynamics.influence.summary import ALL, summarise_influence
from trl_dynamics.paths import rules
from trl_dynamics.paths.kinds import RECORDS
from trl_dynamics.paths.summary import summarise
from trl_dynamics.store.store import DynamicsStore
from trl_dynamics.tracking.series import Series


def found(frame, dtype="float32"):
    return {finding.name: finding for finding in found_by(RULES.values(), summary_of(frame, dtype), Run())}


def test_means_and_errors_are_what_loops_give():
    frame = influence(num_probes=5, error=0.3)
    summary = summary_of(frame.sample(frac=1, random_state=1))
    for step in STEPS:
        for name in (ALL, *TYPES):
            predicted, true, noise = [], [], []
            for row in frame.to_dict("records"):
                wanted = row["step"] == step and row["update"] == "batch" and name in (ALL, row["response_type"])
                if wanted:
                    predicted.append(row["predicted_sum"] / row["num_tokens"])
                    true.append(row["true_sum"] / row["num_tokens"])
                    noise.append(summary_module.ROUNDING["float32"] ** 2 / row["num_tokens"])
            norm = sum(value**2 for value in true) ** 0.5
            wrong = sum((p - t) ** 2 for p, t in zip(predicted, true, strict=True)) ** 0.5
            error = summary.errors.set_index(["step", "response_type"]).loc[(step, name)]
            assert error["error"] == pytest.approx(wrong / norm, rel=1e-12)
            assert error["rounding"] == pytest.approx(sum(noise) ** 0.5 / norm, rel=1e-12)
            assert error["moved"] == pytest.approx(norm, rel=1e-12) and error["num_answers"] == len(true)
            if name != ALL:
                means = summary.means.set_index(["step", "update", "response_type"]).loc[(step, "batch", name)]
                assert means["predicted"] == pytest.approx(np.mean(predicted), rel=1e-12)
                assert means["true"] == pytest.approx(np.mean(true), rel=1e-12) and means["num_answers"] == 5
    assert summary.updates == ["batch", "chosen", "rejected"] and summary.types == list(TYPES)


def test_answers_count_alike_whatever_their_length():
    frame = influence(error=0.3)
    longer = frame["probe_id"] < "p006"
    sums = ["num_tokens", *(name for name in frame if name.endswith("_sum"))]
    twice = frame.assign(**{name: frame[name].where(~longer, 2 * frame[name]) for name in sums})
    twice["num_tokens"] = twice["num_tokens"].astype(int)
    one, other = summary_of(frame, "float64"), summary_of(twice, "float64")
    pd.testing.assert_frame_equal(one.means, other.means)
    pd.testing.assert_frame_equal(one.errors, other.errors)
    pd.testing.assert_frame_equal(one.stretches, other.stretches)


def test_parts_add_up_answer_by_answer_and_are_absent_without_momentum():
    parts = summary_of(influence(momentum=0.25)).parts
    assert (parts["gradient"] / parts["whole"]).to_list() == pytest.approx([0.75] * 4)
    assert (parts["momentum"] / parts["whole"]).to_list() == pytest.approx([0.25] * 4)
    assert summary_of(influence(momentum=np.nan)).parts["momentum"].isna().all()


def test_rankings_are_spearmans_over_pairs_of_fixed_updates():
    frame = influence(drift=0.3, num_probes=8)
    summary = summary_of(frame)
    fixed = frame[frame["update"] != "batch"]
    table = fixed.pivot(index=["update", "probe_id", "response_type"], columns="step", values="predicted_sum")
    expected = table.corr("spearman")
    np.testing.assert_allclose(summary.matrix, expected, atol=1e-12)
    assert summary.num_pairs == len(table) == 8 * 3 * 2
    for row in summary.stretches.itertuples():
        assert row.value == pytest.approx(expected.at[row.before, row.after], abs=1e-12)
        assert row.low < row.value < row.high
    assert list(zip(summary.stretches["before"], summary.stretches["after"], strict=True)) == [
        (0, 10),
        (10, 20),
        (20, 30),
    ]


def test_what_is_ranked_is_bounded(monkeypatch):
    monkeypatch.setattr(summary_module, "MAX_STRETCHES", 3)
    monkeypatch.setattr(summary_module, "MAX_MATRIX", 4)
    monkeypatch.setattr(summary_module, "MAX_PAIRS", 40)
    summary = summary_of(influence(drift=0.1, steps=range(0, 100, 10)))
    assert list(summary.stretches["before"]) == [0, 40, 80] and list(summary.stretches["after"]) == [10, 50, 90]
    assert list(summary.matrix.index) == [0, 30, 60, 90]
    assert summary.num_pairs == 36, "six probes with six pairs each"


def test_a_step_that_is_too_large_is_told_with_its_numbers():
    frame = influence(error=0.4)
    large = found(frame)["step_too_large"]
    assert large.severity == "info" and large.evidence["steps_above"] == 4 == large.evidence["steps_judged"]
    batch = frame[frame["update"] == "batch"]
    wrong = np.linalg.norm(batch["predicted_sum"] - batch["true_sum"]) / np.linalg.norm(batch["true_sum"])
    assert large.evidence["error"] == pytest.approx(wrong, rel=1e-12) and 0.3 < wrong < 0.5
    assert f"misses {wrong:.0%} of what the recorded steps did" in large.text and "large cells" in large.text
    worse = found(influence(error=lambda step: 3.0 if step == 20 else 0.7))["step_too_large"]
    assert worse.severity == "info" and worse.evidence["worst_step"] == 20
    assert "do not explain" in worse.text and "learning rate" in worse.remedy


def test_steps_count_by_how_much_they_move():
    def early(size):
        first, later = influence(error=0.8, size=size, steps=(0,)), influence(error=0.05, steps=(10, 20, 30))
        return found(pd.concat([first, later])).get("step_too_large")

    assert early(3e-4) is None, "a small step that is off"
    told = early(3e-3)
    assert (
        told.severity == "info" and told.evidence["steps_above"] == 1 and "In 1 of 4 of them, at step 0," in told.text
    )


def test_steps_that_the_first_order_explains_are_no_finding():
    assert "step_too_large" not in found(influence(error=0.1))
    assert "step_too_large" not in found(influence(error=0.9, num_probes=3)), "too few probes"
    assert "step_too_large" not in found(influence(updates=("chosen",))), "no step was taken"


def test_a_change_within_rounding_is_not_judged():
    tiny, small = influence(error=0.9, size=1e-6), influence(error=0.9, size=1e-3)
    assert "step_too_large" in found(tiny, "float64") and "step_too_large" not in found(tiny, "float32")
    assert "step_too_large" in found(small, "float32") and "step_too_large" not in found(small, "bfloat16")
    assert len(judged_steps(summary_of(small))) == 4 and len(judged_steps(summary_of(small, "bfloat16"))) == 0
    frame = influence(error=0.9)
    first = frame["step"] == 0
    frame.loc[first, "true_sum"] = frame.loc[first, "true_sum"] * 0
    assert found(frame)["step_too_large"].evidence["steps_lost_in_rounding"] == 1
    assert "1 further step moved the answers too little" in found(frame)["step_too_large"].text


def diverged(frame, value=np.inf, column="true", step=20):
    late = (frame["step"] >= step) & ((frame["update"] == "batch") if column == "true" else True)
    return set_value(frame, late, column, value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", ["predicted", "true"])
def test_steps_that_are_not_finite_are_told_and_judged_no_further(column, value):
    told = found(diverged(influence(error=0.6), value, column))
    broken, large = told["step_not_finite"], told["step_too_large"]
    assert broken.severity == "warning" and "In 2 of 4 recorded steps, first at step 20" in broken.text
    assert broken.evidence == {"steps_not_finite": 2, "steps_recorded": 4, "first_step": 20, "most_answers": 36}
    assert large.evidence["steps_judged"] == 2 and np.isfinite(large.evidence["error"]) and "inf" not in large.text
    alone = found(diverged(influence(), value, column, step=0))
    assert set(alone) == {"step_not_finite"}, "not a word about the size of steps that nothing is known of"
    assert "step_not_finite" not in found(influence()), "fixed updates have nothing measured"


def test_a_model_that_gives_nan_to_its_answers_is_an_alert():
    frame = diverged(influence())
    assert found(frame)["step_not_finite"].severity == "warning", "a prediction alone may overflow"
    lost = frame.assign(logp_sum=frame["logp_sum"].where(frame["step"] < 20))
    assert found(lost)["step_not_finite"].severity == "alert"


def test_one_answer_that_is_not_finite_leaves_the_others_as_they_are():
    frame = influence(error=0.6)
    one = (frame["step"] == 20) & (frame["probe_id"] == "p000") & (frame["update"] == "batch")
    one &= frame["response_type"] == "chosen"
    with_it, without = summary_of(set_value(frame, one, "predicted", -np.inf)), summary_of(frame[~one])
    pd.testing.assert_frame_equal(with_it.errors, without.errors)
    assert with_it.not_finite.to_dict() == {20: 1} and without.not_finite.empty
    keys = ["step", "update", "response_type"]
    means = [one.means.set_index(keys)["predicted"].sort_index() for one in (with_it, without)]
    pd.testing.assert_series_equal(*means)
    assert np.isfinite(means[0]).all()


def test_a_step_without_finite_predictions_leaves_the_matrix_to_the_others():
    frame = influence(drift=0.3)
    whole, broken = summary_of(frame).matrix, summary_of(diverged(frame, np.nan, "predicted", step=30)).matrix
    pd.testing.assert_frame_equal(broken, whole.loc[[0, 10, 20], [0, 10, 20]])


@pytest.mark.parametrize(
    ("frame", "dtype", "said"),
    [
        (influence(), "float32", "steps are small enough for their first order and rankings hold, as far as"),
        (influence(updates=("batch",)), "float32", "No finding: steps are small enough for their first order, as far"),
        (influence(updates=("chosen",)), "float32", "No finding: rankings hold, as far as can be told"),
        (influence(num_probes=3), "float32", "nothing could be judged"),
        (influence(updates=("batch",), size=1e-5), "bfloat16", "nothing could be judged"),
    ],
    ids=["both", "only batches", "only fixed updates", "few probes", "rounding"],
)
@pytest.mark.parametrize("scored", [True, False])
def test_that_nothing_was_found_says_what_was_judged(scored, frame, dtype, said, tmp_path, capsys):
    run = write_alone(tmp_path, frame)
    if scored:
        run = write_influence(write_run(tmp_path / "run", records(types=TYPES, steps=[0])), frame)
    meta_file = run / "dynamics/meta.json"
    meta_file.write_text(json.dumps(json.loads(meta_file.read_text()) | {"akg": {"dtype": dtype}}))
    assert main(["diagnose", str(run)]) == 0
    assert said in " ".join(capsys.readouterr().out.split())


def test_a_ranking_that_changes_is_told_with_where_and_how_sure():
    unstable = found(influence(drift=0.5))["kernel_unstable"]
    assert unstable.severity == "info" and unstable.evidence["share_unstable"] == 1
    assert unstable.evidence["lowest_spearman"] < 0.9 and unstable.evidence["steps_between_records"] == 10
    assert "between steps 0 and 30" in unstable.text and "akg_every; now 10 steps" in unstable.remedy
    late = influence(drift=0.0, steps=range(0, 60, 10))
    other = influence(drift=0.0, steps=range(50, 60, 10), seed=5)
    once = pd.concat([late[late["step"] < 50], other])
    assert "kernel_unstable" not in found(once), "one stretch of five"


@pytest.mark.parametrize(
    "frame",
    [influence(drift=0.02), influence(drift=0.5, updates=("batch",)), influence(drift=0.5, num_probes=3),
     influence(drift=0.5, steps=(0,))],
    ids=["holds", "only batches", "few probes", "one step"],
)  # fmt: skip
def test_a_ranking_that_holds_or_is_unknown_is_no_finding(frame):
    assert "kernel_unstable" not in found(frame)


def test_noise_about_a_ranking_that_holds_fires_no_rule():
    assert not [name for seed in range(20) for name in found(influence(seed=seed, error=0.15, drift=0.05))]


def test_findings_stand_among_the_others_the_most_severe_first():
    frame, steps = records(SQUEEZED, argmax=0.5), summary_of(influence(error=0.6, drift=0.5))
    subjects = {"paths": summarise(frame), "influence": steps}
    judged = [Judged("policy", chapter, subjects[chapter.name], Run("dpo")) for chapter in chapters.load_all()]
    names = [finding.name for finding in findings_of(judged)]
    alone = [finding.name for finding in rules.find(frame, {"method": "dpo"})]
    assert [name for name in names if name in alone] == alone
    assert names.index("squeezing") < names.index("margin_by_rejection") < names.index("step_too_large")
    one_scoring = found_by(RULES.values(), steps, Run())
    assert {finding.name for finding in one_scoring} == {"step_too_large", "kernel_unstable"}
    for finding in one_scoring:
        assert finding.severity == "info" and finding.rule and finding.remedy and finding.evidence


def test_diagnose_tells_them(tmp_path, capsys):
    run = write_influence(write_run(tmp_path / "run", records()), influence(error=0.6, drift=0.5))
    assert main(["diagnose", str(run), "--fail_on", "info"]) == 10
    assert main(["diagnose", str(run), "--fail_on", "warning"]) == 0, "it says nothing against the training"
    assert "INFO  training steps are too large for their first-order explanation" in capsys.readouterr().out
    assert main(["diagnose", str(run), "--format", "json"]) == 0
    told = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["runs"][0]["findings"]}
    assert told["kernel_unstable"]["evidence"]["share_unstable"] == 1


def test_diagnose_tells_them_where_one_step_was_scored(tmp_path, capsys):
    run = write_influence(write_run(tmp_path / "run", records(steps=[0])), influence(error=0.6))
    assert main(["diagnose", str(run), "--fail_on", "info"]) == 10
    told = capsys.readouterr().out
    assert "one step was scored (0)" in told and "influence of 4 steps, 0 to 30" in told and "INFO  training" in told
    assert main(["diagnose", str(run), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["steps"] == [0]


def test_diagnose_tells_those_of_a_run_that_recorded_influence_alone(tmp_path, capsys):
    run = write_alone(tmp_path / "run", influence(error=0.6))
    assert main(["diagnose", str(run), "--fail_on", "info"]) == 10
    told = capsys.readouterr().out
    assert "run (dpo, finished): influence of 4 steps, 0 to 30\n" in told and "INFO  training steps" in told
    assert main(["diagnose", str(run), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["steps"] == []


@pytest.mark.parametrize("tracked", [True, False])
def test_the_end_of_training_tells_them(tracked, tmp_path, caplog):
    frame = records(types=["chosen"], num_probes=4, steps=[0, 1])
    probes, alone = probe_set(frame), SimpleNamespace(is_main_process=True, num_processes=1)
    series = Series(DynamicsStore(tmp_path), meta(frame, probes), {}, alone, "stop", attachments={}, same=[])
    series.begin(0, {})
    series.star_ids = [[0]]
    for step, rows in frame.groupby("step") if tracked else ():
        series.add(RECORDS.table({name: rows[name].tolist() for name in RECORDS.schema.names}), int(step))
    write_influence(tmp_path, influence(error=0.6))
    with caplog.at_level("INFO", logger="trl_dynamics"):
        series.end([])
    series.close()
    assert "info: training steps are too large for their first-order explanation. What the gradient" in caplog.text


def test_influence_is_read_of_one_model_and_knows_its_dtype(tmp_path):
    frame = influence(num_probes=4)
    both = pd.concat([frame, influence(num_probes=4, size=5.0).assign(model="reference")])
    run = write_influence(write_run(tmp_path / "run", records(num_probes=4)), both)
    store = DynamicsStore(run)
    assert summarise_influence(store)["policy"].dtype == "float32"
    store.write_meta(store.read_meta() | {"akg": {"dtype": "bfloat16"}})
    opened = summarise_influence(store)
    assert list(opened) == ["policy", "reference"]
    pd.testing.assert_frame_equal(opened["policy"].means, summary_of(frame).means, check_dtype=False)
    assert opened["policy"].dtype == "bfloat16"
    assert summarise_influence(DynamicsStore(write_run(tmp_path / "plain", records(num_probes=4)))) == {}
