"""Summaries step by step against pivots of the whole frame, and stores that are never held whole."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pandas_reference as reference
from memory_peak import PEAK, needs_linux
from small_stores import write_records
from synthetic_runs import SQUEEZED, STEPS, VOCAB_SIZE, records, write_run
from trl_dynamics.paths import metrics, rules, summary
from trl_dynamics.paths.kinds import RECORDS
from trl_dynamics.paths.step_table import split_frame
from trl_dynamics.paths.summary import MEASURES, summarise, summarise_store
from trl_dynamics.report.load import load_runs, split_series
from trl_dynamics.store import parts
from trl_dynamics.store.store import DynamicsStore

MISSING = ("rejected", "other_test")


def holed(seed, *, shuffled=True, **options):
    """Records that lack types for some probes and a fifth of all rows, at the first step too."""
    options = {"missing": MISSING, "num_probes": 9, "noise": 0.2} | options
    frame = records(SQUEEZED, argmax=0.4, entropy=-0.3, drained=0.1, eos=-0.2, seed=seed, **options)
    kept = frame.sample(frac=0.8, random_state=seed)
    return (kept if shuffled else kept.sort_index()).reset_index(drop=True)


def close(value):
    return pytest.approx(value, rel=1e-12, abs=1e-14)


@pytest.fixture(params=["frame", "store"])
def summarised(request, tmp_path):
    """(frame, its summary), from memory and from disk."""

    def make(frame):
        if request.param == "frame":
            return summarise(frame, VOCAB_SIZE)
        return summarise_store(DynamicsStore(write_run(tmp_path / "run", frame)))["policy"]

    return make


@pytest.mark.parametrize("seed", range(4))
def test_bands_equal_pivots_of_the_whole_frame(summarised, seed):
    frame = holed(seed)
    summary = summarised(frame)
    for column, since_start in MEASURES.values():
        expected = reference.bands(frame, column, since_start)
        found = summary.bands(column, since_start=since_start).set_index(["step", "response_type"])
        assert set(found.index) == set(expected)
        for key, numbers in expected.items():
            assert found.loc[key].tolist() == close(list(numbers))


@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_pivots_of_the_whole_frame(summarised, seed):
    frame = holed(seed)
    summary = summarised(frame)
    assert set(reference.METRICS) == set(metrics.METRICS)
    for name in metrics.METRICS:
        assert summary.metric(name).to_dict() == close(reference.metric(frame, name).to_dict())


def test_paths_and_changes_equal_pivots_of_the_whole_frame(summarised):
    frame = holed(7)
    summary = summarised(frame)
    for column in ("logp_mean", "logp_sum"):
        table = reference.pivot(frame, column)
        for found, expected in (
            (summary.path(column), reference.by_type(table)),
            (summary.change_since_start(column), reference.by_type(reference.change(table)).dropna(axis=1, how="all")),
        ):
            assert list(found.columns[:2]) == ["chosen", "rejected"]
            pd.testing.assert_frame_equal(found, expected[found.columns], check_names=False, rtol=1e-12)


def test_effects_since_start_equal_those_of_two_steps_alone():
    frame = holed(3, num_probes=30)
    for part in summarise(frame).parts:
        alone = summarise(frame[frame["step"].isin([STEPS[0], part.step])]).changes()
        for name in ("argmax", "gap", "chosen", "bystanders"):
            ours, theirs = getattr(part.squeeze, name), getattr(alone, name)
            assert (ours.mean, ours.se, ours.num_probes) == close((theirs.mean, theirs.se, theirs.num_probes))


def test_an_effect_is_the_mean_of_paired_differences():
    frame = holed(5, num_probes=30)
    table = reference.change(reference.pivot(frame, "logp_mean")).loc[STEPS[-1]]
    found = summarise(frame).changes()
    assert found.chosen.mean == close(table["chosen"].mean()) and found.chosen.num_probes == table["chosen"].count()
    pairs = (table["chosen"] - table["rejected"]).dropna()
    assert found.difference("chosen", "rejected").mean == close(pairs.mean())
    delta = found.delta(["other_test", "chosen"])
    for name in delta:
        expected = table[name].dropna()
        assert delta[name].dropna().to_dict() == close(expected.to_dict())


def test_several_models_are_summarised_apart(tmp_path):
    frames = {name: holed(seed, model=name) for seed, name in enumerate(["small", "large"])}
    found = summarise_store(DynamicsStore(write_run(tmp_path / "run", pd.concat(frames.values()))))
    assert list(found) == ["small", "large"]
    for name, frame in frames.items():
        for metric in metrics.METRICS:
            assert found[name].metric(metric).to_dict() == close(reference.metric(frame, metric).to_dict())


def test_a_step_in_several_row_groups_is_read_whole(tmp_path):
    frame = holed(1, num_probes=4, types=["chosen", "rejected", "other_test"])
    store = DynamicsStore(write_run(tmp_path / "run", frame))
    expected = summarise_store(store)["policy"]
    manifest = store.root / "manifest.json"
    listed = json.loads(manifest.read_text())
    for part in listed["parts"]:
        path = store.root / part["kind"] / part["file"]
        pq.write_table(pq.read_table(path), path, row_group_size=1)
        part["bytes"] = path.stat().st_size
    manifest.write_text(json.dumps(listed))
    found = summarise_store(store)["policy"]
    pd.testing.assert_frame_equal(found.bands(), expected.bands(), check_exact=True)
    assert found.steps == list(STEPS) and found.table(40).step == 40


def test_files_merged_while_they_are_read_are_found_again(tmp_path, monkeypatch):
    frame = records(num_probes=3, types=["chosen", "rejected"])
    store = DynamicsStore(write_run(tmp_path / "run", frame))
    with store:
        before = store.blocks(RECORDS)
        expected = summarise_store(store)["policy"]
        store.compact()
    assert len(store.files(RECORDS)) == 1 and not before[0].path.exists()
    assert expected.table(40).row("chosen", "logp_mean").tolist() == close(
        summarise(frame).table(40).row("chosen", "logp_mean").tolist()
    )
    listings = [before, store.blocks(RECORDS)]
    monkeypatch.setattr(DynamicsStore, "blocks", lambda self, kind: listings.pop(0))
    assert summarise_store(store)["policy"].path().equals(expected.path())


def test_a_run_that_writes_faster_than_it_is_read_is_summarised(tmp_path, monkeypatch):
    """A step is written before each that is read, and files are merged; steps that were there are all found."""
    monkeypatch.setattr(parts, "FAN", 4)
    monkeypatch.setattr(summary, "MAX_THREADS", 1)
    frame, steps = records(num_probes=2, types=["chosen", "rejected"]), iter(range(10**6))
    first, read = frame[frame["step"] == frame["step"].min()], summary.read_block
    store = DynamicsStore(tmp_path / "run")
    store.create({}, {}, {})

    def write() -> None:
        rows = first.assign(step=next(steps))
        write_records(store, RECORDS.table(rows[RECORDS.schema.names].to_dict("list")), step=int(rows["step"].iloc[0]))

    def slow(block, vocab_size=None):
        write()
        return read(block, vocab_size)

    for _ in range(44):
        write()
    monkeypatch.setattr(summary, "read_block", slow)
    found = summarise_store(store)["policy"]
    assert found.steps == list(range(len(found.steps))) and len(found.steps) >= 44
    assert found.table(40).step == 40


def test_a_key_that_is_there_twice_is_refused(tmp_path, monkeypatch):
    frame = records(num_probes=2, types=["chosen", "rejected"])
    with pytest.raises(ValueError, match=r"same key twice: step 10, probe_id 'p001', response_type 'chosen'"):
        summarise(pd.concat([frame, frame[(frame["step"] == 10) & (frame["probe_id"] == "p001")].head(1)]))
    store = DynamicsStore(write_run(tmp_path / "run", frame))
    blocks = store.blocks(RECORDS)
    monkeypatch.setattr(DynamicsStore, "blocks", lambda self, kind: [*blocks[:2], *blocks[1:]])
    with pytest.raises(ValueError, match="two record files hold step 10"):
        summarise_store(store)


def test_a_store_without_records_is_refused(tmp_path):
    store = DynamicsStore(tmp_path / "run")
    store.create({}, {}, {})
    with pytest.raises(ValueError, match="no records in"):
        summarise_store(store)


@pytest.mark.parametrize("types", [["chosen", "rejected", "other_test"], ["rejected"], ["chosen", "greedy"]])
def test_like_moves_every_value_to_its_pair(types):
    """Other probes, other types, another order: a value is found at its pair, and nowhere else."""
    first, _ = split_frame(holed(2, steps=[0, 1], types=["chosen", "rejected", "other_test"]))
    other = split_frame(holed(3, steps=[1], types=types))[0]
    moved = first.like(other)
    assert moved.types == other.types and moved.probe_ids.equals(other.probe_ids)
    had = first.probe_ids.to_pylist()
    for row, name in enumerate(other.types):
        for column, probe in enumerate(other.probe_ids.to_pylist()):
            expected = first.row(name, "logp_sum")[had.index(probe)] if probe in had else np.nan
            assert moved.values("logp_sum")[row, column] == pytest.approx(expected, nan_ok=True)
    assert first.like(first) is first


def test_findings_of_a_store_are_those_of_its_frame(tmp_path):
    frame = records(SQUEEZED, argmax=0.5, missing=MISSING)
    run = write_run(tmp_path / "run", frame)
    summary = summarise_store(DynamicsStore(run))["policy"]
    found = rules.find(summary, {"method": "dpo"})
    expected = rules.find(frame.sample(frac=1, random_state=0), {"method": "dpo"})
    assert found and [one.text for one in found] == [one.text for one in expected]
    assert [one.evidence for one in found] == [close(one.evidence) for one in expected]


@needs_linux
def test_memory_does_not_grow_with_the_number_of_steps(tmp_path):
    """Ten times the steps, the same peak: a step is dropped once it is reduced."""
    peaks = {}
    for num_steps in (20, 200):
        run = write_large(tmp_path / str(num_steps), num_steps)
        code = (
            f"{PEAK}\nfrom trl_dynamics.paths.summary import summarise_store\n"
            "from trl_dynamics.store.store import DynamicsStore\n"
            "before = peak_kib()\n"
            f"summary = summarise_store(DynamicsStore({str(run)!r}))['policy']\n"
            f"assert len(summary.steps) == {num_steps}\n"
            "print(peak_kib() - before)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks[num_steps] = int(done.stdout) / 1024
    # 200 steps of 13,000 rows are 280 MB as a frame.
    assert peaks[200] < peaks[20] + 60, peaks


def write_large(folder, num_steps, num_probes=1000):
    frame = records(num_probes=2, types=["chosen", "rejected"], steps=[0, 1])
    store = DynamicsStore(folder)
    store.create({}, {}, {})
    types = [f"type_{index}" for index in range(13)]
    row = frame.iloc[0]
    rows = {
        "probe_id": np.repeat([f"p{index:05d}" for index in range(num_probes)], len(types)),
        "response_type": np.tile(types, num_probes),
    }
    for name in RECORDS.schema.names:
        rows.setdefault(name, np.full(num_probes * len(types), row[name]))
    for step in range(num_steps):
        table = pa.table(rows | {"step": np.full(num_probes * len(types), step)}, schema=RECORDS.schema)
        write_records(store, table.select(RECORDS.schema.names), step=step)
    return store.output_dir


def test_the_report_reads_summaries_and_no_frame(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", records(num_probes=4))
    read = DynamicsStore.read

    def read_a_part(self, kind, steps=None, columns=None):
        assert kind is not RECORDS or steps is not None, "the store was loaded whole"
        return read(self, kind, steps, columns)

    monkeypatch.setattr(DynamicsStore, "read", read_a_part)
    (series,) = split_series(load_runs([run]))
    assert series.subject("paths").steps == list(STEPS) and series.model == "policy"
