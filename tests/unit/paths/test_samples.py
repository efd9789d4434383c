"""What greedy answers say over a run: metrics against a slow reference, and when they count as degenerated."""

import math

import numpy as np
import pandas as pd
import pytest

from synthetic_answers import answers
from synthetic_runs import SQUEEZED, STEPS, records, write_run
from trl_dynamics.paths import rules
from trl_dynamics.paths.metrics import METRICS
from trl_dynamics.paths.rules.degeneration import loops_of
from trl_dynamics.paths.samples import SAMPLE_METRICS, Samples, load_samples, sample_scalars
from trl_dynamics.paths.summary import summarise, summarise_store
from trl_dynamics.store.store import DynamicsStore

# Metric -> the column that it is the mean of.
COLUMNS = {name: name for name in SAMPLE_METRICS} | {
    "length": "num_tokens",
    "greedy_logp": "logp_mean",
    "greedy_logp_sum": "logp_sum",
}


def slow_mean(rows: pd.DataFrame, column: str) -> float:
    known = [float(row[column]) for _, row in rows.iterrows() if not math.isnan(row[column])]
    return sum(known) / len(known) if known else math.nan


def found(loop: float, *, method: str = "dpo", drift=None, **options) -> dict:
    """Findings by name of a run with such answers."""
    summary = summarise(records(drift))
    with_answers = type(summary)(summary.parts, summary.first, summary.read, Samples(answers(loop, **options)))
    return {finding.name: finding for finding in rules.find(with_answers, {"method": method})}


@pytest.mark.parametrize("name", SAMPLE_METRICS)
def test_metrics_are_means_over_probes(name):
    frame = answers(0.8)
    frame.loc[frame["probe_id"] == "p003", ["logp_mean", "distinct_1", "distinct_2", "distinct_3", "repeat_share"]] = (
        np.nan
    )
    curve = Samples(frame).metric(name)
    assert list(curve.index) == list(STEPS)
    for step, value in curve.items():
        assert value == pytest.approx(slow_mean(frame[frame["step"] == step], COLUMNS[name]))
    assert sample_scalars(frame[frame["step"] == 320])[f"samples/{name}"] == curve[320]


def test_what_no_answer_has_is_left_out():
    empty = answers(start=0, end=0, steps=(0,), num_probes=1)
    assert set(sample_scalars(empty)) == {
        "samples/length",
        "samples/ended",
        "samples/longest_repeat",
        "samples/greedy_logp_sum",
        "samples/not_finite",
    }


def test_changes_are_paired_by_probe():
    frame = answers(0.8)
    lost = (frame["step"] == 320) & (frame["probe_id"] == "p000") | (frame["step"] == 0) & (
        frame["probe_id"] == "p001"
    )
    change = Samples(frame[~lost]).change("distinct_2")
    last, first = (frame[frame["step"] == step].set_index("probe_id")["distinct_2"] for step in (320, 0))
    differences = [last[name] - first[name] for name in first.index if name not in ("p000", "p001")]
    assert change.num_probes == 6 and change.mean == pytest.approx(sum(differences) / 6)
    assert change.se == pytest.approx(np.std(differences, ddof=1) / math.sqrt(6))


def test_loops_are_found_with_what_they_are():
    finding = found(0.9)["degeneration"]
    assert finding.severity == "alert" and "moved -0.8" in finding.text
    assert "0% stood in immediate repetitions at the start and 8" in finding.text
    assert finding.evidence["longest_repeat_change"] > 15 and finding.evidence["num_answers"] == 8
    assert "at least 0.1" in finding.rule and "gate_dpo" in finding.remedy
    assert found(0.3)["degeneration"].severity == "warning"
    assert "Use an earlier checkpoint" in found(0.9, method="another")["degeneration"].remedy


def test_answers_that_the_model_has_become_sure_of_are_an_entropy_collapse():
    """Along chosen nothing need be seen of it, where the model no longer says anything like chosen."""
    found = {}
    for share in (0.3, 0.7):
        summary, rows = summarise(records()), answers()
        rows["logp_mean"] *= np.where(rows["step"] == 320, share, 1.0)
        summary = type(summary)(summary.parts, summary.first, summary.read, Samples(rows))
        found[share] = {finding.name: finding for finding in rules.find(summary, {"method": "sft"})}
    finding = found[0.3]["entropy_collapse"]
    assert finding.title == "entropy collapse in own answers" and "1.00 nats per token and now 0.30" in finding.text
    assert finding.evidence["greedy_logp_end"] == pytest.approx(-0.3) and found[0.7] == {}


