"""A store of an earlier schema version is read as it is, and becomes one of today's when it is written to."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from small_stores import Killed, check_resume, count_operations, interrupt, resume, snapshot, write_records
from trl_dynamics import load_records
from trl_dynamics.influence.kind import INFLUENCE
from trl_dynamics.paths.kinds import RECORDS, SAMPLES
from trl_dynamics.paths.records import read_probe_set, read_records
from trl_dynamics.store import files
from trl_dynamics.store.manifest import SCHEMA_VERSION
from trl_dynamics.store.store import DynamicsStore

DATA = Path(__file__).parents[2] / "data"
# Record files of each: from version 2 on the first two steps are merged into one.
FILES = {1: 3, 2: 2, 3: 2}
PLAN = json.loads((DATA / "store_v1" / "dynamics" / "meta.json").read_text())["batch_plan"]["fingerprint"]


@pytest.fixture(params=FILES)
def version(request) -> int:
    return request.param


@pytest.fixture
def store(version, tmp_path) -> DynamicsStore:
    shutil.copytree(DATA / f"store_v{version}" / "dynamics", tmp_path / "run" / "dynamics")
    return DynamicsStore(tmp_path / "run")


def stored_rows(*steps: int) -> pd.DataFrame:
    """The rows that the stores of every version hold."""
    lines = (DATA / "store_v1" / "records.jsonl").read_text().splitlines()
    rows = pd.DataFrame([json.loads(line) for line in lines]).astype({"num_tokens": "int32"})
    return rows[rows["step"].isin(steps)].reset_index(drop=True)


def test_reading_an_earlier_version_writes_nothing(version, store):
    before = snapshot(store.output_dir)
    assert store.read_meta()["schema_version"] == version
    pd.testing.assert_frame_equal(read_records(store), stored_rows(0, 1, 2), check_exact=True)
    pd.testing.assert_frame_equal(
        load_records(store.output_dir).drop(columns="run"), stored_rows(0, 1, 2), check_exact=True
    )
    assert store.steps(RECORDS, 0) == [0, 1, 2] and len(store.files(RECORDS)) == FILES[version]
    assert store.steps(SAMPLES) == ([2] if version == 3 else []) and len(store.read(SAMPLES)) == (version == 3)
    assert store.steps(INFLUENCE) == ([0, 1, 2] if version == 3 else [])
    assert check_resume(store, read_probe_set(store), PLAN)["baseline_step"] == 0
    assert snapshot(store.output_dir) == before


@pytest.mark.parametrize("step", [0, 1, 2])
def test_resuming_an_earlier_version_makes_it_todays(step, store):
    later = read_records(store, {2})
    resume(store, read_probe_set(store), PLAN, step)
    assert store.read_meta()["schema_version"] == SCHEMA_VERSION == 4
    pd.testing.assert_frame_equal(read_records(store), stored_rows(*range(step + 1)), check_exact=True)
    write_records(store, RECORDS.table(later.to_dict("list")), step=2)
    store.compact()
    # From here on an earlier release refuses it, instead of dropping from the listing what it does not know.
    assert json.loads((store.root / "manifest.json").read_text())["schema_version"] == SCHEMA_VERSION
    pd.testing.assert_frame_equal(read_records(store), stored_rows(*range(step + 1), 2), check_exact=True)
    assert [path.name for path in (store.root / "records").iterdir()] == [path.name for path in store.files(RECORDS)]


def test_merging_an_earlier_version(store):
    store.compact()
    assert len(store.files(RECORDS)) == 1
    pd.testing.assert_frame_equal(read_records(store), stored_rows(0, 1, 2), check_exact=True)


def influence_rows(*steps: int) -> list[dict]:
    """The rows of influence that the store of version 3 holds."""
    lines = (DATA / "store_v3" / "influence.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["step"] in steps]


def read_influence(store: DynamicsStore) -> list[dict]:
    frame = store.read(INFLUENCE)
    return [{name: plain(value) for name, value in row.items()} for row in frame.to_dict("records")]


def plain(value):
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.fixture
def unlisted(tmp_path) -> DynamicsStore:
    """The store of version 3, whose manifest does not list its influence."""
    shutil.copytree(DATA / "store_v3" / "dynamics", tmp_path / "v3" / "dynamics")
    return DynamicsStore(tmp_path / "v3")


@pytest.mark.parametrize("step", [0, 1, 2])
def test_files_that_no_manifest_listed_are_dropped_merged_and_written_as_others(step, unlisted):
    assert read_influence(unlisted) == influence_rows(0, 1, 2)
    resume(unlisted, read_probe_set(unlisted), PLAN, step)
    assert read_influence(unlisted) == influence_rows(*range(step))
    again = {name: [row[name] for row in influence_rows(2)] for name in INFLUENCE.schema.names}
    unlisted.write(2, {INFLUENCE: INFLUENCE.table(again)})
    unlisted.compact()
    assert read_influence(unlisted) == influence_rows(*range(step), 2)
    assert len(unlisted.files(INFLUENCE)) == 1 == len(list((unlisted.root / "influence").iterdir()))


def test_a_read_only_store_of_an_earlier_version_can_be_read(unlisted, monkeypatch):
    monkeypatch.setattr(files, "perform", lambda operation, path, *more: pytest.fail(f"{operation} {path}"))
    assert read_influence(unlisted) == influence_rows(0, 1, 2)
    assert len(read_records(unlisted)) == len(stored_rows(0, 1, 2))


def test_a_resume_that_is_killed_leaves_the_rows_before_or_after_it(unlisted, tmp_path, monkeypatch):
    """At every operation on the disk: nothing is lost, and the next resume ends what this one began."""
    whole = tmp_path / "whole"
    shutil.copytree(unlisted.output_dir, whole)
    operations = count_operations(monkeypatch, lambda: DynamicsStore(whole).drop_after(1))
    outcomes = set()
    for at, moment in itertools.product(range(len(operations)), ("before", "halfway", "after")):
        shutil.rmtree(whole)
        shutil.copytree(unlisted.output_dir, whole)
        store = DynamicsStore(whole)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            interrupt(patch, Killed(), at=at, moment=moment)
            store.drop_after(1)
        found = store.steps(RECORDS), store.steps(SAMPLES), [row["step"] for row in read_influence(store)]
        assert found in (([0, 1, 2], [2], [0, 0, 1, 1, 2, 2]), ([0, 1], [], [0, 0]))
        outcomes.add(len(found[0]))
        store.drop_after(1)
        assert read_influence(store) == influence_rows(0)
        pd.testing.assert_frame_equal(read_records(store), stored_rows(0, 1), check_exact=True)
        assert store.read_meta()["schema_version"] == SCHEMA_VERSION
    assert outcomes == {2, 3}
