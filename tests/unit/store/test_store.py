"""The store: what is written comes back, and only what belongs together is continued."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from small_stores import PLAN, check_resume, columns, expected, make_store, probe_set, resume, snapshot, write_records
from trl_dynamics import load_records
from trl_dynamics.paths.kinds import RECORDS
from trl_dynamics.paths.records import probe_set_files, read_baseline, read_probe_set, read_records, write_baseline
from trl_dynamics.probing.schema import ProbeSet
from trl_dynamics.store.manifest import SCHEMA_VERSION
from trl_dynamics.store.store import DynamicsStore, open_store, run_names


def steps_of(store: DynamicsStore) -> list[int]:
    return sorted(read_records(store)["step"].unique().tolist())


def test_records_round_trip(tmp_path):
    store = make_store(tmp_path, steps=(20, 0, 10))
    frame = read_records(store)
    assert list(frame.columns) == RECORDS.schema.names
    pd.testing.assert_frame_equal(frame, expected(0, 10, 20))
    assert sorted(store.files(RECORDS)) == sorted((store.root / "records").iterdir())
    assert [pd.read_parquet(path)["step"].unique().tolist() for path in store.files(RECORDS)] == [[0], [10], [20]]
    assert store.steps(RECORDS, 0) == [0, 10, 20] and store.steps(RECORDS, 1) == []
    pd.testing.assert_frame_equal(read_records(store, {10}), expected(10))


def test_nan_and_infinity_come_back(tmp_path):
    store = make_store(tmp_path, steps=())
    values = columns(0) | {"eos_logp": [float("nan"), float("-inf"), 0.0, -1e-300]}
    write_records(store, RECORDS.table(values), step=0)
    back = read_records(store)["eos_logp"]
    assert back.isna().tolist() == [True, False, False, False] and back.tolist()[1:] == [float("-inf"), 0.0, -1e-300]


def test_everything_else_round_trips(tmp_path):
    store = make_store(tmp_path, model="größe", seed=7)
    assert store.exists and store.steps(RECORDS)
    meta = store.read_meta()
    assert (meta["schema_version"], meta["model"], meta["seed"]) == (SCHEMA_VERSION, "größe", 7)
    assert store.read_config() == {"learning_rate": 1e-5}
    assert read_probe_set(store) == probe_set()
    assert read_baseline(store) == [[1, 2], [3]]
    assert store.read_trainer_log() == []
    store.write_trainer_log([{"step": 1, "loss": 0.5}])
    assert store.read_trainer_log() == [{"step": 1, "loss": 0.5}]
    write_baseline(store, [[9]], model_index=2)
    assert (read_baseline(store), read_baseline(store, model_index=2)) == ([[1, 2], [3]], [[9]])
    with pytest.raises(ValueError, match="baseline-m001.parquet is missing: .*frozen y"):
        read_baseline(store, model_index=1)


def test_reading_does_not_depend_on_the_locale(tmp_path):
    make_store(tmp_path, model="größe").write_trainer_log([{"note": "größe"}])
    code = (
        "import sys; from trl_dynamics.paths.records import read_probe_set\n"
        "from trl_dynamics.store.store import open_store; store = open_store(sys.argv[1])\n"
        "print(ascii([store.read_meta()['model'], read_probe_set(store).name, store.read_trainer_log()[0]['note']]))"
    )
    ascii_only = {
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "LC_ALL": "C",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=os.environ | ascii_only, capture_output=True, text=True
    )
    assert result.stdout.strip() == ascii(["größe", "größen", "größe"]), result.stderr


def test_a_step_taken_again_replaces_its_records_and_gets_a_new_file(tmp_path):
    store = make_store(tmp_path, steps=(0, 10))
    old = store.files(RECORDS)[1]
    write_records(store, RECORDS.table(columns(10, probe_ids=("z",))), step=10)
    new = store.files(RECORDS)[1]
    assert set(read_records(store).query("step == 10")["probe_id"]) == {"z"}
    assert new.name != old.name and sorted((store.root / "records").iterdir()) == sorted(store.files(RECORDS))
    resume(store, probe_set(), PLAN, 0)
    write_records(store, RECORDS.table(columns(10)), step=10)
    assert store.files(RECORDS)[1].name not in (old.name, new.name)


def test_folders_named_like_partitions_add_no_columns(tmp_path):
    store = make_store(tmp_path / "lr=1e-5")
    assert list(read_records(store).columns) == RECORDS.schema.names


def test_several_models_share_a_store(tmp_path):
    store = make_store(tmp_path, steps=())
    write_records(store, RECORDS.table(columns(0, model="later")), step=0, model_index=1)
    write_records(store, RECORDS.table(columns(5, model="first")), step=5, model_index=0)
    write_records(store, RECORDS.table(columns(0, model="first")), step=0, model_index=0)
    keys = read_records(store)[["model", "step"]].drop_duplicates()
    assert [tuple(row) for row in keys.to_numpy()] == [("first", 0), ("first", 5), ("later", 0)]


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop_columns("entropy_mean"),
        lambda table: table.append_column("extra", pa.array([1.0] * len(table))),
        lambda table: table.select(RECORDS.schema.names[::-1]),
        lambda table: table.set_column(1, "step", table["step"].cast(pa.int32())),
    ],
    ids=["missing", "extra", "order", "type"],
)
def test_only_the_written_schema_is_accepted(change, tmp_path):
    store = make_store(tmp_path, steps=())
    with pytest.raises(ValueError, match="records do not have the written schema"):
        write_records(store, change(RECORDS.table(columns(0))), step=0)
    assert not store.steps(RECORDS) and not list(store.root.rglob("*.parquet*"))[1:]


@pytest.mark.parametrize("change", [{"entropy_mean": None}, {"extra": [1.0] * 4}], ids=["missing", "extra"])
def test_columns_must_be_those_of_the_schema(change):
    changed = {name: values for name, values in (columns(0) | change).items() if values is not None}
    with pytest.raises(ValueError, match="records need exactly the columns"):
        RECORDS.table(changed)


def test_every_key_is_unique(tmp_path):
    store = make_store(tmp_path)
    assert not read_records(store).duplicated(list(RECORDS.keys)).any()
    manifest = store.root / "manifest.json"
    listed = json.loads(manifest.read_text())
    listed["parts"].append(listed["parts"][1])
    manifest.write_text(json.dumps(listed))
    with pytest.raises(ValueError, match="holds the same key twice: .*'step': 10"):
        read_records(store)


def test_a_step_holds_records_of_that_step(tmp_path):
    store = make_store(tmp_path)
    with pytest.raises(ValueError, match=r"expected records of step 30, got steps \[10\]"):
        write_records(store, RECORDS.table(columns(10)), step=30)
    with pytest.raises(ValueError, match=r"expected records of step 30, got steps \[\]"):
        write_records(store, RECORDS.table(columns(30)).slice(0, 0), step=30)
    assert steps_of(store) == [0, 10, 20]


def test_create_moves_an_earlier_store_aside_and_says_so(tmp_path, caplog):
    probes = {"name": "größen", "num_probes": 1, "fingerprint": probe_set().fingerprint}
    make_store(tmp_path, steps=(0,), method="dpo", probe_set=probes)
    assert not caplog.records
    first = snapshot(tmp_path / "dynamics")
    make_store(tmp_path, steps=(5,))
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'dynamics'} held the records of a dpo run (probe set 'größen', 1 probes, fingerprint "
        f"{probe_set().fingerprint[:12]}): it was moved to dynamics-old-1, since a new run begins there"
    ]
    second = snapshot(tmp_path / "dynamics")
    third = make_store(tmp_path, steps=())
    assert snapshot(tmp_path / "dynamics-old-1") == first
    assert snapshot(tmp_path / "dynamics-old-2") == second
    assert third.exists and not third.steps(RECORDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dynamics", "dynamics-old-1", "dynamics-old-2"]


@pytest.mark.parametrize(
    ("step", "kept"), [(20, [0, 10, 20]), (15, [0, 10]), (10, [0, 10]), (0, [0]), (99, [0, 10, 20])]
)
def test_resume_drops_later_steps_only(step, kept, tmp_path):
    store = make_store(tmp_path)
    before = snapshot(tmp_path)
    resume(DynamicsStore(tmp_path), probe_set(), PLAN, step)
    assert steps_of(store) == kept
    assert read_baseline(store) == [[1, 2], [3]]
    after = snapshot(tmp_path)
    changed = {name for name in after if after[name] != before[name]}
    assert changed <= {"dynamics/manifest.json"}, "no file of records is written again"
    assert len(before) - len(after) == 3 - len(kept)


def test_resume_before_the_first_record_leaves_none(tmp_path):
    store = make_store(tmp_path, steps=(10, 20))
    resume(store, probe_set(), PLAN, 5)
    assert not store.steps(RECORDS) and store.read(RECORDS).empty


def test_an_option_that_made_the_difference_is_named(tmp_path):
    """It is where earlier versions recorded it; a set that was not narrowed says nothing of it."""
    was = {"selection": {"probe_max_probes": 3, "probe_subset": None}}
    store = make_store(tmp_path, probe_set={"fingerprint": "a", "metadata": was})
    with pytest.raises(ValueError, match="the probe set changed, probe_max_probes was 3, is None; "):
        check_resume(store, probe_set(), PLAN, {"probe_set": {"fingerprint": "b", "metadata": {}}})
    check_resume(store, probe_set(), PLAN, {"probe_set": {"fingerprint": "a", "metadata": {}}})


@pytest.mark.parametrize(
    ("given", "plan", "said"),
    [
        (
            probe_set(" Nein."),
            PLAN,
            "the probe set changed; .*the set in .*probe_set/ folder, or use another output_dir",
        ),
        (probe_set(), "plan-2", "probe batches changed; .*probe_layout, probe_tokens_per_batch and the length limits"),
    ],
    ids=["probe set", "batch plan"],
)
def test_resume_refuses_other_things_and_loses_nothing(given, plan, said, tmp_path):
    store = make_store(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"cannot resume probing.*{said}"):
        resume(store, given, plan, 0)
    assert snapshot(tmp_path) == before


MODEL = {
    "architecture": "llama",
    "dtype": "float32",
    "vocab_size": 260,
    "num_parameters": 1000,
    "structure": "ab" * 32,
}
META = {"model": MODEL, "mixed_precision": "no", "top_k": 10, "num_processes": 1, "run_id": "one"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": MODEL | {"architecture": "qwen3"}}, "architecture was 'llama', is 'qwen3'; .*Keep the model"),
        ({"model": MODEL | {"num_parameters": 1001}}, "number of parameters was 1000, is 1001; .*adapter options"),
        ({"model": MODEL | {"vocab_size": 320}}, "vocabulary's size was 260, is 320; .*tokenizer"),
        ({"model": MODEL | {"dtype": "bfloat16"}}, "dtype was 'float32', is 'bfloat16'; .*Keep the dtype"),
        ({"model": MODEL | {"structure": "cd" * 32}}, "shapes or dtypes of the parameters changed; .*Keep the model"),
        ({"mixed_precision": "bf16"}, "mixed precision was 'no', is 'bf16'; .*Keep bf16/fp16"),
        ({"top_k": 20}, "probe_top_k was 10, is 20; .*Keep probe_top_k"),
        ({"run_id": "two"}, "the checkpoint is of another run than the records .*Resume from a checkpoint of the run"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_resume_refuses_another_model_and_loses_nothing(change, said, tmp_path):
    store = make_store(tmp_path, **META)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"cannot resume probing: .*{said}"):
        resume(store, probe_set(), PLAN, 10, META | change)
    assert snapshot(tmp_path) == before


def test_resume_accepts_what_may_change(tmp_path):
    store = make_store(tmp_path, **META)
    resume(store, probe_set(), PLAN, 10, META | {"num_processes": 8, "model": MODEL | {"name_or_path": "moved"}})
    resume(store, probe_set(), PLAN, 0, {"model": {}})
    assert steps_of(store) == [0]


def test_resume_needs_a_store(tmp_path):
    said = "holds no records of an earlier run.*or start without resume_from_checkpoint"
    with pytest.raises(ValueError, match=said):
        resume(DynamicsStore(tmp_path), probe_set(), PLAN, 0)
    for name in ("dynamics-old-2", "dynamics-old-10", "dynamics-old-x"):
        make_store(tmp_path)
        (tmp_path / "dynamics").rename(tmp_path / name)
    (tmp_path / "dynamics-old-11").mkdir()
    with pytest.raises(ValueError, match="moved aside lie in dynamics-old-10"):
        resume(DynamicsStore(tmp_path), probe_set(), PLAN, 0)


@pytest.mark.parametrize("command", ["track", "akg"])
def test_resume_over_what_a_command_wrote_says_where_the_run_is(command, tmp_path):
    for number, meta in enumerate(({"run_id": "one"}, {"run_id": "two"}, {"kind": command}), start=1):
        make_store(tmp_path, **meta)
        (tmp_path / "dynamics").rename(tmp_path / f"dynamics-old-{number}")
    store = make_store(tmp_path, kind=command)
    before = snapshot(tmp_path)
    said = f"holds what trl-dynamics {command} wrote.* Records .*aside lie in dynamics-old-{{}}. Move dynamics"
    for meta, number in ((None, 2), ({"run_id": "one"}, 1)):
        with pytest.raises(ValueError, match=said.format(number)):
            resume(store, probe_set(), PLAN, 0, meta)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "something that is no folder"),
        ("", "no records that this package can tell"),
        ('{"schema_version": 99}', r"records of a newer version of this package \(schema 99\)"),
        ('{"schema_version": 3, "kind": "track"}', "the records of trl-dynamics track"),
    ],
    ids=["file", "damaged", "newer", "track"],
)
def test_whatever_is_moved_aside_is_named(content, said, tmp_path, caplog):
    place = tmp_path / "dynamics"
    if content is None:
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "meta.json").write_text(content)
    assert make_store(tmp_path).steps(RECORDS)
    assert re.search(f"held {said}.*: it was moved to dynamics-old-1, since a new run begins there", caplog.text)


def test_load_records_of_one_and_several_runs(tmp_path):
    paths = [tmp_path / "seed0" / "dpo", tmp_path / "seed1" / "dpo", tmp_path / "sft"]
    for index, path in enumerate(paths):
        make_store(path, steps=(index,))
    assert load_records(paths[0])["run"].unique().tolist() == ["dpo"]
    frame = load_records(*paths)
    assert frame.columns[0] == "run" and frame.index.is_unique
    first, second, third = frame["run"].unique()
    assert (first, second, third.split("/")[-1]) == ("seed0/dpo", "seed1/dpo", "sft")
    assert frame.groupby("run")["step"].unique().map(list).to_dict() == {first: [0], second: [1], third: [2]}
    assert not frame.duplicated(["run", *RECORDS.keys]).any()


def test_runs_are_named_by_their_folder_unless_they_clash(tmp_path):
    def names(*paths):
        return run_names([DynamicsStore(tmp_path / path) for path in paths])

    assert names("a/x", "a/y") == ["x", "y"]
    assert names("a/x", "b/x") == ["a/x", "b/x"]
    assert names("a/b/x", "b/x") == ["a/b/x", f"{tmp_path.name}/b/x"]
    assert run_names([DynamicsStore("/x"), DynamicsStore("/b/x")]) == ["//x", "b/x"]
    with pytest.raises(ValueError, match="the same run was given twice"):
        names("a/x", "a/b/../x")


def test_a_run_is_opened_by_its_folder_or_the_dynamics_folder_in_it(tmp_path, monkeypatch):
    make_store(tmp_path / "run")
    for path in (tmp_path / "run", tmp_path / "run" / "dynamics", str(tmp_path / "run")):
        assert open_store(path).output_dir == tmp_path / "run"
    monkeypatch.chdir(tmp_path / "run")
    assert load_records("dynamics").equals(load_records(tmp_path / "run"))
    assert load_records(".")["run"].unique().tolist() == ["run"]
    make_store(tmp_path / "dynamics")
    assert open_store(tmp_path / "dynamics" / "dynamics").output_dir == tmp_path / "dynamics"


def test_nothing_to_load(tmp_path):
    with pytest.raises(ValueError, match="needs at least one output directory"):
        load_records()
    with pytest.raises(ValueError, match="holds no dynamics/ folder with records; expected the output_dir"):
        load_records(tmp_path)
    with pytest.raises(ValueError, match="no records in .*; run with a probe set first"):
        load_records(make_store(tmp_path / "run", steps=()).output_dir)
    with pytest.raises(ValueError, match="is not a run with records"):
        DynamicsStore(tmp_path).read_meta()


def test_half_written_and_foreign_files_are_ignored(tmp_path):
    store = make_store(tmp_path)
    shard = store.files(RECORDS)[0].read_bytes()
    leftovers = ["m000-step000000030-000009.parquet", "m000-step000000030-000010.parquet.tmp"]
    for name in leftovers:
        ((store.root / "records") / name).write_bytes(shard[: len(shard) // 2])
    ((store.root / "records") / "notes.parquet").write_text("not a shard")
    (store.root / "meta.json.tmp").write_text("{")
    pd.testing.assert_frame_equal(read_records(store), expected(0, 10, 20))
    resume(store, probe_set(), PLAN, 20)
    assert steps_of(store) == [0, 10, 20]
    names = {path.name for path in (store.root / "records").iterdir()}
    assert not names & set(leftovers) and "notes.parquet" in names
    write_records(store, RECORDS.table(columns(30)), step=30)
    assert steps_of(store) == [0, 10, 20, 30]


@pytest.mark.parametrize("name", ["meta.json", "manifest.json"])
def test_a_newer_schema_is_refused(name, tmp_path):
    store = make_store(tmp_path)
    path = store.root / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": SCHEMA_VERSION + 1}))
    said = f"schema version {SCHEMA_VERSION + 1}, this version reads up to {SCHEMA_VERSION}; upgrade trl-dynamics"
    before = snapshot(tmp_path)
    for attempt in (lambda: resume(store, probe_set(), PLAN, 0), lambda: load_records(tmp_path)):
        with pytest.raises(ValueError, match=said):
            attempt()
    assert snapshot(tmp_path) == before


def test_rows_of_a_newer_version_of_their_kind_are_neither_read_nor_added_to(tmp_path):
    store = make_store(tmp_path, steps=())
    newer = dataclasses.replace(RECORDS, version=2)
    store.write(0, {newer: newer.table(columns(0))})
    for refused in (lambda: store.read(RECORDS), lambda: store.write(1, {RECORDS: RECORDS.table(columns(1))})):
        with pytest.raises(ValueError, match="version 2, this version reads up to 1; upgrade"):
            refused()
    assert store.steps(RECORDS) == [0] and len(store.read(newer)) == 4


def test_values_of_numpy_and_torch_are_written_plain(tmp_path):
    metadata = {"threshold": np.float32(0.5), "dtype": torch.float16}
    given = ProbeSet(probe_set().probes, metadata=metadata)
    store = DynamicsStore(tmp_path)
    config = {"beta": np.float64(0.2), "model_init_kwargs": {"dtype": torch.float16}, "hook": print}
    with store:
        store.create({"seed": np.int64(7), "kinds": {"b", "a"}}, config, probe_set_files(given))
        store.write_trainer_log([{"step": np.int64(1), "loss": torch.tensor(0.5)}])
    assert store.read_config() == {"beta": 0.2, "model_init_kwargs": {"dtype": "float16"}}
    assert "hook" in (store.root / "config.yaml").read_text().splitlines()[0]
    assert store.read_meta() | {"seed": 7, "kinds": ["a", "b"]} == store.read_meta()
    assert store.read_trainer_log() == [{"step": 1, "loss": 0.5}]
    assert read_probe_set(store).metadata == {"threshold": 0.5, "dtype": "float16"}