def test_what_own_answers_say_of_a_fall_of_chosen():
    """Sure of itself, a model may have settled on answers as good; with loops it has not."""
    fallen = dict.fromkeys(("chosen", "other_test", "other_train", "chosen_rephrase_semantic"), -0.9)
    for loop, sure, told in (
        (0.0, 1.0, "displacement_harmful"),
        (0.0, 0.3, "displacement"),
        (0.8, 0.3, "displacement_harmful"),
    ):
        summary = summarise(records(fallen))
        rows = answers(loop)
        rows["logp_mean"] *= np.where(rows["step"] == 320, sure, 1.0)
        summary = type(summary)(summary.parts, summary.first, summary.read, Samples(rows))
        names = {finding.name for finding in rules.find(summary, {"method": "dpo"})}
        assert {name for name in names if name.startswith("displacement")} == {told}, (loop, sure)
    alone = found(0.8, drift={"chosen": -0.3}, method="sft")
    assert "displacement_benign" in found(0.0, drift={"chosen": -0.3}, method="sft")
    assert "own answers degenerate" in alone["displacement_harmful"].title


def test_short_loops_are_found_by_their_number():
    """Two answers of eight that end in repeated marks move no mean beyond its noise, and are two more than healthy."""
    for num_loops, num_probes, told in ((1, 8, False), (2, 8, True), (3, 40, False), (4, 40, True)):
        rows = answers(num_probes=num_probes)
        looping = (rows["step"] == 320) & (rows["probe_id"] < f"p{num_loops:03d}")
        rows.loc[looping, "repeat_share"] = 0.6
        summary = summarise(records())
        summary = type(summary)(summary.parts, summary.first, summary.read, Samples(rows))
        assert loops_of(summary.samples) == (0, num_loops)
        said = {finding.name: finding for finding in rules.find(summary, {"method": "dpo"})}
        assert ("degeneration" in said) == told, (num_loops, num_probes)
        if told:
            finding = said["degeneration"]
            assert finding.severity == "warning" and finding.title.endswith("own answers repeat themselves")
            assert f"{num_loops} of {num_probes} answers are loops (before 0)" in finding.text
            assert finding.evidence["loops_end"] == num_loops


def test_answers_that_shrink_to_stubs_are_found():
    finding = found(0.0, start=24, end=6)["degeneration"]
    assert finding.severity == "warning" and finding.title.endswith("shrink to stubs")
    assert "answers have 7 tokens (before 25)" in finding.text and finding.evidence["length_end"] == 6.875
    assert "degeneration" not in found(0.0, start=24, end=16)
    assert "degeneration" not in found(0.0, start=24, end=6, method="sft"), "SFT teaches lengths"
    cut = answers(0.0, start=24, end=6).assign(ended=lambda rows: rows["step"] > 0)
    summary = summarise(records())
    never_ended = type(summary)(summary.parts, summary.first, summary.read, Samples(cut))
    assert "degeneration" not in [finding.name for finding in rules.find(never_ended, {"method": "dpo"})]


def test_one_phrase_for_many_prompts_is_found():
    finding = found(0.0, alike=0.6)["degeneration"]
    assert finding.severity == "warning" and finding.title.endswith("own answers are the same for different prompts")
    # Five of eight answers are one: 5 x 4 of 8 x 7 pairs.
    assert finding.evidence["same_share_change"] == pytest.approx(20 / 56)
    assert "same answer in 36% of cases (before 0%)" in finding.text
    assert "degeneration" not in found(0.0, alike=0.25), "2 of 56 pairs are within the threshold"
    assert "10% more of cases" in finding.rule and "falls by 50%" in finding.rule
    both = found(0.9, start=60, end=24)["degeneration"]
    assert both.title.endswith("repeat themselves and shrink to stubs") and both.severity == "alert"


def test_answers_that_hold_or_grow_longer_are_no_degeneration():
    assert "degeneration" not in found(0.0)
    assert "degeneration" not in found(0.0, start=8, end=64)
    assert "degeneration" not in found(0.9, num_probes=3), "too few to judge"
    assert "degeneration" not in found(0.9, steps=(0,)), "no change without two steps"


def test_a_run_that_degenerates_did_not_improve():
    better = {"chosen": 0.5}
    assert "improvement" in found(0.0, drift=better)
    assert "improvement" not in found(0.9, drift=better) and "degeneration" in found(0.9, drift=better)


