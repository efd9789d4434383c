"""The store: `output_dir/dynamics/`, written by the main process of one run.

    dynamics/meta.json            what produced the numbers: versions, seed, model, probe set, batch plan, cost
    dynamics/config.yaml          resolved arguments of the run
    dynamics/probe_set/           copy of the probe set that was scored
    dynamics/baseline.parquet     per-token y* ids, frozen when the first records were taken
    dynamics/manifest.json        which files of records/ and samples/ hold which steps; readers trust nothing else
    dynamics/records/*.parquet    one file per (model, step), merged into a few at the end of the run
    dynamics/samples/*.parquet    the same for greedy answers, where the run was asked for any
    dynamics/influence/*.parquet  what steps were predicted to do and did, see [`influence.kind`]
    dynamics/trainer_log.json     the trainer's own log lines
    dynamics/report.html          the page, once made
    .dynamics.lock                beside it while a run is writing

Every file is replaced as a whole or not at all (see [`store.files`]), and files of records never change, so a crash
at any moment loses at most the step being written.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from trl_dynamics.influence import kind as influence_kind
from trl_dynamics.plain import json_text, plain_or_text, yaml_text
from trl_dynamics.probing.io import load as load_probe_set
from trl_dynamics.probing.io import to_files as probe_set_files
from trl_dynamics.probing.schema import ProbeSet
from trl_dynamics.store import files
from trl_dynamics.store.aside import is_tracked, move_aside, where_is_run
from trl_dynamics.store.identity import refuse_other_probes, refuse_other_series
from trl_dynamics.store.lock import RunLock
from trl_dynamics.store.manifest import MANIFEST_NAME, Manifest, damage, refuse_newer
from trl_dynamics.store.parts import TARGET_BYTES, Shards
from trl_dynamics.store.records import (
    FOLDER,
    KEY_COLUMNS,
    RECORDS,
    SAMPLE_KEY_COLUMNS,
    SAMPLE_SCHEMA,
    SAMPLES,
    SCHEMA_VERSION,
    SCHEMAS,
)


class DynamicsStore:
    """Files of one run.

    Reading needs nothing. A writer opens the store first, which keeps every other writer out until it is closed:
    `with store: ...`, or [`open`] and [`close`].

    Args:
        output_dir (`str` or `Path`): The run's output directory; everything of ours lies below its `dynamics/`.
    """

    def __init__(self, output_dir: str | Path):
        self.output_dir = Path(output_dir)
        self.root = self.output_dir / FOLDER
        self._shards = Shards(self.root, lambda: self.read_meta()["schema_version"] if self.exists else None)
        self.records_dir = self.root / RECORDS
        self._lock = RunLock(self.output_dir)

    def open(self) -> None:
        """Keep other writers out; nothing happens when this object does so already.

        Raises:
            LockedError: If another writer is at work, with who and since when.
            OSError: If the place cannot be written.
        """
        with files.explained(self.root):
            files.make_folder(self.output_dir)
            self._lock.acquire()

    def close(self) -> None:
        """Let other writers in."""
        self._lock.release()

    def __enter__(self) -> "DynamicsStore":
        self.open()
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @property
    def exists(self) -> bool:
        return (self.root / "meta.json").is_file()

    @property
    def has_records(self) -> bool:
        return bool(self._shards.manifest().of_kind(RECORDS))

    def record_files(self) -> list[Path]:
        """The parquet files of the records, in order of (model index, first step); every row in them counts.

        Each file holds one model, with a row group per step.

        Raises:
            ValueError: If one is missing or damaged, with the way out.
        """
        return self._shards.consistent(lambda manifest: [*map(self._shards.path, manifest.of_kind(RECORDS))])

    def recorded_steps(self, model_index: int = 0, kind: str = RECORDS) -> list[int]:
        """Steps at which a model has records, or samples, ascending."""
        return self._shards.manifest().steps(model_index, kind)

    def create(self, probe_set: ProbeSet, meta: dict, config: dict, why: str = "a new run begins there") -> None:
        """Start a new store; an old one is moved aside once the new one is complete, and a log line says `why`.

        Values are written plain; what has no plain form is left out of config.yaml and named there in a comment.

        Raises:
            OSError: If the place cannot be written, with the path and what to do.
        """
        content = {f"probe_set/{name}": text.encode() for name, text in probe_set_files(probe_set).items()}
        content |= {
            "config.yaml": yaml_text(config).encode(),
            MANIFEST_NAME: Manifest().encode(),
            "meta.json": _encode_meta(meta),
        }
        with files.explained(self.root):
            new = self.output_dir / f".{FOLDER}-new"
            if new.exists():
                files.remove(new)
            files.make_folder(new / "records")
            files.make_folder(new / "probe_set")
            for name, payload in content.items():
                files.write(new / name, payload)
            if self.root.exists():
                move_aside(self.root, why)
            files.move_folder(new, self.root)

    def check_resume(self, probe_set: ProbeSet, plan_fingerprint: str, meta: dict | None = None) -> dict:
        """Whether this store can be continued; nothing is written.

        Args:
            meta (`dict`, *optional*): meta.json as this run would write it; with it the model and the precision are
                compared too.

        Returns:
            `dict`: meta.json as recorded.

        Raises:
            ValueError: If there is nothing to continue, or the probes, their batches or the model are not the same.
        """
        if not self.exists:
            raise ValueError(
                f"cannot resume probing: {self.root} holds no records of an earlier run. Resume in the output_dir "
                "that the run was started with, or start without resume_from_checkpoint or without probe_set."
                + where_is_run(self.root)
            )
        earlier = self.read_meta()
        if is_tracked(earlier):
            raise ValueError(
                f"cannot resume probing: {self.root} holds what trl-dynamics track scored, no records of a training "
                f"run.{where_is_run(self.root, (meta or {}).get('run_id'))} Move {FOLDER} away, and those of the run "
                "to its place, or use another output_dir."
            )
        refuse_other_probes(earlier, self.read_config(), probe_set, self.root)
        refuse_other_series(earlier, meta or {}, self.root)
        if earlier["batch_plan"]["fingerprint"] != plan_fingerprint:
            raise ValueError(
                f"cannot resume probing: the probe batches differ from those recorded in {self.root}. Keep the "
                "tokenizer, probe_layout, probe_tokens_per_batch and the length limits of the run, or use another "
                "output_dir."
            )
        return earlier

    def drop_after(self, step: int) -> None:
        """Drop the records and samples of later steps, and the frozen y* when none are left; and the influence of
        every step that is not done yet at `step`.

        Raises:
            ValueError: If a file of steps that stay is missing or damaged.
            OSError: If the place cannot be written.
        """
        manifest = self._shards.manifest()
        self._shards.check([part for part in manifest.parts if part.steps[0] <= step])
        with files.explained(self.root):
            self._shards.drop(lambda _, other: other > step)
            influence_kind.drop_from(self.root, step)
            if not self.has_records:
                files.remove(self._baseline_path(0))
            if self.read_meta()["schema_version"] < SCHEMA_VERSION:
                self.write_meta(self.read_meta())

    def resume(self, probe_set: ProbeSet, plan_fingerprint: str, step: int, meta: dict | None = None) -> None:
        """Continue a store after a checkpoint: [`check_resume`], then [`drop_after`] its step."""
        self.check_resume(probe_set, plan_fingerprint, meta)
        self.drop_after(step)

    def write_records(
        self, table: pa.Table, *, step: int, model_index: int = 0, samples: pa.Table | None = None
    ) -> Path:
        """Write the records of one step, and the greedy answers taken with them, replacing all that the step may have;
        returns the records' file. Both count from the same moment on.

        Raises:
            ValueError: If a table is empty, of another step, or not in the written schema.
            OSError: If it cannot be written; nothing changed then.
        """
        tables = {RECORDS: table} | ({} if samples is None else {SAMPLES: samples})
        for kind, rows in tables.items():
            if rows.schema != SCHEMAS[kind]:
                raise ValueError(f"{kind} do not have the written schema: {rows.schema}")
            if set(rows["step"].to_pylist()) != {step}:
                raise ValueError(f"expected {kind} of step {step}, got steps {sorted(set(rows['step'].to_pylist()))}")
        with files.explained(self.records_dir):
            return self._shards.add(table, step, model_index, samples)

    def read_records(self, steps: set[int] | None = None) -> pd.DataFrame:
        """All records, or those of `steps`, as a frame in order of (model index, step), without a `run` column.

        Raises:
            ValueError: If there are none, or a file is missing or damaged.
        """
        frame = self._read(RECORDS, steps, KEY_COLUMNS)
        if frame is None:
            raise ValueError(f"no records in {self.records_dir}; run with a probe set first (probe_set=...)")
        return frame

    def read_samples(self, steps: set[int] | None = None, columns: list[str] | None = None) -> pd.DataFrame:
        """Greedy answers as [`read_records`] reads records, with the keys and `columns` only where these are given; no
        rows where none were taken.

        Raises:
            ValueError: If a file is missing or damaged.
        """
        wanted = [*SAMPLE_KEY_COLUMNS, *columns] if columns is not None else SAMPLE_SCHEMA.names
        frame = self._read(SAMPLES, steps, SAMPLE_KEY_COLUMNS, wanted)
        return SAMPLE_SCHEMA.empty_table().select(wanted).to_pandas() if frame is None else frame

    def compact(self, target_bytes: int = TARGET_BYTES) -> None:
        """Merge records, and samples, into few files of at most about `target_bytes`, with a row group per step.

        Safe against a crash at any moment; needs memory for one step and disk space for one file.

        Raises:
            ValueError: If a file is missing or damaged.
            OSError: If it cannot be written; the records stay as they are then.
        """
        with files.explained(self.records_dir):
            self._shards.compact(target_bytes)

    def drop_damaged(self) -> list[tuple[int, int]]:
        """Give up files that are missing or damaged; returns the (model index, step) that are lost with them."""
        bad = [part for part in self._shards.manifest().parts if damage(self.root, part)]
        names = {part.file for part in bad}
        with files.explained(self.records_dir):
            self._shards.drop(lambda part, _: part.file in names)
        return sorted({(part.model_index, step) for part in bad for step in part.steps})

    def write_meta(self, meta: dict) -> None:
        with files.explained(self.root):
            files.write(self.root / "meta.json", _encode_meta(meta))

    def read_meta(self) -> dict:
        """meta.json as it was written.

        Raises:
            ValueError: If there is none, or a newer version of this package wrote it.
        """
        path = self.root / "meta.json"
        if not path.is_file():
            raise ValueError(f"{self.output_dir} is not a run with records: {path} does not exist")
        meta = json.loads(path.read_text(encoding="utf-8"))
        refuse_newer(path, meta["schema_version"])
        return meta

    def write_trainer_log(self, log_history: list[dict]) -> None:
        """Replace the copy of the trainer's own log lines, which the report draws; null for what is not finite."""
        path = self.root / "trainer_log.json"
        with files.explained(path):
            lines = [files.without_nan(plain_or_text(line)) for line in log_history]
            files.write(path, json.dumps(lines).encode())

    def read_trainer_log(self) -> list[dict]:
        path = self.root / "trainer_log.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    def read_config(self) -> dict:
        path = self.root / "config.yaml"
        return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def read_probe_set(self) -> ProbeSet:
        return load_probe_set(self.root / "probe_set")

    def has_baseline(self, model_index: int = 0) -> bool:
        return self._baseline_path(model_index).is_file()

    def write_baseline(self, star_ids: list[list[int]], *, model_index: int = 0) -> None:
        """Freeze y* per response, before the first records: one list of token ids per encoded response, in the batch
        plan's item order."""
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"star_ids": pa.array(star_ids, type=pa.list_(pa.int64()))}), sink)
        path = self._baseline_path(model_index)
        with files.explained(path):
            files.write(path, sink.getvalue().to_pybytes())

    def read_baseline(self, *, model_index: int = 0) -> list[list[int]]:
        """The frozen y* token ids, one list per encoded response.

        Raises:
            ValueError: If they were never written, or the file is damaged.
        """
        path = self._baseline_path(model_index)
        lost = "without the frozen y* tokens the run's squeezing metrics cannot go on"
        if not path.is_file():
            raise ValueError(f"{path} is missing: {lost}")
        try:
            with pq.ParquetFile(path) as file:
                return file.read()["star_ids"].to_pylist()
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is damaged ({error}): {lost}. Copy it again from a backup") from error

    def _read(
        self, kind: str, steps: set[int] | None, keys: tuple[str, ...], columns: list[str] | None = None
    ) -> pd.DataFrame | None:
        if self.exists:
            self.read_meta()  # refuses a newer schema
        tables = self._shards.consistent(lambda manifest: self._shards.tables(manifest, steps, kind, columns))
        if not tables:
            return None
        frame = pa.concat_tables(tables).to_pandas()
        repeated = frame.duplicated(list(keys))
        if repeated.any():
            first = frame[repeated].iloc[0][list(keys)].to_dict()
            raise ValueError(f"{self.root / kind} holds the same key twice: {first}")
        return frame

    def _baseline_path(self, model_index: int) -> Path:
        return self.root / ("baseline.parquet" if model_index == 0 else f"baseline-m{model_index:03d}.parquet")


