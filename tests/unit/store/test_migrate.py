"""A store of an earlier schema version is read as it lies there, and becomes one of today's when it is written to."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from small_stores import snapshot
from trl_dynamics import load_records
from trl_dynamics.store.records import SCHEMA_VERSION, to_table
from trl_dynamics.store.store import DynamicsStore

DATA = Path(__file__).parents[2] / "data"
# Record files of each: version 2 had merged the first two steps into one.
FILES = {1: 3, 2: 2}
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
    pd.testing.assert_frame_equal(store.read_records(), stored_rows(0, 1, 2), check_exact=True)
    pd.testing.assert_frame_equal(
        load_records(store.output_dir).drop(columns="run"), stored_rows(0, 1, 2), check_exact=True
    )
    assert store.recorded_steps() == [0, 1, 2] and len(store.record_files()) == FILES[version]
    assert store.recorded_steps(kind="samples") == [] and store.read_samples().empty
    assert store.check_resume(store.read_probe_set(), PLAN)["baseline_step"] == 0
    assert snapshot(store.output_dir) == before


@pytest.mark.parametrize("step", [0, 1, 2])
def test_resuming_an_earlier_version_makes_it_todays(step, store):
    later = store.read_records({2})
    store.resume(store.read_probe_set(), PLAN, step)
    assert store.read_meta()["schema_version"] == SCHEMA_VERSION == 3
    pd.testing.assert_frame_equal(store.read_records(), stored_rows(*range(step + 1)), check_exact=True)
    store.write_records(to_table(later.to_dict("list")), step=2)
    store.compact()
    # From here on an earlier release refuses it, instead of dropping from the listing what it does not know.
    assert json.loads((store.root / "manifest.json").read_text())["schema_version"] == SCHEMA_VERSION
    pd.testing.assert_frame_equal(store.read_records(), stored_rows(*range(step + 1), 2), check_exact=True)
    assert [path.name for path in store.records_dir.iterdir()] == [path.name for path in store.record_files()]


def test_merging_an_earlier_version(store):
    store.compact()
    assert len(store.record_files()) == 1
    pd.testing.assert_frame_equal(store.read_records(), stored_rows(0, 1, 2), check_exact=True)
