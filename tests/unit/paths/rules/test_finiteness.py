"""What is NaN or infinite is a finding and leaves every mean, and nothing else changes."""

import json

import numpy as np
import pytest

from synthetic_answers import answers
from synthetic_runs import ALL_TYPES, SQUEEZED, STEPS, records, write_run
from trl_dynamics.cli.main import main
from trl_dynamics.findings.rules import Run
from trl_dynamics.paths import metrics, rules
from trl_dynamics.paths.chapter import CHAPTER
from trl_dynamics.paths.comparison import compare
from trl_dynamics.paths.kinds import RECORDS
from trl_dynamics.paths.samples import Samples, sample_scalars
from trl_dynamics.paths.step_table import split_frame
from trl_dynamics.paths.summary import summarise, summarise_store
from trl_dynamics.store.store import DynamicsStore
from trl_dynamics.tracking.alerts import Watch

LATE = STEPS[3:]
NUM_PROBES = 24


def broken(frame, steps=LATE, probes=NUM_PROBES, value=np.nan, columns=tuple(RECORDS.values)):
    """The answers of the first `probes` probes are not finite at `steps`."""
    rows = frame["step"].isin(steps) & (frame["probe_id"] < f"p{probes:03d}")
    frame = frame.copy()
    frame.loc[rows, list(columns)] = value
    return frame


def lost_answers(rows):
    """Greedy answers whose tokens were drawn from NaN late: loops of one token, and no log-probability."""
    bad = rows["step"].isin(LATE)
    garbled = {"logp_sum": np.nan, "logp_mean": np.nan, "repeat_share": 1.0, "distinct_2": 0.01, "same_share": 1.0}
    return rows.assign(**{name: rows[name].where(~bad, value) for name, value in garbled.items()})


def finding(frame, name="not_finite", method="dpo"):
    return next(one for one in rules.find(frame, {"method": method}) if one.name == name)


def names(frame, method="dpo"):
    return [one.name for one in rules.find(frame, {"method": method})]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_model_that_became_nan_is_an_alert_with_its_step(value):
    frame = broken(records(SQUEEZED, argmax=0.5), value=value)
    assert names(frame) == ["not_finite"]
    found = finding(frame)
    scored = NUM_PROBES * len(ALL_TYPES)
    assert found.severity == "alert" and found.title.endswith(f"from step {LATE[0]} on")
    assert found.evidence == {
        "first_step": LATE[0],
        "steps_not_finite": len(LATE),
        "steps": len(STEPS),
        "not_finite": scored,
        "scored": scored,
    }
    assert f"{scored} of {scored} scored" in found.text


@pytest.mark.parametrize("column", ["logp_mean", "argmax_logp_sum", "entropy_mean", "rest_mass_mean"])
def test_one_number_of_one_answer_is_enough_and_the_answer_leaves_every_mean(column):
    frame = records(SQUEEZED, argmax=0.5)
    row = frame.index[(frame["step"] == STEPS[-1]) & (frame["response_type"] == "chosen")][0]
    frame.loc[row, column] = np.inf
    assert finding(frame).evidence["not_finite"] == 1
    without = frame.drop(index=row)
    for name in ("logp_mean", "logp_sum"):
        ours, theirs = (summarise(one).bands(name, since_start=True) for one in (frame, without))
        assert ours.equals(theirs)
    assert summarise(frame).metric("entropy").equals(summarise(without).metric("entropy"))


def test_where_end_of_turn_was_cut_nothing_is_wrong():
    assert records()["eos_logp"].isna().any() and "not_finite" not in names(records())
    assert "not_finite" in names(broken(records(), columns=["eos_logp"], value=-np.inf, probes=1))


def test_the_others_are_judged_as_if_the_lost_probes_were_not_there_and_it_is_said():
    frame = broken(records(SQUEEZED, argmax=0.5), probes=14)
    alone = records(SQUEEZED, argmax=0.5)
    alone = alone[alone["probe_id"] >= "p014"]
    told = {one.name: one for one in rules.find(frame, {"method": "dpo"})}
    expected = {one.name: one for one in rules.find(alone, {"method": "dpo"})}
    assert set(told) == {"not_finite", *expected} and len(expected) > 2
    for name, one in expected.items():
        assert told[name].evidence == pytest.approx(one.evidence) and told[name].severity == one.severity
        assert "over the 10 of 24 probes" in told[name].text
    assert told["not_finite"].evidence["not_finite"] == 14 * len(ALL_TYPES)


def test_good_news_is_no_news_beside_it():
    frame = records({"chosen": 0.4})
    assert names(frame) == ["improvement"] and names(broken(frame, probes=5)) == ["not_finite"]


def test_one_scored_step_is_enough():
    frame = broken(records(steps=[5]), steps=[5])
    assert names(frame, "track") == ["not_finite"]
    assert finding(frame, method="track").title.endswith("from step 5 on")


def test_what_healed_is_told_with_both_ends():
    assert finding(broken(records(), steps=STEPS[1:3])).title.endswith("from step 10 to 20")
    assert finding(broken(records(), steps=STEPS[1:2])).title.endswith("at step 10")
    assert finding(broken(records(), steps=STEPS[-1:])).title.endswith("from step 320 on")