def test_a_store_gives_what_was_written(tmp_path):
    models = [records(SQUEEZED, model=model) for model in ("a", "b")]
    written = pd.concat([answers(0.9, model="a"), answers(0.0, model="b")])
    run = write_run(tmp_path / "run", pd.concat(models), answers=written)
    summaries = summarise_store(DynamicsStore(run))
    for model, rows in written.groupby("model"):
        given = summaries[model].samples
        assert given.steps == list(STEPS) and "text" not in given.rows
        pd.testing.assert_series_equal(given.metric("distinct_2"), Samples(rows).metric("distinct_2"))
    names = {model: [f.name for f in rules.find(summary, {"method": "dpo"})] for model, summary in summaries.items()}
    assert "degeneration" in names["a"] and "degeneration" not in names["b"]
    plain = write_run(tmp_path / "plain", models[0])
    assert next(iter(summarise_store(DynamicsStore(plain)).values())).samples is None
    loaded = load_samples(plain, run)
    assert set(loaded["run"]) == {"run"} and len(loaded) == len(written)
    assert load_samples(plain).empty and list(load_samples(plain).columns) == list(loaded.columns)


def test_every_metric_says_what_it_is():
    for name, metric in (METRICS | SAMPLE_METRICS).items():
        assert metric.title and metric.meaning and metric.formula and metric.unit and metric.healthy, name
        described = metric.function.__doc__
        assert all(text in described for text in (metric.meaning, metric.formula, metric.unit, metric.healthy)), name


def looping(share, steps=STEPS, loops=4, num_probes=8):
    """So many answers are loops at every step."""
    rows = answers(steps=steps, num_probes=num_probes)
    return rows.assign(repeat_share=rows["repeat_share"].where(rows["probe_id"] >= f"p{loops:03d}", share))


@pytest.mark.parametrize(
    ("loops", "severity"), [(1, None), (2, "warning"), (3, "warning"), (4, "alert"), (8, "alert")]
)
@pytest.mark.parametrize("method", ["dpo", "sft", "track"])
def test_answers_that_are_loops_from_the_start_on_are_degenerate(loops, severity, method):
    summary = summarise(records({"chosen": 0.5}))
    own = type(summary)(summary.parts, summary.first, summary.read, Samples(looping(0.99, loops=loops)))
    said = {one.name: one for one in rules.find(own, {"method": method})}
    assert ("degeneration" in said) == (severity is not None)
    if severity:
        told = said["degeneration"]
        assert told.severity == severity and told.title.endswith("own answers are loops")
        assert told.evidence["loops_start"] == told.evidence["loops_end"] == loops
        assert "at the start already" in told.remedy and "improvement" not in said


def test_loops_count_where_one_step_was_answered_and_need_enough_answers():
    summary = summarise(records(steps=[0]))
    for num_probes, told in ((8, {"degeneration"}), (3, set())):
        rows = looping(0.99, steps=[0], loops=8, num_probes=num_probes)
        own = type(summary)(summary.parts, summary.first, summary.read, Samples(rows))
        said = rules.find(own, {"method": "track"})
        assert {one.name for one in said} == told
        assert all("At step 0 99%" in one.text for one in said)


def test_loops_that_were_there_at_the_start_are_no_reason_to_call_a_fall_harmful():
    """They are no good answers to have settled on either."""
    for drift, entropy, name in (
        ({"chosen": -0.3}, 0.0, "displacement_benign"),
        (SQUEEZED, -1.2, "displacement_harmful"),
    ):
        summary = summarise(records(drift, argmax=0.5 if entropy else 0.0, entropy=entropy))
        own = type(summary)(summary.parts, summary.first, summary.read, Samples(looping(0.99, loops=8)))
        assert name in {one.name for one in rules.find(own, {"method": "dpo"})}


def test_one_answer_for_all_prompts_is_degenerate_from_the_start_on():
    summary = summarise(records())
    for share, told in ((1.0, True), (0.9, True), (0.5, False)):
        rows = answers().assign(same_share=share)
        own = type(summary)(summary.parts, summary.first, summary.read, Samples(rows))
        said = {one.name: one for one in rules.find(own, {"method": "track"})}
        assert ("degeneration" in said) == told, share
        if told:
            assert said["degeneration"].severity == "warning"
            assert said["degeneration"].title.endswith("own answers are one for all")
            assert "at the start already" in said["degeneration"].remedy
