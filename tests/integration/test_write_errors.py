"""A disk that fails during training: told once, nothing that was there is lost, and training goes on, or stops."""

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from transformers import TrainerCallback

import trl_dynamics
from tiny_runs import PROBES, make_trainer
from trl_dynamics.paths.kinds import RECORDS
from trl_dynamics.paths.records import read_baseline, read_records
from trl_dynamics.store import files
from trl_dynamics.store.store import DynamicsStore

STEPS = {"probes": PROBES, "max_steps": 4, "probe_every": 1}
CODES = [errno.ENOSPC, errno.EACCES, errno.EROFS]


class FullDisk(TrainerCallback):
    """Every write of ours to a path whose name contains `name` fails from one step until another."""

    def __init__(self, monkeypatch, code: int, *, since: int = 0, until: int = 10**9, name: str = ""):
        self.step, perform = 0, files.perform

        def broken(operation, path, action, *arguments):
            if since <= self.step < until and operation in ("write", "make folder") and name in str(path):
                raise OSError(code, os.strerror(code))
            return perform(operation, path, action, *arguments)

        monkeypatch.setattr(files, "perform", broken)

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step + 1


def run_on(disk: FullDisk, output_dir, **options):
    trainer = make_trainer("sft", output_dir, **(STEPS | options))
    trainer.add_callback(disk)
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps
    return trainer


def warnings(caplog) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if "Lost:" in entry.getMessage()]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("reference")
    make_trainer("sft", folder, **STEPS).train()
    return read_records(DynamicsStore(folder))


def rows(frame: pd.DataFrame, *steps: int) -> pd.DataFrame:
    return frame[frame["step"].isin(steps)].reset_index(drop=True)


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_training_goes_on_without_the_records_that_cannot_be_written(code, reference, tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING, "trl_dynamics"):
        run_on(FullDisk(monkeypatch, code, since=2, until=4), tmp_path)
    store = DynamicsStore(tmp_path)
    pd.testing.assert_frame_equal(read_records(store), rows(reference, 0, 1, 4), check_exact=True)
    told = warnings(caplog)
    assert len(told) == 1, "one warning, however many steps fail"
    for part in (os.strerror(code), "nothing already written was lost", "Free space", "Lost: the records of step 2"):
        assert part in told[0]
    assert (
        "written again, from step 4" in caplog.text and "2 probing steps could not be written: [2, 3]" in caplog.text
    )
    assert store.read_meta()["lost_steps"] == [2, 3] and store.read_meta()["status"] == "finished"
    assert len(list((store.root / "records").iterdir())) == 1


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_training_stops_when_asked_to(code, reference, tmp_path, monkeypatch):
    with pytest.raises(OSError, match="nothing already written was lost") as caught:
        run_on(FullDisk(monkeypatch, code, since=2), tmp_path, probe_on_error="stop")
    assert caught.value.errno == code
    pd.testing.assert_frame_equal(read_records(DynamicsStore(tmp_path)), rows(reference, 0, 1), check_exact=True)
    assert not list((tmp_path / "dynamics").rglob("*.tmp"))


@pytest.mark.parametrize("name", ["manifest.json", "meta.json", "trainer_log.json", "baseline.parquet", "config.yaml"])
def test_every_file_may_be_the_one_that_fails(name, reference, tmp_path, monkeypatch, caplog):
    """Whatever could not be written at first is there once the disk has room again."""
    with caplog.at_level(logging.WARNING, "trl_dynamics"):
        run_on(FullDisk(monkeypatch, errno.ENOSPC, until=2, name=name), tmp_path)
    assert len(warnings(caplog)) == 1
    store = DynamicsStore(tmp_path)
    kept = (0, 1, 2, 3, 4) if name in ("trainer_log.json",) else (2, 3, 4)
    pd.testing.assert_frame_equal(read_records(store), rows(reference, *kept), check_exact=True)
    assert store.read_trainer_log() and store.read_config()["probe_every"] == 1 and read_baseline(store)
    assert store.read_meta()["lost_steps"] == [step for step in range(5) if step not in kept]


