"""A store of schema version 1 is read as it lies there, and becomes one of version 2 when it is written to."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from small_stores import snapshot

from trl_dynamics import load_records
from trl_dynamics.tracking.records import SCHEMA_VERSION, to_table
from trl_dynamics.tracking.store import DynamicsStore

SAMPLE = Path(__file__).parents[1] / "data" / "store_v1"
PLAN = json.loads((SAMPLE / "dynamics" / "meta.json").read_text())["batch_plan"]["fingerprint"]


@pytest.fixture
def store(tmp_path) -> DynamicsStore:
    shutil.copytree(SAMPLE / "dynamics", tmp_path / "run" / "dynamics")
    return DynamicsStore(tmp_path / "run")


def stored_rows(*steps: int) -> pd.DataFrame:
    lines = (SAMPLE / "records.jsonl").read_text().splitlines()
    rows = pd.DataFrame([json.loads(line) for line in lines]).astype({"num_tokens": "int32"})
    return rows[rows["step"].isin(steps)].reset_index(drop=True)


def test_reading_version_1_writes_nothing(store):
    before = snapshot(store.output_dir)
    assert store.read_meta()["schema_version"] == 1
    pd.testing.assert_frame_equal(store.read_records(), stored_rows(0, 1, 2), check_exact=True)
    pd.testing.assert_frame_equal(
        load_records(store.output_dir).drop(columns="run"), stored_rows(0, 1, 2), check_exact=True
    )
    assert store.recorded_steps() == [0, 1, 2] and len(store.record_files()) == 3
    assert store.check_resume(store.read_probe_set(), PLAN)["baseline_step"] == 0
    assert snapshot(store.output_dir) == before


@pytest.mark.parametrize("step", [0, 1, 2])
def test_resuming_version_1_makes_it_version_2(step, store):
    later = store.read_records({2})
    store.resume(store.read_probe_set(), PLAN, step)
    assert store.read_meta()["schema_version"] == SCHEMA_VERSION == 2
    pd.testing.assert_frame_equal(store.read_records(), stored_rows(*range(step + 1)), check_exact=True)
    store.write_records(to_table(later.to_dict("list")), step=2)
    store.compact()
    pd.testing.assert_frame_equal(store.read_records(), stored_rows(*range(step + 1), 2), check_exact=True)
    assert [path.name for path in store.records_dir.iterdir()] == [path.name for path in store.record_files()]


def test_merging_version_1(store):
    store.compact()
    assert len(store.record_files()) == 1
    pd.testing.assert_frame_equal(store.read_records(), stored_rows(0, 1, 2), check_exact=True)
