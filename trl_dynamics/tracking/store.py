"""The store: `output_dir/dynamics/` with one parquet shard per probing step, written atomically by one process.

    dynamics/meta.json            what produced the numbers: versions, seed, model, probe set, batch plan, cost
    dynamics/config.yaml          resolved arguments of the run
    dynamics/probe_set/           copy of the probe set that was scored
    dynamics/baseline.parquet     per-token y* ids, frozen when the first records were taken
    dynamics/records/*.parquet    one shard per (model, step)
    dynamics/trainer_log.json     the trainer's own log lines
    dynamics/report.html          the page, once made

A shard appears under its final name only when it is complete, so a crash loses at most the shard being written.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from trl_dynamics.probing.io import load as load_probe_set
from trl_dynamics.probing.schema import ProbeSet
from trl_dynamics.tracking.records import KEY_COLUMNS, RECORD_SCHEMA, SCHEMA_VERSION

FOLDER = "dynamics"
_SHARD = re.compile(r"m(\d{3})-step(\d{9})\.parquet")


class DynamicsStore:
    """Files of one run.

    Args:
        output_dir (`str` or `Path`): The run's output directory; everything of ours lies below its `dynamics/`.
    """

    def __init__(self, output_dir: str | Path):
        self.output_dir = Path(output_dir)
        self.root = self.output_dir / FOLDER
        self.records_dir = self.root / "records"

    @property
    def exists(self) -> bool:
        return (self.root / "meta.json").is_file()

    @property
    def has_records(self) -> bool:
        return bool(self._shards())

    def record_files(self) -> list[Path]:
        """The parquet files of the records, in order of (model index, first step)."""
        return [path for path, _, _ in sorted(self._shards(), key=lambda shard: (shard[1], shard[2]))]

    def recorded_steps(self, model_index: int = 0) -> list[int]:
        """Steps at which a model has records, ascending."""
        return sorted(step for _, index, step in self._shards() if index == model_index)

    def create(self, probe_set: ProbeSet, meta: dict, config: dict) -> None:
        """Start a new store; one that is already there is moved aside, never overwritten.

        Raises:
            OSError: If the place cannot be written, with the path and what to do.
        """
        with _writable(self.root):
            if self.root.exists():
                self._move_aside()
            self.records_dir.mkdir(parents=True)
            probe_set.save(self.root / "probe_set")
            self.write_meta(meta)
            _write_atomic(
                self.root / "config.yaml", yaml.safe_dump(config, sort_keys=True, allow_unicode=True).encode()
            )

    def resume(self, probe_set: ProbeSet, plan_fingerprint: str, step: int) -> None:
        """Continue a store after a checkpoint: rows of later steps are dropped, since they will be taken again.

        Raises:
            ValueError: If there is nothing to continue, or the probe set or its batches are not the same.
        """
        if not self.exists:
            raise ValueError(
                f"cannot resume probing: {self.root} holds no records of an earlier run. "
                "Resume in the output_dir that the run was started with, or start without resume_from_checkpoint."
            )
        earlier = self.read_meta()
        was, now = earlier["probe_set"]["fingerprint"], probe_set.fingerprint
        if was != now:
            raise ValueError(
                f"cannot resume probing with another probe set: {self.root} was recorded with fingerprint {was[:12]}, "
                f"the probe set {probe_set.name!r} has {now[:12]}. Pass the set in {self.root / 'probe_set'}, or use "
                "another output_dir."
            )
        if earlier["batch_plan"]["fingerprint"] != plan_fingerprint:
            raise ValueError(
                f"cannot resume probing: the probe batches differ from those recorded in {self.root}. Keep the "
                "tokenizer, probe_batch_size and the length limits of the run, or use another output_dir."
            )
        for path, _, shard_step in self._shards():
            if shard_step > step:
                path.unlink()
        if not self.has_records:
            self._baseline_path(0).unlink(missing_ok=True)

    def write_records(self, table: pa.Table, *, step: int, model_index: int = 0) -> Path:
        """Write one shard under its final name only once it is complete."""
        if table.schema != RECORD_SCHEMA:
            raise ValueError(f"records do not have the written schema: {table.schema}")
        path = self.records_dir / f"m{model_index:03d}-step{step:09d}.parquet"
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        with _writable(path):
            _write_atomic(path, sink.getvalue().to_pybytes())
        return path

    def read_records(self) -> pd.DataFrame:
        """All records as a frame, ordered by step, without a `run` column.

        Raises:
            ValueError: If the folder holds no records.
        """
        if self.exists:
            self.read_meta()  # refuses a newer schema
        shards = self._shards()
        if not shards:
            raise ValueError(f"no records in {self.records_dir}; run with a probe set first (probe_set=...)")
        tables = [pq.read_table(path) for path, _, _ in sorted(shards, key=lambda shard: (shard[1], shard[2]))]
        frame = pa.concat_tables(tables).to_pandas()
        repeated = frame.duplicated(list(KEY_COLUMNS))
        if repeated.any():
            raise ValueError(
                f"{self.records_dir} holds the same key twice: {frame[repeated].iloc[0][list(KEY_COLUMNS)].to_dict()}"
            )
        return frame

    def write_meta(self, meta: dict) -> None:
        payload = {"schema_version": SCHEMA_VERSION, **meta}
        with _writable(self.root):
            _write_atomic(self.root / "meta.json", json.dumps(payload, indent=2, ensure_ascii=False).encode())

    def read_meta(self) -> dict:
        """meta.json as it was written.

        Raises:
            ValueError: If there is none, or a newer version of this package wrote it.
        """
        path = self.root / "meta.json"
        if not path.is_file():
            raise ValueError(f"{self.output_dir} is not a run with records: {path} does not exist")
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["schema_version"] > SCHEMA_VERSION:
            raise ValueError(
                f"{path} has schema version {meta['schema_version']}, this version reads up to {SCHEMA_VERSION}; "
                "upgrade trl-dynamics"
            )
        return meta

    def write_trainer_log(self, log_history: list[dict]) -> None:
        """Replace the copy of the trainer's own log lines, which the report draws beside the probes."""
        path = self.root / "trainer_log.json"
        with _writable(path):
            _write_atomic(path, json.dumps(log_history).encode())

    def read_trainer_log(self) -> list[dict]:
        path = self.root / "trainer_log.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    def read_config(self) -> dict:
        path = self.root / "config.yaml"
        return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def read_probe_set(self) -> ProbeSet:
        return load_probe_set(self.root / "probe_set")

    def write_baseline(self, star_ids: list[list[int]], *, model_index: int = 0) -> None:
        """Freeze y* per response: one list of token ids per encoded response, in the batch plan's item order."""
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"star_ids": pa.array(star_ids, type=pa.list_(pa.int64()))}), sink)
        path = self._baseline_path(model_index)
        with _writable(path):
            _write_atomic(path, sink.getvalue().to_pybytes())

    def read_baseline(self, *, model_index: int = 0) -> list[list[int]]:
        """The frozen y* token ids, one list per encoded response.

        Raises:
            ValueError: If they were never written.
        """
        path = self._baseline_path(model_index)
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: without the frozen y* tokens the run's squeezing metrics cannot go on"
            )
        return pq.read_table(path)["star_ids"].to_pylist()

    def _baseline_path(self, model_index: int) -> Path:
        return self.root / ("baseline.parquet" if model_index == 0 else f"baseline-m{model_index:03d}.parquet")

    def _shards(self) -> list[tuple[Path, int, int]]:
        found = []
        for path in sorted(self.records_dir.glob("*.parquet")) if self.records_dir.is_dir() else []:
            match = _SHARD.fullmatch(path.name)
            if match:
                found.append((path, int(match[1]), int(match[2])))
        return found

    def _move_aside(self) -> None:
        index = 1
        while (aside := self.output_dir / f"{FOLDER}-old-{index}").exists():
            index += 1
        shutil.move(self.root, aside)


