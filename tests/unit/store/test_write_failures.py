"""Failing disks, dying processes and damaged folders: nothing that was written is lost, and what is wrong is said."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from small_stores import (
    PLAN,
    STARS,
    Killed,
    columns,
    count_operations,
    expected,
    fail,
    interrupt,
    make_store,
    probe_set,
    resume,
    snapshot,
    write_records,
)
from trl_dynamics.paths.kinds import RECORDS
from trl_dynamics.paths.records import has_baseline, load_records, read_baseline, read_records, write_baseline
from trl_dynamics.store import files
from trl_dynamics.store.manifest import read_manifest
from trl_dynamics.store.parts import FAN
from trl_dynamics.store.store import DynamicsStore

OPERATIONS = ["open", "write", "sync", "rename"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_failed_write_loses_nothing(operation, code, tmp_path, monkeypatch):
    store = make_store(tmp_path)
    before = snapshot(tmp_path)

    def add(step: int) -> None:
        write_records(store, RECORDS.table(columns(step)), step=step)

    # What is written, the file that fails, and the place that the error names.
    writes = {
        "new records": (
            lambda: write_records(store, RECORDS.table(columns(30)), step=30),
            "step000000030",
            "dynamics",
        ),
        "records again": (
            lambda: write_records(store, RECORDS.table(columns(20, probe_ids=("z",))), step=20),
            "step000000020",
            "dynamics",
        ),
        "listing": (lambda: add(30), "manifest.json", "dynamics"),
        "resume": (lambda: resume(store, probe_set(), PLAN, 10), "manifest.json", "dynamics"),
        "merging": (lambda: store.compact(), "step000000000", "dynamics"),
        "listing what was merged": (lambda: store.compact(), "manifest.json", "dynamics"),
        "y*": (lambda: write_baseline(store, [[5]]), "baseline.parquet", "baseline.parquet"),
        "log": (lambda: store.write_trainer_log([{"loss": 1.0}]), "trainer_log.json", "trainer_log.json"),
        "meta": (lambda: store.write_meta({"seed": 1}), "meta.json", "dynamics"),
    }
    for what, (write, name, place) in writes.items():
        with monkeypatch.context() as patch:
            fail(patch, code, operation=operation, name=name)
            with pytest.raises(OSError, match="cannot write probe records .*or choose another output_dir") as error:
                write()
        assert type(error.value) is type(OSError(code, "")), what
        assert error.value.errno == code and os.strerror(code) in str(error.value), what
        assert Path(error.value.filename).name == place and "nothing already written was lost" in str(error.value)
        assert snapshot(tmp_path) == before, f"{what}: earlier files are untouched and nothing is left over"
    write_records(store, RECORDS.table(columns(30)), step=30)
    pd.testing.assert_frame_equal(read_records(store), expected(0, 10, 20, 30))


@pytest.mark.parametrize(
    "change", [lambda store: write_records(store, RECORDS.table(columns(30)), step=30), DynamicsStore.compact]
)
def test_a_listing_that_fails_when_it_has_its_name_keeps_what_it_lists(change, tmp_path, monkeypatch):
    store = make_store(tmp_path)
    with monkeypatch.context() as patch:
        fail(patch, errno.EIO, operation="sync folder", name="dynamics")
        with pytest.raises(OSError, match="cannot write probe records"):
            change(store)
    pd.testing.assert_frame_equal(read_records(store), expected(*store.steps(RECORDS, 0)))
    assert store.steps(RECORDS, 0)[:3] == [0, 10, 20]


@pytest.mark.parametrize("operation", [*OPERATIONS, "make folder"])
def test_a_failed_create_leaves_the_earlier_store_in_its_place(operation, tmp_path, monkeypatch):
    make_store(tmp_path)
    before = snapshot(tmp_path / "dynamics")
    with monkeypatch.context() as patch:
        fail(patch, errno.ENOSPC, operation=operation)
        with pytest.raises(OSError, match="No space left on device"):
            make_store(tmp_path)
    assert snapshot(tmp_path / "dynamics") == before
    make_store(tmp_path, steps=(5,))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dynamics", "dynamics-old-1"]
    assert snapshot(tmp_path / "dynamics-old-1") == before


@pytest.mark.parametrize("below", ["file", "file/deeper"])
@pytest.mark.parametrize("opened", [True, False])
def test_a_path_below_a_regular_file(opened, below, tmp_path):
    (tmp_path / "file").write_text("I am a file")
    with pytest.raises(OSError, match="cannot write probe records ") as error:
        DynamicsStore(tmp_path / below).open() if opened else make_store(tmp_path / below)
    assert error.value.filename == str(tmp_path / below / "dynamics")
    assert (tmp_path / "file").read_text() == "I am a file"


def test_a_store_that_was_taken_away_is_not_begun_again_by_a_write(tmp_path):
    store = make_store(tmp_path)
    store.root.rename(tmp_path / "elsewhere")
    for write in (
        lambda: write_records(store, RECORDS.table(columns(30)), step=30),
        lambda: write_baseline(store, STARS),
    ):
        with pytest.raises(FileNotFoundError, match="cannot write probe records"):
            write()
    assert not store.root.exists()


def test_files_that_are_no_longer_needed_may_stay(tmp_path, monkeypatch):
    store = make_store(tmp_path)
    with monkeypatch.context() as patch:
        fail(patch, errno.EACCES, operation="remove")
        resume(store, probe_set(), PLAN, 10)
        pd.testing.assert_frame_equal(read_records(store), expected(0, 10))
        assert len(list((store.root / "records").iterdir())) == 3
    store.compact()
    assert list((store.root / "records").iterdir()) == store.files(RECORDS)


def test_a_file_is_complete_and_durable_before_it_counts(tmp_path, monkeypatch):
    """Data reach the disk before the name does, the name before the manifest, the manifest before old files go."""
    store = make_store(tmp_path, steps=(0,))
    done, perform = [], files.perform

    def watched(operation, path, action, *arguments):
        if operation == "rename" and path.suffix == ".parquet":
            assert len(pq.read_table(path.with_name(path.name + ".tmp"))) == 2
            assert ("records", path.name) not in store._parts.manifest().names
        done.append((operation, "manifest" if "manifest" in path.name else "records"))
        return perform(operation, path, action, *arguments)

    monkeypatch.setattr(files, "perform", watched)
    write_records(store, RECORDS.table(columns(0, probe_ids=("z",))), step=0)
    order = [
        (operation, name) for index, (operation, name) in enumerate(done) if done[index - 1 : index] != [done[index]]
    ]
    write = ["open", "write", "sync", "rename", "sync folder"]
    assert order == [
        *((operation, "records") for operation in write),
        # The folder of the manifest is the store's own.
        *((operation, "manifest") for operation in write[:-1]),
        ("sync folder", "records"),
        ("remove", "records"),
    ]


# Every way to change a store: name -> (state it begins from, what is done, steps that are read before and after).
CHANGES = {
    "create": ((), lambda store: make_store(store.output_dir, ()), None, ()),
    "create over": ((0, 10), lambda store: make_store(store.output_dir, ()), None, ()),
    "freeze y*": ((), lambda store: write_baseline(store, STARS), (), ()),
    "first records": ((), lambda store: write_records(store, RECORDS.table(columns(0)), step=0), (), (0,)),
    "records": (
        (0, 10),
        lambda store: write_records(store, RECORDS.table(columns(20)), step=20),
        (0, 10),
        (0, 10, 20),
    ),
    "same step": ((0, 10), lambda store: write_records(store, RECORDS.table(columns(10)), step=10), (0, 10), (0, 10)),
    "resume": ((0, 10, 20, 30), lambda store: resume(store, probe_set(), PLAN, 10), (0, 10, 20, 30), (0, 10)),
    "resume before the first": ((10, 20), lambda store: resume(store, probe_set(), PLAN, 5), (10, 20), ()),
    "compact": ((0, 10, 20), lambda store: store.compact(), (0, 10, 20), (0, 10, 20)),
    "compact into two": ((0, 10, 20, 30), lambda store: store.compact(11_000), (0, 10, 20, 30), (0, 10, 20, 30)),
    "resume within a file": ("compacted", lambda store: resume(store, probe_set(), PLAN, 10), (0, 10, 20), (0, 10)),
    "compact again": ("both", lambda store: store.compact(), (0, 10, 20, 30), (0, 10, 20, 30)),
}


def prepare(folder: Path, state) -> DynamicsStore:
    store = make_store(folder, (0, 10, 20) if isinstance(state, str) else state)
    if isinstance(state, str):
        store.compact()
    if state == "both":
        write_records(store, RECORDS.table(columns(30)), step=30)
    return store


@pytest.mark.parametrize("change", CHANGES)
def test_a_process_may_die_at_any_operation(change, tmp_path, monkeypatch):
    """Killed before, halfway through or after any operation, a store is as it was or as it was to become."""
    state, work, before, after = CHANGES[change]
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # what is killed is a process, not the machine
    prepare(tmp_path / "origin", state)
    shutil.copytree(tmp_path / "origin", tmp_path / "counted")
    operations = count_operations(monkeypatch, lambda: work(DynamicsStore(tmp_path / "counted")))
    assert operations
    for index, operation in enumerate(operations):
        for moment in ("before", "halfway", "after") if operation == "write" else ("before", "after"):
            where = tmp_path / f"{index}-{moment}"
            shutil.copytree(tmp_path / "origin", where)
            with monkeypatch.context() as patch:
                interrupt(patch, Killed(), at=index, moment=moment)
                with pytest.raises(Killed):
                    work(DynamicsStore(where))
            check_survivor(DynamicsStore(where), before, after)
            check_continuation(where)
            shutil.rmtree(where)


def check_survivor(store: DynamicsStore, before: tuple | None, after: tuple) -> None:
    if before is None:  # the store that was there may be aside already, and the new one not be there yet
        assert not store.exists or store.steps(RECORDS, 0) in ([], [0, 10])
    else:
        assert tuple(store.steps(RECORDS, 0)) in (before, after)
    if store.steps(RECORDS):
        pd.testing.assert_frame_equal(read_records(store), expected(*store.steps(RECORDS, 0)))
        assert read_baseline(store) == STARS


def check_continuation(folder: Path) -> None:
    """What was left is continued to the same series as ever, and nothing is left over."""
    store = DynamicsStore(folder)
    if store.exists:
        resume(store, probe_set(), PLAN, 10)
        assert set(store.steps(RECORDS, 0)) <= {0, 10}
    else:
        store.create({}, {}, {})
    if not has_baseline(store):
        write_baseline(store, STARS)
    for step in (0, 10, 20):
        if step not in store.steps(RECORDS, 0):
            write_records(store, RECORDS.table(columns(step)), step=step)
    pd.testing.assert_frame_equal(read_records(store), expected(0, 10, 20))
    store.compact()
    pd.testing.assert_frame_equal(read_records(store), expected(0, 10, 20))
    assert read_baseline(store) == STARS
    assert list((store.root / "records").iterdir()) == store.files(RECORDS) and len(store.files(RECORDS)) == 1


def test_files_that_are_missing_or_cut_are_told_with_the_way_out(tmp_path):
    store = make_store(tmp_path)
    write_records(store, RECORDS.table(columns(0, model="other")), step=0, model_index=1)
    first, second, third, fourth = store.files(RECORDS)
    third.unlink()
    fourth.write_bytes(fourth.read_bytes()[:-100])
    before = snapshot(tmp_path)
    for attempt in (
        lambda: load_records(tmp_path),
        lambda: store.files(RECORDS),
        store.compact,
        lambda: resume(store, probe_set(), PLAN, 20),
    ):
        with pytest.raises(ValueError, match=r"is missing, it holds steps 20 to 20.*Copy it again.*drop_damaged\(\)"):
            attempt()
    assert snapshot(tmp_path) == before
    with pytest.raises(ValueError, match=r"has \d+ bytes instead of \d+"):
        store._parts.check(store._parts.manifest().parts[3:])
    assert store.drop_damaged() == [(0, 20), (1, 0)]
    pd.testing.assert_frame_equal(read_records(store), expected(0, 10))
    resume(store, probe_set(), PLAN, 20)


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, lambda path: path.write_bytes(b"x"), lambda path: path.write_bytes(bytes(path.stat().st_size))],
    ids=["missing", "cut", "overwritten"],
)
def test_a_damaged_file_costs_no_step_that_is_written_later(damage, tmp_path):
    """Its neighbours would be merged with it."""
    store = make_store(tmp_path, steps=range(FAN - 1))
    damage(store.files(RECORDS)[3])
    later = range(FAN - 1, 3 * FAN)
    for step in later:
        write_records(store, RECORDS.table(columns(step)), step=step)
    assert store.drop_damaged() == [(0, 3)]
    pd.testing.assert_frame_equal(read_records(store), expected(0, 1, 2, *range(4, 3 * FAN)))
    assert len(read_manifest(store.root / "manifest.json").parts) < 2 * FAN


@pytest.mark.parametrize("share", [0.5, 0.05], ids=["rows", "footer"])
def test_a_file_of_its_full_length_that_cannot_be_read_is_told_and_can_be_dropped(share, tmp_path):
    store = make_store(tmp_path)
    path = store.files(RECORDS)[1]
    payload = path.read_bytes()
    zeros = bytes(int(share * len(payload)))
    path.write_bytes(payload[: -len(zeros) - 8] + zeros + payload[-8:])
    with pytest.raises(ValueError, match=re.escape(path.name) + r" cannot be read .*drop_damaged\(\)"):
        read_records(store)
    assert store.drop_damaged() == [(0, 10)]
    pd.testing.assert_frame_equal(read_records(store), expected(0, 20))


def test_a_full_disk_takes_a_step_that_it_has_no_room_to_merge(tmp_path, monkeypatch):
    store = make_store(tmp_path, steps=range(FAN - 1))
    with monkeypatch.context() as patch:
        fail(patch, errno.ENOSPC, operation="write", name="step000000000")
        write_records(store, RECORDS.table(columns(FAN - 1)), step=FAN - 1)
    pd.testing.assert_frame_equal(read_records(store), expected(*range(FAN)))


def test_damage_after_the_checkpoint_does_not_matter(tmp_path):
    store = make_store(tmp_path)
    store.files(RECORDS)[2].unlink()
    resume(store, probe_set(), PLAN, 10)
    pd.testing.assert_frame_equal(read_records(store), expected(0, 10))


def test_a_manifest_that_is_gone_or_unreadable(tmp_path):
    store = make_store(tmp_path)
    path = store.root / "manifest.json"
    whole = path.read_text()
    for text in (whole[:40], "[]", json.dumps({"schema_version": 2})):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not a manifest .*Copy the run's dynamics/ folder again"):
            read_records(store)
    path.unlink()
    with pytest.raises(ValueError, match="manifest.json is missing: .*Copy it again"):
        read_records(store)
    path.write_text(whole)
    pd.testing.assert_frame_equal(read_records(store), expected(0, 10, 20))


def test_a_damaged_baseline(tmp_path):
    store = make_store(tmp_path)
    path = store.root / "baseline.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="baseline.parquet is damaged .*frozen y"):
        read_baseline(store)


def test_a_reader_follows_a_writer_that_exchanges_files(tmp_path, monkeypatch):
    store, writer = make_store(tmp_path), DynamicsStore(tmp_path)
    check, turns = store._parts.check, []

    def check_late(parts):
        if len(turns) < 2:
            turns.append(writer.compact() if turns else write_records(writer, RECORDS.table(columns(20)), step=20))
        check(parts)

    monkeypatch.setattr(store._parts, "check", check_late)
    pd.testing.assert_frame_equal(read_records(store), expected(0, 10, 20))
    assert len(turns) == 2
