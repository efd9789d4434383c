"""Merging: the same rows in few files, a row group per step, in the memory of one step."""

import json
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from memory_peak import PEAK, needs_linux
from small_stores import (
    PLAN,
    Killed,
    columns,
    count_operations,
    expected,
    interrupt,
    make_store,
    probe_set,
    resume,
    samples_of,
    write_records,
)
from trl_dynamics.paths.kinds import RECORDS, SAMPLES
from trl_dynamics.paths.records import read_records
from trl_dynamics.store import parquet, parts
from trl_dynamics.store.manifest import Manifest, Part, read_manifest, runs
from trl_dynamics.store.parts import FAN, groups
from trl_dynamics.store.store import DynamicsStore

ROOT = Path(__file__).parents[3]
STEPS = tuple(range(0, 200, 10))


def test_merging_changes_no_value(tmp_path):
    store = make_store(tmp_path, steps=STEPS)
    values = columns(200) | {"eos_logp": [float("nan"), float("-inf"), -0.0, -1e-300]}
    write_records(store, RECORDS.table(values), step=200)
    before = read_records(store)
    store.compact()
    pd.testing.assert_frame_equal(read_records(store), before, check_exact=True)
    assert store.steps(RECORDS, 0) == [*STEPS, 200] and len(store.files(RECORDS)) == 1
    pd.testing.assert_frame_equal(read_records(store, {50, 70}), expected(50, 70))


def test_a_merged_file_has_a_row_group_per_step_that_its_statistics_name(tmp_path):
    store = make_store(tmp_path, steps=STEPS)
    store.compact()
    with pq.ParquetFile(store.files(RECORDS)[0]) as file:
        assert file.schema_arrow.equals(RECORDS.schema, check_metadata=True)
        index = file.schema_arrow.get_field_index("step")
        spans = [file.metadata.row_group(i).column(index).statistics for i in range(file.num_row_groups)]
    assert [(span.min, span.max) for span in spans] == [(step, step) for step in STEPS]


def test_files_are_bounded_in_size_and_hold_one_model_each(tmp_path):
    store = make_store(tmp_path, steps=STEPS)
    for step in STEPS:
        write_records(store, RECORDS.table(columns(step, model="other")), step=step, model_index=1)
    size = max(path.stat().st_size for path in store.files(RECORDS))
    before = read_records(store)
    store.compact(5 * size)
    files = store.files(RECORDS)
    assert len(files) <= 2 * len(STEPS) / 5 and max(path.stat().st_size for path in files) <= 5 * size
    assert all(pd.read_parquet(path)["model"].nunique() == 1 for path in files)
    pd.testing.assert_frame_equal(read_records(store), before)
    assert list(read_records(store, {0})["model"].unique()) == ["größe", "other"]


def test_merging_twice_writes_nothing_the_second_time(tmp_path):
    store = make_store(tmp_path, steps=STEPS)
    store.compact()
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*")}
    store.compact()
    assert {path: path.stat().st_mtime_ns for path in store.root.rglob("*")} == before


def test_steps_of_a_merged_file_are_dropped_and_taken_again(tmp_path):
    store = make_store(tmp_path, steps=STEPS)
    store.compact()
    write_records(store, RECORDS.table(columns(50)), step=50)
    pd.testing.assert_frame_equal(read_records(store), expected(*STEPS))
    resume(store, probe_set(), PLAN, 70)
    pd.testing.assert_frame_equal(read_records(store), expected(*range(0, 80, 10)))
    rows = sum(len(pd.read_parquet(path)) for path in store.files(RECORDS))
    assert rows == len(expected(*range(0, 80, 10))), "listed files hold nothing that does not count"
    for step in STEPS[8:]:
        write_records(store, RECORDS.table(columns(step)), step=step)
    store.compact()
    pd.testing.assert_frame_equal(read_records(store), expected(*STEPS))


def test_neighbours_are_grouped_up_to_the_limit():
    def part(step, size, model_index=0):
        return Part(f"{model_index}-{step}", model_index, (step,), size, "records")

    found = tuple(part(step, size) for step, size in enumerate([3, 3, 3, 9, 1, 2, 20, 4]))
    assert [[p.steps[0] for p in group] for group in groups(found, 10)] == [[0, 1, 2], [3, 4]]
    assert groups((part(0, 1), part(1, 1, 1)), 10) == []


