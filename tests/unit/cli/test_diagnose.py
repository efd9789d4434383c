"""trl-dynamics diagnose: the findings of any run in words or as JSON, and an exit status that CI can rely on."""

import json
import re
import subprocess
import sys

import pandas as pd
import pytest

from synthetic_runs import SQUEEZED, records, write_run
from trl_dynamics.cli import diagnose
from trl_dynamics.cli.main import main
from trl_dynamics.paths import chapter, rules
from trl_dynamics.paths.kinds import RECORDS
from trl_dynamics.store.manifest import SCHEMA_VERSION
from trl_dynamics.store.store import DynamicsStore

FRAMES = {
    "alert": records(SQUEEZED, argmax=0.5),
    "warning": records(eos=-0.8),
    "info": records({"chosen": 0.4}),
    "none": records(),
}


@pytest.fixture
def make_run(tmp_path):
    return lambda name, frame=FRAMES["alert"], **entries: str(write_run(tmp_path / name, frame, **entries))


@pytest.mark.parametrize(
    ("fail_on", "statuses"),
    [
        ([], {"alert": 30, "warning": 0, "info": 0, "none": 0}),
        (["--fail_on", "info"], {"alert": 30, "warning": 20, "info": 10, "none": 0}),
        (["--fail_on", "alert"], {"alert": 30, "warning": 0, "info": 0, "none": 0}),
        (["--fail_on", "warning"], {"alert": 30, "warning": 20, "info": 0, "none": 0}),
        (["--fail_on", "never"], {"alert": 0, "warning": 0, "info": 0, "none": 0}),
    ],
    ids=["default", "info", "alert", "warning", "never"],
)
def test_exit_status_is_that_of_the_worst_finding_of_any_run(make_run, fail_on, statuses, capsys):
    runs = {name: make_run(name, frame) for name, frame in FRAMES.items()}
    assert {name: main(["diagnose", path, *fail_on]) for name, path in runs.items()} == statuses
    assert main(["diagnose", *runs.values(), *fail_on]) == max(statuses.values())


def test_findings_are_told_as_they_are(make_run, capsys):
    path = make_run("run")
    found = rules.find(FRAMES["alert"], {"method": "dpo"})
    main(["diagnose", path])
    shown = " ".join(capsys.readouterr().out.split())
    main(["diagnose", path, "--verbose"])
    verbose = " ".join(capsys.readouterr().out.split())
    assert len(found) > 2
    for finding in found:
        for part in (f"{finding.severity.upper()} {finding.title}", finding.text, f"What to do: {finding.remedy}"):
            assert part in shown and part in verbose
        assert finding.rule in verbose and finding.rule not in shown
    assert "since step 40" in shown, "evidence"
    assert shown.startswith("run (dpo, finished): 7 probing steps, 0 to 320 Moved since the start")


def test_json_holds_all_of_it_and_nothing_else_is_printed(make_run, capsys):
    status = main(["diagnose", make_run("run"), make_run("calm", FRAMES["none"]), "nowhere", "--format", "json"])
    shown = json.loads(capsys.readouterr().out)
    first, second = shown["runs"]
    found = rules.find(FRAMES["alert"], {"method": "dpo"})
    assert [entry["name"] for entry in first["findings"]] == [finding.name for finding in found]
    assert first["findings"][0] == {name: getattr(found[0], name) for name in first["findings"][0]}
    assert (first["method"], first["status"], first["steps"][-1]) == ("dpo", "finished", 320)
    assert second["findings"] == [] and shown["worst"] == "alert"
    assert [entry["path"] for entry in shown["not_judged"]] == ["nowhere"]
    assert status == shown["exit_status"] == 30, "an alert outweighs a run that could not be judged"