def load_records(*output_dirs: str | Path) -> pd.DataFrame:
    """Records of one or more runs as one frame, unique by (run, model, step, probe_id, response_type).

    Args:
        output_dirs: Runs' output directories (or their `dynamics/` folders).

    Returns:
        `pandas.DataFrame`: The columns of [`tracking.records.RECORD_SCHEMA`] with `run` in front.

    Raises:
        ValueError: If a folder holds no records.
    """
    if not output_dirs:
        raise ValueError("load_records needs at least one output directory")
    stores = [open_store(path) for path in output_dirs]
    frames = []
    for run, store in zip(run_names(stores), stores, strict=True):
        frame = store.read_records()
        frame.insert(0, "run", run)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def open_store(path: str | Path) -> DynamicsStore:
    """The store of a run, given its output directory or the `dynamics/` folder in it.

    Raises:
        ValueError: If there is none.
    """
    path = Path(path)
    store = DynamicsStore(path.parent if path.name == FOLDER and (path / "meta.json").is_file() else path)
    if not store.exists:
        raise ValueError(
            f"{path} holds no {FOLDER}/ folder with records; expected the output_dir of a run with probe_set set"
        )
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


@contextlib.contextmanager
def _writable(path: Path):
    try:
        yield
    except OSError as error:
        raise type(error)(
            error.errno,
            f"cannot write probe records ({os.strerror(error.errno) if error.errno else error}); nothing already "
            "written was lost. Free space or fix permissions, or choose another output_dir",
            str(path),
        ) from error


def _write_atomic(path: Path, payload: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
