"""Alerts while training: once per finding, only what stands, to the trackers that report_to names and no others."""

import logging
import sys

import pytest

from synthetic_answers import answers
from synthetic_runs import SQUEEZED, VOCAB_SIZE, records
from trl_dynamics.findings.finding import Finding
from trl_dynamics.findings.rules import Run
from trl_dynamics.paths import rules
from trl_dynamics.paths.chapter import CHAPTER
from trl_dynamics.paths.step_table import split_frame
from trl_dynamics.tracking import alerts

SEVERE = Finding("squeezing", "alert", "squeezing: it happens", "In numbers.", remedy="Stop earlier.")
MILD = Finding("end_of_turn_loss", "warning", "no end", "In numbers.", remedy="Check the data.")

WANDB = """
sent = []
class Run:
    def alert(self, title, text, level=None, wait_duration=None):
        assert len(title) < 64 and level in ("INFO", "WARN", "ERROR")
        sent.append((title, text, level))
run = {run}
"""
TRACKIO = """
import enum
sent = []
class AlertLevel(str, enum.Enum):
    INFO, WARN, ERROR = "info", "warn", "error"
def alert(title, text=None, level=AlertLevel.WARN, webhook_url=None):
    {body}
"""


def watching(method, told=()):
    """A watch of learning paths."""
    return alerts.Watch(CHAPTER, Run(method), told)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Install a tracker of that name and source, which is forgotten after the test."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)

    yield install
    for name in alerts.SENDERS:
        sys.modules.pop(name, None)


def told(frame, method="dpo", watch=None, samples=None):
    """What a watch says, step by step."""
    watch = watch or watching(method)
    own = {} if samples is None else dict(list(samples.groupby("step")))
    tables = split_frame(frame, VOCAB_SIZE)
    return {table.step: [f.name for f in watch.add(table, own.get(table.step))] for table in tables}


def test_a_finding_is_told_once_at_the_second_step_in_a_row():
    said = told(records(SQUEEZED, argmax=0.5))
    # Squeezing holds from step 40 on (see test_findings), harmful displacement of -0.15 from step 160 on.
    assert "squeezing" in said[80] and said[40].count("squeezing") == 0
    assert "displacement_harmful" in said[320]
    names = [name for step in said.values() for name in step]
    assert len(set(names)) == len(names)


def test_what_comes_and_goes_is_not_told():
    falling = ("chosen", "other_test")
    flicker = records(lambda name, t: -0.9 if name in falling and t in (10 / 320, 40 / 320, 160 / 320) else 0.0)
    assert not any(told(flicker).values())
    longer = records(lambda name, t: -0.9 if name in falling and t in (10 / 320, 20 / 320) else 0.0)
    assert told(longer)[20] == ["displacement_harmful"]


def test_own_answers_count_as_they_do_at_the_end():
    names = {name for step in told(records(), samples=answers(0.9)).values() for name in step}
    assert names == {"degeneration"}
    assert not any(told(records()).values())


def test_information_and_noise_are_no_alerts():
    benign = records({"chosen": -0.3, "rejected": -0.2})
    assert [f.severity for f in rules.find(benign, {"method": "dpo"})] == ["info"]
    assert not any(told(benign).values())
    assert not any(told(records({"chosen": 0.4}, noise=0.1), "sft").values())


def test_a_watch_that_goes_on_tells_what_one_that_never_stopped_tells():
    frame = records(SQUEEZED, argmax=0.5, entropy=-1.2, eos=-0.9)
    whole = told(frame)
    for stop in (10, 20, 40, 80, 160):
        before = told(frame[frame["step"] <= stop])
        watch = watching("dpo", [name for step in before.values() for name in step])
        known = frame[frame["step"].isin([0, stop])]
        assert not any(told(known, watch=watch).values()), "looking at what is there tells nothing"
        after = told(frame[frame["step"] > stop], watch=watch)
        assert before | after == whole


def test_trackers_that_are_named_get_the_alert(fake, caplog):
    fake("wandb", WANDB.format(run="Run()"))
    fake("trackio", TRACKIO.format(body="sent.append((title, text, level))"))
    with caplog.at_level(logging.WARNING):
        alerts.tell([SEVERE, MILD], 40, ["tensorboard", "wandb", "trackio"])
    import trackio
    import wandb

    assert [(title, level) for title, _, level in wandb.sent] == [("squeezing", "ERROR"), ("end of turn loss", "WARN")]
    assert [(title, level.value) for title, _, level in trackio.sent] == [
        ("squeezing", "error"),
        ("end of turn loss", "warn"),
    ]
    text = wandb.sent[0][1]
    assert "step 40" in text and "squeezing: it happens. In numbers." in text and "Stop earlier." in text
    assert [record.message.split(":")[0] for record in caplog.records] == ["alert", "warning"]


def test_a_tracker_is_not_imported_unless_it_is_named_and_there_is_something_to_tell(fake, caplog):
    fake("wandb", "raise RuntimeError('imported')")
    fake("trackio", "raise RuntimeError('imported')")
    alerts.tell([SEVERE], 40, ["tensorboard"])
    alerts.tell([], 40, ["wandb", "trackio"])
    assert not {"wandb", "trackio"} & set(sys.modules)
    assert [record.message for record in caplog.records] == [caplog.records[0].message], "the console alone"


def test_without_a_run_or_alerts_of_its_own_a_tracker_is_left_out(fake, caplog):
    fake("wandb", WANDB.format(run="None"))
    fake("trackio", "version = 'before alerts'")
    alerts.tell([SEVERE], 40, ["wandb", "trackio", "mlflow"])
    assert sys.modules["wandb"].sent == []
    assert len(caplog.records) == 1 and caplog.records[0].message.startswith("alert: At step 40")


@pytest.mark.parametrize("body", ["raise RuntimeError('Call trackio.init() first')", "raise SystemError('boom')"])
def test_a_tracker_that_fails_is_told_and_stops_nothing(fake, caplog, body):
    fake("trackio", TRACKIO.format(body=body))
    alerts.tell([SEVERE], 40, ["trackio"])
    assert "trackio did not take the alert 'squeezing'" in caplog.text


def test_a_tracker_that_is_not_installed_is_left_out_and_a_broken_one_told(fake, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    alerts.tell([SEVERE], 40, ["wandb"])
    assert len(caplog.records) == 1
    fake("trackio", "import a_package_that_does_not_exist")
    alerts.tell([SEVERE], 40, ["trackio"])
    assert "no alerts go to trackio" in caplog.text


def test_loops_that_were_there_at_the_start_hide_no_new_ones():
    """Of 8 answers 2 are loops, which is reported, and all from step 80 on."""
    rows = answers()
    rows.loc[(rows["probe_id"] < "p002") | (rows["step"] >= 80), "repeat_share"] = 0.99
    tables = split_frame(records())
    watch, told = watching("sft"), []
    for table in tables:
        found = watch.add(table, rows[rows["step"] == table.step])
        told += [(table.step, one.name, one.severity) for one in found]
    assert told == [(10, "degeneration", "warning"), (160, "degeneration", "alert")]
    later = watching("sft", ["degeneration"])
    assert not [one for table in tables for one in later.add(table, rows[rows["step"] == table.step])]