@pytest.mark.parametrize(
    ("fail_on", "statuses"),
    [
        ("info", {"alert": 30, "warning": 20, "info": 10, "none": 3}),
        ("warning", {"alert": 30, "warning": 20, "info": 3, "none": 3}),
        ("alert", {"alert": 30, "warning": 3, "info": 3, "none": 3}),
        ("never", {"alert": 0, "warning": 0, "info": 0, "none": 0}),
    ],
)
def test_a_run_that_could_not_be_judged_hides_no_finding_and_is_told_in_text_and_json(
    make_run, fail_on, statuses, capsys
):
    for name, status in statuses.items():
        given = ["diagnose", "nowhere", make_run(name, FRAMES[name]), "--fail_on", fail_on]
        assert main(given) == main([*given, "--format", "json"]) == status
        out = capsys.readouterr().out
        text, data = out.split("{", 1)
        assert "not judged: nowhere" in text and f"{name} (dpo, finished)" in text
        data = json.loads("{" + data)
        assert [entry["path"] for entry in data["not_judged"]] == ["nowhere"]
        assert [entry["run"] for entry in data["runs"]] == [name] and data["exit_status"] == status


def test_a_run_with_nothing_wrong_is_one_sentence(make_run, capsys):
    main(["diagnose", make_run("calm", FRAMES["none"])])
    told = " ".join(capsys.readouterr().out.split())
    assert told.endswith("No finding: what moved is too little to count, or is as it should be.")
    assert not [name for name in rules.RULES if name in told]


def test_a_run_that_trains_is_judged_as_of_now(make_run, capsys):
    assert main(["diagnose", make_run("run", status="running")]) == 30
    assert "not finished, judged as of now" in capsys.readouterr().out
    early = make_run("early", records(steps=[0]), status="running")
    assert main(["diagnose", early]) == diagnose.NOT_JUDGED
    assert "try again later" in capsys.readouterr().err


def break_meta(path):
    (DynamicsStore(path).root / "meta.json").write_text('{"schema_version": ')


def make_newer(path):
    meta = DynamicsStore(path).root / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"schema_version": SCHEMA_VERSION + 1}))


def lose_a_file(path):
    DynamicsStore(path).files(RECORDS)[1].unlink()


def drop_records(path):
    DynamicsStore(path).drop_after(-1)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (drop_records, "no records in .*nothing was ever recorded"),
        (make_newer, "upgrade trl-dynamics"),
        (break_meta, "meta.json is damaged"),
        (lose_a_file, "is missing"),
    ],
)
def test_a_run_that_cannot_be_judged_is_one_line_with_a_status_of_its_own(make_run, harm, reason, capsys):
    path = make_run("broken")
    harm(path)
    good = make_run("good", FRAMES["info"])
    assert main(["diagnose", path, good]) == diagnose.NOT_JUDGED
    shown = capsys.readouterr()
    assert re.search(f"not judged: .*{reason}", shown.out)
    assert "chosen rose" in shown.out, "the others are judged all the same"
    assert re.search(reason, shown.err)
    assert len(shown.err.strip().splitlines()) == 1 and path in shown.err


def test_a_run_that_changes_while_it_is_read_is_no_traceback(make_run, monkeypatch, capsys):
    def vanished(store):
        raise FileNotFoundError(2, "No such file", "records/part-1.parquet")

    monkeypatch.setattr(chapter, "summarise_store", vanished)
    assert main(["diagnose", make_run("run")]) == diagnose.NOT_JUDGED
    assert "changed while it was read (records/part-1.parquet is gone); try again" in capsys.readouterr().err


def test_models_of_a_run_are_judged_one_by_one(tmp_path, capsys):
    several = pd.concat([records(SQUEEZED, argmax=0.5, model="bad"), records(steps=[7], model="single")])
    path = write_run(tmp_path / "models", several, method="track")
    assert main(["diagnose", str(path)]) == 30
    shown = capsys.readouterr().out
    assert "models: bad (track, finished)" in shown
    assert "models: single (track, finished): one step was scored (7): there is no change to judge" in shown


def test_it_starts_without_torch(make_run):
    code = f"""
import sys
from trl_dynamics.cli.main import main
status = main(["diagnose", {make_run("run")!r}])
assert not {{"torch", "trl", "transformers", "accelerate"}} & set(sys.modules), sorted(sys.modules)
sys.exit(status)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 30