def load_records(*output_dirs: str | Path) -> pd.DataFrame:
    """Records of one or more runs as one frame, unique by (run, model, step, probe_id, response_type).

    Args:
        output_dirs: Runs' output directories (or their `dynamics/` folders).

    Returns:
        `pandas.DataFrame`: The columns of [`store.records.RECORD_SCHEMA`] with `run` in front.

    Raises:
        ValueError: If a folder holds no records.
    """
    return read_runs("load_records", output_dirs, DynamicsStore.read_records)


def read_runs(
    caller: str, output_dirs: Sequence[str | Path], read: Callable[[DynamicsStore], pd.DataFrame]
) -> pd.DataFrame:
    """What `read` gives of each run, as one frame with `run` in front.

    Raises:
        ValueError: If there is no directory, with the name of the `caller`, or one holds no run.
    """
    if not output_dirs:
        raise ValueError(f"{caller} needs at least one output directory")
    stores = [open_store(path) for path in output_dirs]
    frames = []
    for run, store in zip(run_names(stores), stores, strict=True):
        frame = read(store)
        frame.insert(0, "run", run)
        frames.append(frame)
    return pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)


def open_store(path: str | Path) -> DynamicsStore:
    """The store of a run, given its output directory or the `dynamics/` folder in it.

    Raises:
        ValueError: If there is none.
    """
    path = Path(path)
    store = DynamicsStore(path.parent if path.name == FOLDER and (path / "meta.json").is_file() else path)
    if not store.exists:
        found = f"holds no {FOLDER}/ folder with records" if path.exists() else "does not exist"
        raise ValueError(f"{path} {found}; expected the output_dir of a run with probe_set set")
    return store


def run_names(stores: list[DynamicsStore]) -> list[str]:
    """A short, unique name per run: its folder's name, with parents in front only where names would clash."""
    parts = [store.output_dir.resolve().parts for store in stores]
    if len(set(parts)) < len(parts):
        raise ValueError(f"the same run was given twice: {[str(store.output_dir) for store in stores]}")
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _encode_meta(meta: dict) -> bytes:
    return json_text(meta | {"schema_version": SCHEMA_VERSION}, indent=2).encode()
