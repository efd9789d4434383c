"""Greedy answers in the store: they come, stay and go with the records of their step, whatever happens."""

import errno
import json
import os
import shutil

import pandas as pd
import pytest

from small_stores import (
    PLAN,
    Killed,
    columns,
    count_operations,
    expected,
    fail,
    interrupt,
    make_store,
    probe_set,
    resume,
    samples_of,
    snapshot,
    write_records,
)
from trl_dynamics.paths.kinds import RECORDS, SAMPLES
from trl_dynamics.paths.records import read_records
from trl_dynamics.store.store import DynamicsStore


def add(store: DynamicsStore, step: int, *, sampled: bool = True, probe_ids=("a", "b")) -> None:
    samples = samples_of(step, probe_ids) if sampled else None
    write_records(store, RECORDS.table(columns(step)), step=step, samples=samples)


def make_sampled(output_dir, steps=(0, 10, 20)) -> DynamicsStore:
    store = make_store(output_dir, steps=())
    for step in steps:
        add(store, step)
    return store


def check(store: DynamicsStore, *steps: int) -> None:
    """Records and samples of exactly these steps, each as it was written, and no file that does not count."""
    assert store.steps(RECORDS, 0) == store.steps(SAMPLES) == list(steps)
    if steps:
        pd.testing.assert_frame_equal(read_records(store), expected(*steps))
        frame = store.read(SAMPLES)
        written = pd.concat([samples_of(step).to_pandas() for step in steps])
        assert [list(ids) for ids in frame["token_ids"]] == [list(ids) for ids in written["token_ids"]]
        pd.testing.assert_frame_equal(
            frame.drop(columns="token_ids"), written.drop(columns="token_ids").reset_index(drop=True)
        )


def test_samples_are_read_back_as_they_were_written(tmp_path):
    store = make_sampled(tmp_path)
    check(store, 0, 10, 20)
    some = store.read(SAMPLES, {10}, ["distinct_2"])
    assert list(some.columns) == ["model", "step", "probe_id", "distinct_2"] and set(some["step"]) == {10}
    assert len(store.files(RECORDS)) == 3 and all(
        path.parent == (store.root / "records") for path in store.files(RECORDS)
    )


def test_merging_keeps_the_kinds_apart(tmp_path):
    store = make_sampled(tmp_path)
    store.compact()
    check(store, 0, 10, 20)
    assert len(store.files(RECORDS)) == 1
    assert [len(list((store.root / kind).iterdir())) for kind in ("records", "samples")] == [1, 1]
    resume(store, probe_set(), PLAN, 10)
    check(store, 0, 10)


def test_a_step_that_is_taken_again_without_samples_has_none(tmp_path):
    store = make_sampled(tmp_path)
    add(store, 10, sampled=False)
    assert store.steps(SAMPLES) == [0, 20] and store.steps(RECORDS, 0) == [0, 10, 20]
    assert len(list((store.root / "samples").iterdir())) == 2


def test_a_store_without_samples_has_no_place_for_them(tmp_path):
    store = make_store(tmp_path)
    store.compact()
    assert not (store.root / "samples").exists()
    frame = store.read(SAMPLES)
    assert frame.empty and {"step", "text", "distinct_2"} <= set(frame.columns)


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    store = make_sampled(tmp_path)
    before = snapshot(tmp_path)
    wrong_step, no_samples = samples_of(40), RECORDS.table(columns(30))
    with pytest.raises(ValueError, match=r"expected samples of step 30, got steps \[40\]"):
        write_records(store, RECORDS.table(columns(30)), step=30, samples=wrong_step)
    with pytest.raises(ValueError, match="samples do not have the written schema"):
        write_records(store, RECORDS.table(columns(30)), step=30, samples=no_samples)
    with pytest.raises(ValueError, match="samples need exactly the columns"):
        SAMPLES.table(columns(30))
    assert snapshot(tmp_path) == before and RECORDS.schema == RECORDS.table(columns(30)).schema


def test_an_answer_twice_is_told(tmp_path):
    store = make_sampled(tmp_path, steps=())
    add(store, 0, probe_ids=("a", "a"))
    with pytest.raises(ValueError, match="samples holds the same key twice: .*'probe_id': 'a'"):
        store.read(SAMPLES)


@pytest.mark.parametrize("operation", ["open", "write", "sync", "rename", "make folder"])
def test_a_full_disk_costs_records_and_samples_of_the_step_together(operation, tmp_path, monkeypatch):
    steps = () if operation == "make folder" else (0, 10, 20)
    store = make_sampled(tmp_path, steps)
    before = snapshot(tmp_path)
    # The second file fails when the first one is there already.
    name = "-000008" if steps else "samples"
    with monkeypatch.context() as patch:
        fail(patch, errno.ENOSPC, operation=operation, name=name)
        with pytest.raises(OSError, match="nothing already written was lost"):
            add(store, 30)
    assert snapshot(tmp_path) == before
    add(store, 30)
    check(store, *steps, 30)


# Name -> (steps before, merged, what is done, steps after).
CHANGES = {
    "first": ((), False, lambda store: add(store, 0), (0,)),
    "next": ((0, 10), False, lambda store: add(store, 20), (0, 10, 20)),
    "same": ((0, 10), False, lambda store: add(store, 10), (0, 10)),
    "resume": ((0, 10, 20), False, lambda store: resume(store, probe_set(), PLAN, 10), (0, 10)),
    "resume in a file": ((0, 10, 20), True, lambda store: resume(store, probe_set(), PLAN, 10), (0, 10)),
    "compact": ((0, 10, 20), False, lambda store: store.compact(), (0, 10, 20)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_process_that_dies_leaves_both_or_neither(change, tmp_path, monkeypatch):
    before, merged, work, after = CHANGES[change]
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # what is killed is a process, not the machine
    origin = make_sampled(tmp_path / "origin", before)
    if merged:
        origin.compact()
    shutil.copytree(tmp_path / "origin", tmp_path / "counted")
    operations = count_operations(monkeypatch, lambda: work(DynamicsStore(tmp_path / "counted")))
    for index, operation in enumerate(operations):
        for moment in ("before", "halfway", "after") if operation == "write" else ("before", "after"):
            where = tmp_path / f"{index}-{moment}"
            shutil.copytree(tmp_path / "origin", where)
            with monkeypatch.context() as patch:
                interrupt(patch, Killed(), at=index, moment=moment)
                with pytest.raises(Killed):
                    work(DynamicsStore(where))
            store = DynamicsStore(where)
            steps = tuple(store.steps(RECORDS, 0))
            assert steps in (before, after)
            check(store, *steps)
            resume(store, probe_set(), PLAN, 10)
            add(store, 20)
            store.compact()
            check(store, *sorted({*steps, 20}))
            listed = {part["file"] for part in json.loads((store.root / "manifest.json").read_text())["parts"]}
            assert listed == {path.name for kind in ("records", "samples") for path in (store.root / kind).iterdir()}
            shutil.rmtree(where)