def test_a_run_that_goes_on_has_few_files_and_a_short_manifest(tmp_path):
    """Files of one size class are merged as they come; the steps of a merged file are kept as runs."""
    store, steps = make_store(tmp_path, steps=()), range(0, 10 * FAN * FAN, 10)
    for step in steps:
        write_records(store, RECORDS.table(columns(step, probe_ids=("a",))), step=step)
        assert len(store.files(RECORDS)) <= 2 * FAN
    assert [len(part.steps) for part in read_manifest(store.root / "manifest.json").parts] == [FAN * FAN]
    assert (store.root / "manifest.json").stat().st_size < 400 and store.steps(RECORDS) == list(steps)
    pd.testing.assert_frame_equal(read_records(store), expected(*steps, probe_ids=("a",)))
    assert len(list((store.root / "records").iterdir())) == 1


def test_a_step_of_an_earlier_file_that_would_complete_a_later_one_is_replaced(tmp_path):
    """Files whose ranges overlap, as steps leave them that were not written in their order."""
    first, between = range(0, 100 * FAN, 100), range(50, 50 + FAN - 1)
    store = make_store(tmp_path, steps=[*first, *between])
    write_records(store, RECORDS.table(columns(100)), step=100)
    pd.testing.assert_frame_equal(read_records(store, {100, 60}), expected(60, 100))


def test_steps_of_one_file_ascend_in_whatever_order_they_were_written(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "FAN", 2)
    store, orders = make_store(tmp_path, steps=()), random.Random(0)
    steps = [orders.randrange(20) + index // 2 for index in range(80)]
    for step in steps:
        write_records(store, RECORDS.table(columns(step, probe_ids=("a",))), step=step)
        listed = [part.steps for part in read_manifest(store.root / "manifest.json").parts]
        assert all(list(own) == sorted(own) for own in listed)
    pd.testing.assert_frame_equal(read_records(store), expected(*sorted(set(steps)), probe_ids=("a",)))


def test_runs_keep_steps_in_their_order():
    """Earlier versions could leave a file whose steps do not ascend; its row groups are counted by them."""
    steps = (0, 1, 2, 260, 50, 261, 262)
    manifest = Manifest((Part("a", 0, steps, 1, "records"),))
    assert tuple(s for first, last, by in runs(steps) for s in range(first, last + 1, by)) == steps
    assert json.loads(manifest.encode())["parts"][0]["steps"] == runs(steps)


def test_a_reader_keeps_up_with_a_run_that_writes_while_it_reads(tmp_path, monkeypatch):
    """A step is written for every two that are read; files of few steps are merged soon, so they are read first."""
    monkeypatch.setattr(parts, "FAN", 4)
    store, writer, steps = make_store(tmp_path, steps=()), DynamicsStore(tmp_path), range(127)
    for step in steps:
        write_records(store, RECORDS.table(columns(step, probe_ids=("a",))), step=step)
    read, later, count = parquet.read_steps, iter(range(len(steps), 10**6)), iter(range(10**6))

    def slow(root, part, *more):
        for pair in read(root, part, *more):
            yield pair
            if next(count) % 2:
                with monkeypatch.context() as patch:
                    patch.setattr(parquet, "read_steps", read)
                    step = next(later)
                    write_records(writer, RECORDS.table(columns(step, probe_ids=("a",))), step=step)

    monkeypatch.setattr(parquet, "read_steps", slow)
    found = read_records(store)["step"].unique().tolist()
    assert found == list(range(len(found))) and len(found) >= len(steps)


def test_files_of_long_runs_are_bounded_in_steps(tmp_path, monkeypatch):
    """The footer of a file is read with each of its steps."""
    monkeypatch.setattr(parts, "FAN", 2)
    monkeypatch.setattr(parts, "MAX_STEPS", 8)
    store = make_store(tmp_path, steps=range(43))

    def sizes() -> list[int]:
        return [len(part.steps) for part in read_manifest(store.root / "manifest.json").parts]

    assert sizes() == [8, 8, 8, 8, 8, 2, 1]
    store.compact()
    assert sizes() == [8, 8, 8, 8, 8, 3]
    pd.testing.assert_frame_equal(read_records(store), expected(*range(43)))


def test_large_files_are_left_to_the_end_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "RUNNING_BYTES", 30_000)
    store = make_store(tmp_path, steps=range(3 * FAN))
    assert len(store.files(RECORDS)) == 3 * FAN, "sixteen files of 5 kB are more than that"
    store.compact()
    assert len(store.files(RECORDS)) == 1 and store.steps(RECORDS) == list(range(3 * FAN))