def test_loops_after_a_start_that_is_not_finite_are_told_without_it():
    rows = answers(0.9)
    rows.loc[rows["step"] == 0, ["logp_sum", "logp_mean"]] = np.nan
    summary = summarise(records())
    own = type(summary)(summary.parts, summary.first, summary.read, Samples(rows))
    told = finding(own, "degeneration")
    assert "At step 320" in told.text and "nan" not in told.text and told.evidence["loops_end"] == 8


def test_keys_stay_with_nan_and_lacking_types_have_none():
    frame = records(missing=("other_test",), types=["chosen", "rejected", "other_test"])
    whole, last = metrics.scalars(frame, 50), STEPS[-1]
    for probes in (NUM_PROBES, 7):
        lost = metrics.scalars(broken(frame, probes=probes), 50)
        assert set(lost) == set(whole)
        assert lost["probe/not_finite"] == pytest.approx(probes / NUM_PROBES, abs=0.02)
        values = {key: value for key, value in lost.items() if key != "probe/not_finite"}
        assert all(np.isnan(value) == (probes == NUM_PROBES) for value in values.values()), values
    rest = frame[frame["probe_id"] >= "p007"]
    assert lost["probe/chosen/logp_mean"] == pytest.approx(metrics.scalars(rest)["probe/chosen/logp_mean"])
    assert whole["probe/not_finite"] == 0.0
    broken_start = broken(frame, steps=[0])
    assert np.isnan(metrics.scalars(broken_start, 50)["squeeze/margin"])
    only_chosen = broken(frame[frame["response_type"] == "chosen"], steps=[last])
    assert "squeeze/margin" not in metrics.scalars(only_chosen, 50)


def test_greedy_answers_drawn_from_nan_are_no_loops():
    rows = lost_answers(answers())
    summary = summarise(records())
    own = type(summary)(summary.parts, summary.first, summary.read, Samples(rows))
    assert names(own) == ["not_finite"]
    assert finding(own).evidence["greedy_not_finite"] == 8 and "8 of 8 greedy" in finding(own).text
    last = sample_scalars(rows[rows["step"] == STEPS[-1]])
    first = sample_scalars(rows[rows["step"] == 0])
    assert set(last) == set(first) and last.pop("samples/not_finite") == 1.0
    assert all(np.isnan(value) for value in last.values()) and first["samples/not_finite"] == 0.0
    some = answers()
    bad = some["step"].isin(LATE) & (some["probe_id"] < "p003")
    few = Samples(some.where(~bad, rows))
    assert few.not_finite[320] == (3, 8)
    assert names(type(summary)(summary.parts, summary.first, summary.read, few)) == ["not_finite"]


def test_an_answer_that_ends_at_once_counts_by_its_end():
    empty = answers(start=0, end=0, steps=(0,), num_probes=4).assign(num_tokens=0, logp_sum=0.0, ended=True)
    assert sample_scalars(empty.assign(eos_logp=np.nan))["samples/not_finite"] == 1.0
    assert sample_scalars(empty.assign(eos_logp=-0.1))["samples/not_finite"] == 0.0


def test_it_is_told_at_the_first_such_scoring_and_once():
    frame, watch = broken(records(SQUEEZED, argmax=0.5)), Watch(CHAPTER, Run("dpo"))
    told = {table.step: [one.name for one in watch.add(table)] for table in split_frame(frame, 50)}
    assert [step for step, said in told.items() if "not_finite" in said] == [LATE[0]]
    first = Watch(CHAPTER, Run("dpo")).add(split_frame(broken(records(steps=[0]), steps=[0]))[0])
    assert [one.name for one in first] == ["not_finite"]


def test_a_run_that_goes_on_tells_what_was_never_told():
    seen, new = split_frame(broken(records(steps=[0, 10]), steps=[0, 10]))
    for told, expected in (((), ["not_finite"]), (("not_finite",), [])):
        watch = Watch(CHAPTER, Run("dpo"), told)
        watch.see(seen)
        assert [one.name for one in watch.add(new)] == expected


def test_a_comparison_says_what_it_leaves_out():
    whole, lost = records(SQUEEZED, argmax=0.5), broken(records(SQUEEZED, argmax=0.5))
    (only,) = compare({"whole": whole, "lost": lost})
    assert only.name == "compare_not_finite" and only.severity == "warning" and "in lost" in only.title
    assert compare({"a": whole, "b": whole}) == []


@pytest.mark.parametrize(("probes", "fail_on"), [(NUM_PROBES, "alert"), (1, "alert"), (NUM_PROBES, "info")])
def test_diagnose_ends_with_the_status_of_an_alert(tmp_path, probes, fail_on, capsys):
    path = write_run(tmp_path / "run", broken(records(), probes=probes), answers=lost_answers(answers()))
    assert main(["diagnose", str(path), "--fail_on", fail_on]) == 30
    told = capsys.readouterr().out
    assert "ALERT  log-probabilities are NaN or infinite from step 40 on" in told
    assert "No finding" not in told and " nan" not in told
    assert ("over 23 of 24 probes" in told) == (probes == 1)
    assert main(["diagnose", str(path), "--format", "json"]) == 30
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["findings"][0]["name"] == "not_finite"
    summary = summarise_store(DynamicsStore(path))["policy"]
    assert summary.samples.not_finite[320] == (8, 8)


def test_diagnose_judges_a_single_scoring_by_what_is_there(tmp_path, capsys):
    path = write_run(tmp_path / "run", broken(records(steps=[0]), steps=[0]), method="track")
    assert main(["diagnose", str(path)]) == 30
    assert "one step was scored (0)" in capsys.readouterr().out