def test_a_store_that_cannot_be_made_costs_the_records_only(tmp_path, monkeypatch, caplog):
    make_trainer("sft", tmp_path, **(STEPS | {"max_steps": 1})).train()
    before = read_records(DynamicsStore(tmp_path))
    with caplog.at_level(logging.WARNING, "trl_dynamics"):
        trainer = run_on(FullDisk(monkeypatch, errno.EROFS), tmp_path)
    assert len(warnings(caplog)) == 1 and "Read-only file system" in warnings(caplog)[0]
    assert not trainer.probe_callback.has_records
    trainer.create_model_card()
    assert "Training dynamics" not in (tmp_path / "README.md").read_text(), "the earlier run's records are not ours"
    pd.testing.assert_frame_equal(read_records(DynamicsStore(tmp_path)), before)
    with pytest.raises(OSError, match="cannot write probe records"):
        run_on(FullDisk(monkeypatch, errno.EROFS), tmp_path, probe_on_error="stop")


def test_a_run_that_never_had_a_store_is_resumed_with_a_new_one(tmp_path, monkeypatch, caplog):
    """Its checkpoint says so: an earlier run's records in the same place are not taken for its own."""
    options = {"save_strategy": "steps", "save_steps": 2}
    make_trainer("sft", tmp_path, **STEPS).train()
    with monkeypatch.context() as patch:
        run_on(FullDisk(patch, errno.ENOSPC), tmp_path, **options)
    trainer = make_trainer("sft", tmp_path, **STEPS, **options)
    with caplog.at_level(logging.WARNING, "trl_dynamics"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "no records could be written before step 2: they begin here" in caplog.text
    assert DynamicsStore(tmp_path).steps(RECORDS, 0) == [2, 3, 4]
    assert DynamicsStore(tmp_path).read_meta()["baseline_step"] == 2
    assert (tmp_path / "dynamics-old-1").is_dir()


def test_a_resume_that_cannot_be_written_keeps_the_records(tmp_path, monkeypatch):
    options = STEPS | {"save_strategy": "steps", "save_steps": 2}
    make_trainer("sft", tmp_path, **options).train()
    before = read_records(DynamicsStore(tmp_path))
    trainer = make_trainer("sft", tmp_path, **options)
    with monkeypatch.context() as patch:
        trainer.add_callback(FullDisk(patch, errno.EROFS))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    pd.testing.assert_frame_equal(read_records(DynamicsStore(tmp_path)), before, check_exact=True)
    trainer = make_trainer("sft", tmp_path, **options)
    trainer.add_callback(FullDisk(monkeypatch, errno.EROFS, until=4))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    pd.testing.assert_frame_equal(read_records(DynamicsStore(tmp_path)), rows(before, 0, 1, 2, 4), check_exact=True)


def test_what_may_happen_on_an_error_is_checked(tmp_path):
    with pytest.raises(ValueError, match="probe_on_error is 'ignore', expected one of warn, stop"):
        make_trainer("sft", tmp_path, **STEPS, probe_on_error="ignore")


@pytest.mark.parametrize("on_error", ["warn", "stop"])
def test_a_limit_of_the_operating_system(on_error, reference, tmp_path):
    """RLIMIT_FSIZE: files of records do not fit at steps 2 and 3. Permissions would say nothing, tests run as root."""
    worker = Path(__file__).parents[1] / "support/limited_worker.py"
    path = os.pathsep.join([str(worker.parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(worker), str(tmp_path), on_error]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=240)
    store = trl_dynamics.store.store.DynamicsStore(tmp_path)
    if on_error == "stop":
        assert done.returncode != 0 and "File too large" in done.stderr
        pd.testing.assert_frame_equal(read_records(store), rows(reference, 0, 1), check_exact=True)
        return
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"steps": 4}
    assert done.stderr.count("Training goes on") == 1 and "Lost: the records of step 2" in done.stderr
    assert "lost: the records of step 3" in done.stderr, "later losses are told in short"
    pd.testing.assert_frame_equal(read_records(store), rows(reference, 0, 1, 4), check_exact=True)