def test_kinds_merge_by_themselves_and_count_together(tmp_path):
    store = make_store(tmp_path, steps=())
    for step in range(FAN + 1):
        samples = samples_of(step) if step % 2 else None
        write_records(store, RECORDS.table(columns(step)), step=step, samples=samples)
    kept = {
        kind: [len(part.steps) for part in read_manifest(store.root / "manifest.json").of_kind(kind.name)]
        for kind in (RECORDS, SAMPLES)
    }
    assert kept == {RECORDS: [FAN, 1], SAMPLES: [1] * (FAN // 2)}
    resume(store, probe_set(), PLAN, 3)
    assert store.steps(RECORDS) == [0, 1, 2, 3] and store.steps(SAMPLES) == [1, 3]


@pytest.mark.parametrize("moment", ["before", "halfway", "after"])
def test_a_write_that_merges_and_is_killed_loses_at_most_its_own_step(moment, tmp_path, monkeypatch):
    steps = range(FAN - 1)
    whole = make_store(tmp_path / "whole", steps=steps)
    copy = tmp_path / "copy"

    def write(store: DynamicsStore) -> None:
        write_records(store, RECORDS.table(columns(FAN - 1)), step=FAN - 1)

    shutil.copytree(whole.output_dir, copy)
    operations = count_operations(monkeypatch, lambda: write(DynamicsStore(copy)))
    for at in range(len(operations)):
        shutil.rmtree(copy)
        shutil.copytree(whole.output_dir, copy)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            interrupt(patch, Killed(), at=at, moment=moment)
            write(DynamicsStore(copy))
        store = DynamicsStore(copy)
        assert store.steps(RECORDS) in (list(steps), list(range(FAN)))
        pd.testing.assert_frame_equal(read_records(store), expected(*store.steps(RECORDS)))
        write(store)
        store.drop_after(FAN)
        assert sorted((store.root / "records").iterdir()) == sorted(store.files(RECORDS))


def test_a_reader_sees_every_step_while_files_are_merged(tmp_path):
    """A process writes and merges, this one reads: never a step less than before, never half of one."""
    writer = f"""
        import sys
        sys.path.insert(0, {str(ROOT / "tests/support")!r})
        from small_stores import columns, make_store, write_records
        from trl_dynamics.paths.kinds import RECORDS
        store = make_store(sys.argv[1], steps=(0,))
        print("begun", flush=True)
        for step in range(1, {8 * FAN}):
            write_records(store, RECORDS.table(columns(step)), step=step)
    """
    command = [sys.executable, "-c", textwrap.dedent(writer), str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begun\n"
        seen, reads = 1, 0
        while process.poll() is None or not reads:
            frame = read_records(DynamicsStore(tmp_path))
            found = frame["step"].nunique()
            assert found >= seen and len(frame) == 4 * found
            assert frame["step"].unique().tolist() == list(range(found))
            seen, reads = found, reads + 1
    assert process.returncode == 0
    pd.testing.assert_frame_equal(read_records(DynamicsStore(tmp_path)), expected(*range(8 * FAN)))


@needs_linux
def test_memory_is_that_of_a_step(tmp_path):
    """Merging 40 steps of 20,000 rows takes little more memory than merging 4: rows are read as they are written."""
    code = """
        import sys
        import numpy as np, pyarrow as pa
        sys.path.insert(0, sys.argv[1])
        from small_stores import make_store, write_records
        from trl_dynamics.paths.kinds import RECORDS
        store, rng, n = make_store(sys.argv[2], steps=()), np.random.default_rng(0), 20_000
        for step in range(int(sys.argv[3])):
            keys = {"model": ["m"] * n, "step": [step] * n, "probe_id": [str(i) for i in range(n)],
                    "response_type": ["chosen"] * n, "num_tokens": [3] * n, "truncated": [False] * n}
            write_records(store, RECORDS.table(keys | {name: rng.random(n) for name in RECORDS.values}), step=step)
        before = peak_kib()
        store.compact()
        print(peak_kib() - before, len(store.files(RECORDS)))
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
