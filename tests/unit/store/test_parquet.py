"""Merging: the same rows in few files, a row group per step, in the memory of one step."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from memory_peak import PEAK, needs_linux
from small_stores import PLAN, columns, expected, make_store, probe_set
from trl_dynamics.store.manifest import Manifest, Part
from trl_dynamics.store.parquet import groups
from trl_dynamics.store.records import RECORD_SCHEMA, to_table

ROOT = Path(__file__).parents[3]
STEPS = tuple(range(0, 200, 10))


def test_merging_changes_no_value(tmp_path):
    store = make_store(tmp_path, steps=STEPS)
    values = columns(200) | {"eos_logp": [float("nan"), float("-inf"), -0.0, -1e-300]}
    store.write_records(to_table(values), step=200)
    before = store.read_records()
    store.compact()
    pd.testing.assert_frame_equal(store.read_records(), before, check_exact=True)
    assert store.recorded_steps() == [*STEPS, 200] and len(store.record_files()) == 1
    pd.testing.assert_frame_equal(store.read_records({50, 70}), expected(50, 70))


def test_a_merged_file_has_a_row_group_per_step_that_its_statistics_name(tmp_path):
    store = make_store(tmp_path, steps=STEPS)
    store.compact()
    with pq.ParquetFile(store.record_files()[0]) as file:
        assert file.schema_arrow.equals(RECORD_SCHEMA, check_metadata=True)
        index = file.schema_arrow.get_field_index("step")
        spans = [file.metadata.row_group(i).column(index).statistics for i in range(file.num_row_groups)]
    assert [(span.min, span.max) for span in spans] == [(step, step) for step in STEPS]


def test_files_are_bounded_in_size_and_hold_one_model_each(tmp_path):
    store = make_store(tmp_path, steps=STEPS)
    for step in STEPS:
        store.write_records(to_table(columns(step, model="other")), step=step, model_index=1)
    size = max(path.stat().st_size for path in store.record_files())
    before = store.read_records()
    store.compact(5 * size)
    files = store.record_files()
    assert len(files) <= 2 * len(STEPS) / 5 and max(path.stat().st_size for path in files) <= 5 * size
    assert all(pd.read_parquet(path)["model"].nunique() == 1 for path in files)
    pd.testing.assert_frame_equal(store.read_records(), before)
    assert list(store.read_records({0})["model"].unique()) == ["größe", "other"]


def test_merging_twice_writes_nothing_the_second_time(tmp_path):
    store = make_store(tmp_path, steps=STEPS)
    store.compact()
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*")}
    store.compact()
    assert {path: path.stat().st_mtime_ns for path in store.root.rglob("*")} == before


def test_steps_of_a_merged_file_are_dropped_and_taken_again(tmp_path):
    store = make_store(tmp_path, steps=STEPS)
    store.compact()
    store.write_records(to_table(columns(50)), step=50)
    pd.testing.assert_frame_equal(store.read_records(), expected(*STEPS))
    store.resume(probe_set(), PLAN, 70)
    pd.testing.assert_frame_equal(store.read_records(), expected(*range(0, 80, 10)))
    rows = sum(len(pd.read_parquet(path)) for path in store.record_files())
    assert rows == len(expected(*range(0, 80, 10))), "listed files hold nothing that does not count"
    for step in STEPS[8:]:
        store.write_records(to_table(columns(step)), step=step)
    store.compact()
    pd.testing.assert_frame_equal(store.read_records(), expected(*STEPS))


def test_neighbours_are_grouped_up_to_the_limit():
    def part(step, size, model_index=0):
        return Part(f"{model_index}-{step}", model_index, (step,), (1,), size)

    parts = tuple(part(step, size) for step, size in enumerate([3, 3, 3, 9, 1, 2, 20, 4]))
    assert [[p.steps[0] for p in group] for group in groups(parts, 10)] == [[0, 1, 2], [3, 4]]
    assert groups((part(0, 1), part(1, 1, 1)), 10) == []


def test_the_manifest_of_a_long_run_is_cheap_to_write(tmp_path):
    """1,000 steps: well under 200 kB, and a write of a step stays far below what any probe costs."""
    store = make_store(tmp_path, steps=())
    parts = [Part(f"m000-step{step:09d}-{step + 1:06d}.parquet", 0, (step,), (4,), 5189) for step in range(0, 5000, 5)]
    payload = Manifest().exchange([], parts).encode()
    assert len(payload) < 200_000
    (store.root / "manifest.json").write_bytes(payload)
    began = time.process_time()
    for step in range(5000, 5010):
        store.write_records(to_table(columns(step)), step=step)
    assert (time.process_time() - began) / 10 < 0.2
    assert len(store.recorded_steps()) == 1010


@needs_linux
def test_memory_is_that_of_a_step(tmp_path):
    """Merging 40 steps of 20,000 rows takes little more memory than merging 4: rows are read as they are written."""
    code = """
        import sys
        import numpy as np, pyarrow as pa
        from trl_dynamics.store.records import RECORD_SCHEMA, VALUE_COLUMNS, to_table
        from trl_dynamics.store.store import DynamicsStore
        sys.path.insert(0, sys.argv[1])
        from small_stores import make_store
        store, rng, n = make_store(sys.argv[2], steps=()), np.random.default_rng(0), 20_000
        for step in range(int(sys.argv[3])):
            keys = {"model": ["m"] * n, "step": [step] * n, "probe_id": [str(i) for i in range(n)],
                    "response_type": ["chosen"] * n, "num_tokens": [3] * n, "truncated": [False] * n}
            store.write_records(to_table(keys | {name: rng.random(n) for name in VALUE_COLUMNS}), step=step)
        before = peak_kib()
        store.compact()
        print(peak_kib() - before, len(store.record_files()))
    """

    def grown(steps: int) -> int:
        folder = str(tmp_path / str(steps))
        command = [sys.executable, "-c", PEAK + textwrap.dedent(code), str(ROOT / "tests/support"), folder, str(steps)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stderr
        kilobytes, files = map(int, result.stdout.split())
        assert files == 1
        return kilobytes

    table_kilobytes = 20_000 * 110 / 1024
    assert grown(40) < grown(4) + 6 * table_kilobytes < 40 * table_kilobytes / 2
