"""The store: what is written comes back, failures lose nothing, and only what belongs together is continued."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_dynamics import ProbeSet, load_records
from trl_dynamics.probing.schema import Probe
from trl_dynamics.tracking import store as store_module
from trl_dynamics.tracking.records import KEY_COLUMNS, RECORD_SCHEMA, SCHEMA_VERSION, VALUE_COLUMNS, to_table
from trl_dynamics.tracking.store import DynamicsStore, open_store, run_names

PLAN = "plan-1"


def probe_set(answer: str = " Ja.") -> ProbeSet:
    return ProbeSet((Probe("größe", "Why?", {"chosen": answer, "rejected": " No."}),), name="größen")


def columns(step: int, model: str = "größe", probe_ids=("a", "b")) -> dict[str, list]:
    rows = [(probe_id, response_type) for probe_id in probe_ids for response_type in ("chosen", "rejected")]
    keys = {
        "model": [model] * len(rows),
        "step": [step] * len(rows),
        "probe_id": [probe_id for probe_id, _ in rows],
        "response_type": [response_type for _, response_type in rows],
        "num_tokens": [3] * len(rows),
        "truncated": [False] * len(rows),
    }
    return keys | {name: [-step - 0.1 * i for i in range(len(rows))] for name in VALUE_COLUMNS}


def make_store(output_dir, steps=(0, 10, 20), **meta) -> DynamicsStore:
    store = DynamicsStore(output_dir)
    facts = {"probe_set": {"fingerprint": probe_set().fingerprint}, "batch_plan": {"fingerprint": PLAN}}
    store.create(probe_set(), facts | meta, {"learning_rate": 1e-5})
    store.write_baseline([[1, 2], [3]])
    for step in steps:
        store.write_records(to_table(columns(step)), step=step)
    return store


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def steps_of(store: DynamicsStore) -> list[int]:
    return sorted(store.read_records()["step"].unique().tolist())


def test_records_round_trip(tmp_path):
    store = make_store(tmp_path, steps=(20, 0, 10))
    frame = store.read_records()
    assert list(frame.columns) == RECORD_SCHEMA.names
    expected = pd.concat([to_table(columns(step)).to_pandas() for step in (0, 10, 20)], ignore_index=True)
    pd.testing.assert_frame_equal(frame, expected)
    files = [path.name for path in sorted(store.records_dir.iterdir())]
    assert files == [f"m000-step{step:09d}.parquet" for step in (0, 10, 20)]


def test_nan_and_infinity_come_back(tmp_path):
    store = make_store(tmp_path, steps=())
    values = columns(0) | {"eos_logp": [float("nan"), float("-inf"), 0.0, -1e-300]}
    store.write_records(to_table(values), step=0)
    back = store.read_records()["eos_logp"]
    assert back.isna().tolist() == [True, False, False, False] and back.tolist()[1:] == [float("-inf"), 0.0, -1e-300]


def test_everything_else_round_trips(tmp_path):
    store = make_store(tmp_path, model="größe", seed=7)
    assert store.exists and store.has_records
    meta = store.read_meta()
    assert (meta["schema_version"], meta["model"], meta["seed"]) == (SCHEMA_VERSION, "größe", 7)
    assert store.read_config() == {"learning_rate": 1e-5}
    assert store.read_probe_set() == probe_set()
    assert store.read_baseline() == [[1, 2], [3]]
    assert store.read_trainer_log() == []
    store.write_trainer_log([{"step": 1, "loss": 0.5}])
    assert store.read_trainer_log() == [{"step": 1, "loss": 0.5}]
    store.write_baseline([[9]], model_index=2)
    assert (store.read_baseline(), store.read_baseline(model_index=2)) == ([[1, 2], [3]], [[9]])
    with pytest.raises(ValueError, match="baseline-m001.parquet is missing: .*frozen y"):
        store.read_baseline(model_index=1)


def test_reading_does_not_depend_on_the_locale(tmp_path):
    make_store(tmp_path, model="größe").write_trainer_log([{"note": "größe"}])
    code = (
        "import sys; from trl_dynamics.tracking.store import open_store; store = open_store(sys.argv[1])\n"
        "print(ascii([store.read_meta()['model'], store.read_probe_set().name, store.read_trainer_log()[0]['note']]))"
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


def test_rewriting_a_step_replaces_its_shard(tmp_path):
    store = make_store(tmp_path, steps=(0, 10))
    store.write_records(to_table(columns(10, probe_ids=("z",))), step=10)
    assert set(store.read_records().query("step == 10")["probe_id"]) == {"z"}


def test_several_models_share_a_store(tmp_path):
    store = make_store(tmp_path, steps=())
    store.write_records(to_table(columns(0, model="later")), step=0, model_index=1)
    store.write_records(to_table(columns(5, model="first")), step=5, model_index=0)
    store.write_records(to_table(columns(0, model="first")), step=0, model_index=0)
    keys = store.read_records()[["model", "step"]].drop_duplicates()
    assert [tuple(row) for row in keys.to_numpy()] == [("first", 0), ("first", 5), ("later", 0)]


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop_columns("entropy_mean"),
        lambda table: table.append_column("extra", pa.array([1.0] * len(table))),
        lambda table: table.select(RECORD_SCHEMA.names[::-1]),
        lambda table: table.set_column(1, "step", table["step"].cast(pa.int32())),
    ],
    ids=["missing", "extra", "order", "type"],
)
def test_only_the_written_schema_is_accepted(change, tmp_path):
    store = make_store(tmp_path, steps=())
    with pytest.raises(ValueError, match="records do not have the written schema"):
        store.write_records(change(to_table(columns(0))), step=0)
    assert not store.has_records and list(store.records_dir.iterdir()) == []


@pytest.mark.parametrize("change", [{"entropy_mean": None}, {"extra": [1.0] * 4}], ids=["missing", "extra"])
def test_columns_must_be_those_of_the_schema(change):
    changed = {name: values for name, values in (columns(0) | change).items() if values is not None}
    with pytest.raises(ValueError, match="records need exactly the columns"):
        to_table(changed)


def test_every_key_is_unique(tmp_path):
    store = make_store(tmp_path)
    assert not store.read_records().duplicated(list(KEY_COLUMNS)).any()
    store.write_records(to_table(columns(10)), step=30)  # rows of step 10 under another shard's name
    with pytest.raises(ValueError, match="holds the same key twice: .*'step': 10"):
        store.read_records()


def test_create_moves_an_earlier_store_aside(tmp_path):
    make_store(tmp_path, steps=(0,))
    first = snapshot(tmp_path / "dynamics")
    make_store(tmp_path, steps=(5,))
    second = snapshot(tmp_path / "dynamics")
    third = make_store(tmp_path, steps=())
    assert snapshot(tmp_path / "dynamics-old-1") == first
    assert snapshot(tmp_path / "dynamics-old-2") == second
    assert third.exists and not third.has_records
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dynamics", "dynamics-old-1", "dynamics-old-2"]


@pytest.mark.parametrize(
    ("step", "kept"), [(20, [0, 10, 20]), (15, [0, 10]), (10, [0, 10]), (0, [0]), (99, [0, 10, 20])]
)
def test_resume_drops_later_steps_only(step, kept, tmp_path):
    store = make_store(tmp_path)
    before = snapshot(tmp_path)
    DynamicsStore(tmp_path).resume(probe_set(), PLAN, step)
    assert steps_of(store) == kept
    assert store.read_baseline() == [[1, 2], [3]]
    after = snapshot(tmp_path)
    assert after == {name: before[name] for name in after}
    assert len(before) - len(after) == 3 - len(kept)


def test_resume_before_the_first_record_thaws_the_baseline(tmp_path):
    store = make_store(tmp_path, steps=(10, 20))
    store.resume(probe_set(), PLAN, 5)
    assert not store.has_records
    with pytest.raises(ValueError, match="baseline.parquet is missing"):
        store.read_baseline()


@pytest.mark.parametrize(
    ("given", "plan", "said"),
    [
        (probe_set(" Nein."), PLAN, "another probe set: .*Pass the set in .*probe_set, or use another output_dir"),
        (probe_set(), "plan-2", "probe batches differ .*probe_batch_size and the length limits"),
    ],
    ids=["probe set", "batch plan"],
)
def test_resume_refuses_other_things_and_loses_nothing(given, plan, said, tmp_path):
    store = make_store(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"cannot resume probing.*{said}"):
        store.resume(given, plan, 0)
    assert snapshot(tmp_path) == before


def test_resume_needs_a_store(tmp_path):
    with pytest.raises(
        ValueError, match="holds no records of an earlier run.*or start without resume_from_checkpoint"
    ):
        DynamicsStore(tmp_path).resume(probe_set(), PLAN, 0)


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
    assert not frame.duplicated(["run", *KEY_COLUMNS]).any()


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


def fail_in_open(monkeypatch, error):
    def broken(path, *arguments, **options):
        if str(path).endswith(".tmp"):
            raise error
        return open(path, *arguments, **options)

    monkeypatch.setattr(store_module, "open", broken, raising=False)


def fail_in_write(monkeypatch, error):
    """The file is opened and half of it is written before the disk is full."""

    class HalfFile:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def write(self, payload):
            self.file.write(payload[: len(payload) // 2])
            raise error

    monkeypatch.setattr(store_module, "open", lambda *args: HalfFile(open(*args)), raising=False)


def fail_in_fsync(monkeypatch, error):
    def broken(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", broken)


def fail_in_replace(monkeypatch, error):
    def broken(source, target):
        raise error

    monkeypatch.setattr(os, "replace", broken)


FAILURES = [fail_in_open, fail_in_write, fail_in_fsync, fail_in_replace]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("fail", FAILURES)
def test_a_failed_write_loses_nothing(fail, code, tmp_path, monkeypatch):
    store = make_store(tmp_path)
    before = snapshot(tmp_path)
    writes = {
        "m000-step000000030.parquet": lambda: store.write_records(to_table(columns(30)), step=30),
        "m000-step000000020.parquet": lambda: store.write_records(to_table(columns(20, probe_ids=("z",))), step=20),
        "baseline.parquet": lambda: store.write_baseline([[5]]),
        "trainer_log.json": lambda: store.write_trainer_log([{"loss": 1.0}]),
        "dynamics": lambda: store.write_meta({"seed": 1}),
    }
    for name, write in writes.items():
        with monkeypatch.context() as patch:
            fail(patch, OSError(code, os.strerror(code)))
            with pytest.raises(OSError, match="cannot write probe records .*or choose another output_dir") as error:
                write()
        assert type(error.value) is type(OSError(code, ""))
        assert error.value.errno == code and os.strerror(code) in str(error.value)
        assert Path(error.value.filename).name == name and "nothing already written was lost" in str(error.value)
        assert snapshot(tmp_path) == before, "earlier files are untouched and no .tmp is left"
    assert steps_of(store) == [0, 10, 20]
    store.write_records(to_table(columns(30)), step=30)
    assert steps_of(store) == [0, 10, 20, 30]


@pytest.mark.parametrize("fail", FAILURES)
def test_a_failed_create_keeps_the_earlier_store(fail, tmp_path, monkeypatch):
    make_store(tmp_path)
    before = snapshot(tmp_path / "dynamics")
    with monkeypatch.context() as patch:
        fail(patch, OSError(errno.ENOSPC, "full"))
        with pytest.raises(OSError, match="No space left on device"):
            make_store(tmp_path)
    assert snapshot(tmp_path / "dynamics-old-1") == before
    assert not DynamicsStore(tmp_path).exists
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_a_path_below_a_regular_file(below, tmp_path):
    (tmp_path / "file").write_text("I am a file")
    with pytest.raises(OSError, match="cannot write probe records .*Not a directory") as error:
        make_store(tmp_path / below)
    assert error.value.filename == str(tmp_path / below / "dynamics")
    assert (tmp_path / "file").read_text() == "I am a file"


def test_half_written_and_foreign_files_are_ignored(tmp_path):
    store = make_store(tmp_path)
    expected = store.read_records()
    shard = next(store.records_dir.iterdir()).read_bytes()
    (store.records_dir / "m000-step000000030.parquet.tmp").write_bytes(shard[: len(shard) // 2])
    (store.records_dir / "notes.parquet").write_text("not a shard")
    (store.root / "meta.json.tmp").write_text("{")
    pd.testing.assert_frame_equal(store.read_records(), expected)
    store.resume(probe_set(), PLAN, 20)
    assert steps_of(store) == [0, 10, 20]
    store.write_records(to_table(columns(30)), step=30)
    assert steps_of(store) == [0, 10, 20, 30]


def test_a_shard_is_complete_before_it_has_its_name(tmp_path, monkeypatch):
    store = make_store(tmp_path, steps=())
    synced = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (fsync(descriptor), synced.append(descriptor)))

    def checked(source, target):
        assert synced and not Path(target).exists()
        assert len(pq.read_table(source)) == 4
        replace(source, target)

    monkeypatch.setattr(os, "replace", checked)
    path = store.write_records(to_table(columns(0)), step=0)
    assert path.is_file() and len(synced) == 1


def test_a_newer_schema_is_refused(tmp_path):
    store = make_store(tmp_path)
    newer = store.read_meta() | {"schema_version": SCHEMA_VERSION + 1}
    (store.root / "meta.json").write_text(json.dumps(newer))
    said = f"schema version {SCHEMA_VERSION + 1}, this version reads up to {SCHEMA_VERSION}; upgrade trl-dynamics"
    with pytest.raises(ValueError, match=said):
        store.read_meta()
    with pytest.raises(ValueError, match=said):
        store.resume(probe_set(), PLAN, 0)
    with pytest.raises(ValueError, match=said):
        load_records(tmp_path)
