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
    snapshot,
)
from trl_dynamics.store.records import RECORD_SCHEMA, SAMPLE_VALUE_COLUMNS, to_table
from trl_dynamics.store.store import DynamicsStore


def sample_columns(step: int, probe_ids=("a", "b"), model: str = "größe") -> dict[str, list]:
    count = len(probe_ids)
    return {
        "model": [model] * count,
        "step": [step] * count,
        "probe_id": list(probe_ids),
        "num_tokens": [2] * count,
        "ended": [True, False][:count],
        "token_ids": [[step, 7]] * count,
        "text": [f" Schritt {step}\n\0</script>"] * count,
    } | {name: [-step - 0.1 * index for index in range(count)] for name in SAMPLE_VALUE_COLUMNS}


def add(store: DynamicsStore, step: int, *, sampled: bool = True, probe_ids=("a", "b")) -> None:
    samples = to_table(sample_columns(step, probe_ids), "samples") if sampled else None
    store.write_records(to_table(columns(step)), step=step, samples=samples)


def make_sampled(output_dir, steps=(0, 10, 20)) -> DynamicsStore:
    store = make_store(output_dir, steps=())
    for step in steps:
        add(store, step)
    return store


def check(store: DynamicsStore, *steps: int) -> None:
    """Records and samples of exactly these steps, each as it was written, and no file that does not count."""
    assert store.recorded_steps() == store.recorded_steps(kind="samples") == list(steps)
    if steps:
        pd.testing.assert_frame_equal(store.read_records(), expected(*steps))
        frame = store.read_samples()
        written = pd.concat([to_table(sample_columns(step), "samples").to_pandas() for step in steps])
        assert [list(ids) for ids in frame["token_ids"]] == [list(ids) for ids in written["token_ids"]]
        pd.testing.assert_frame_equal(
            frame.drop(columns="token_ids"), written.drop(columns="token_ids").reset_index(drop=True)
        )


def test_samples_are_read_back_as_they_were_written(tmp_path):
    store = make_sampled(tmp_path)
    check(store, 0, 10, 20)
    some = store.read_samples({10}, ["distinct_2"])
    assert list(some.columns) == ["model", "step", "probe_id", "distinct_2"] and set(some["step"]) == {10}
    assert len(store.record_files()) == 3 and all(path.parent == store.records_dir for path in store.record_files())


def test_merging_keeps_the_kinds_apart(tmp_path):
    store = make_sampled(tmp_path)
    store.compact()
    check(store, 0, 10, 20)
    assert len(store.record_files()) == 1
    assert [len(list((store.root / kind).iterdir())) for kind in ("records", "samples")] == [1, 1]
    store.resume(probe_set(), PLAN, 10)
    check(store, 0, 10)


def test_a_step_that_is_taken_again_without_samples_has_none(tmp_path):
    store = make_sampled(tmp_path)
    add(store, 10, sampled=False)
    assert store.recorded_steps(kind="samples") == [0, 20] and store.recorded_steps() == [0, 10, 20]
    assert len(list((store.root / "samples").iterdir())) == 2


def test_a_store_without_samples_has_no_place_for_them(tmp_path):
    store = make_store(tmp_path)
    store.compact()
    assert not (store.root / "samples").exists()
    frame = store.read_samples()
    assert frame.empty and {"step", "text", "distinct_2"} <= set(frame.columns)


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    store = make_sampled(tmp_path)
    before = snapshot(tmp_path)
    wrong_step, no_samples = to_table(sample_columns(40), "samples"), to_table(columns(30))
    with pytest.raises(ValueError, match=r"expected samples of step 30, got steps \[40\]"):
        store.write_records(to_table(columns(30)), step=30, samples=wrong_step)
    with pytest.raises(ValueError, match="samples do not have the written schema"):
        store.write_records(to_table(columns(30)), step=30, samples=no_samples)
    with pytest.raises(ValueError, match="samples need exactly the columns"):
        to_table(columns(30), "samples")
    assert snapshot(tmp_path) == before and RECORD_SCHEMA == to_table(columns(30)).schema


def test_an_answer_twice_is_told(tmp_path):
    store = make_sampled(tmp_path, steps=())
    add(store, 0, probe_ids=("a", "a"))
    with pytest.raises(ValueError, match="samples holds the same key twice: .*'probe_id': 'a'"):
        store.read_samples()


@pytest.mark.parametrize("operation", ["open", "write", "sync", "rename", "make folder"])
def test_a_full_disk_costs_records_and_samples_of_the_step_together(operation, tmp_path, monkeypatch):
    store = make_sampled(tmp_path)
    before = snapshot(tmp_path)
    # The second file fails when the first one is there already.
    name = "samples" if operation == "make folder" else "-000008"
    with monkeypatch.context() as patch:
        fail(patch, errno.ENOSPC, operation=operation, name=name)
        with pytest.raises(OSError, match="nothing already written was lost"):
            add(store, 30)
    assert snapshot(tmp_path) == before
    add(store, 30)
    check(store, 0, 10, 20, 30)


# Name -> (steps before, merged, what is done, steps after).
CHANGES = {
    "first": ((), False, lambda store: add(store, 0), (0,)),
    "next": ((0, 10), False, lambda store: add(store, 20), (0, 10, 20)),
    "same": ((0, 10), False, lambda store: add(store, 10), (0, 10)),
    "resume": ((0, 10, 20), False, lambda store: store.resume(probe_set(), PLAN, 10), (0, 10)),
    "resume in a file": ((0, 10, 20), True, lambda store: store.resume(probe_set(), PLAN, 10), (0, 10)),
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
            steps = tuple(store.recorded_steps())
            assert steps in (before, after)
            check(store, *steps)
            store.resume(probe_set(), PLAN, 10)
            add(store, 20)
            store.compact()
            check(store, *sorted({*steps, 20}))
            listed = {part["file"] for part in json.loads((store.root / "manifest.json").read_text())["parts"]}
            assert listed == {path.name for kind in ("records", "samples") for path in (store.root / kind).iterdir()}
            shutil.rmtree(where)
