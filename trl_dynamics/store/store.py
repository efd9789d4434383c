"""The store: `output_dir/dynamics/`, written by the main process of one run.

    dynamics/meta.json            what produced the numbers: versions, seed, model, cost, what every recorder says
    dynamics/config.yaml          resolved arguments of the run
    dynamics/manifest.json        which files hold which steps of which kind of row; readers trust nothing else
    dynamics/<kind>/*.parquet     the rows of one kind; a file per (model, step), merged by size while the run goes on
    dynamics/<attachment>         what a recorder keeps beside its rows, such as a copy of what is observed
    dynamics/trainer_log.json     the trainer's own log lines
    dynamics/report.html          the page, once made
    ../.dynamics.lock             while a run is writing

Every file is replaced as a whole or not at all (see [`store.files`]), and files of rows never change, so a crash
at any moment loses at most the step being written.
"""

import errno
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from trl_dynamics.plain import json_text, plain_or_text, yaml_text
from trl_dynamics.store import files
from trl_dynamics.store.aside import command_of, move_aside, where_is_run
from trl_dynamics.store.identity import Same, refuse_other_series
from trl_dynamics.store.kind import BEFORE, Kind
from trl_dynamics.store.lock import RunLock
from trl_dynamics.store.manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest, refuse_newer
from trl_dynamics.store.parts import TARGET_BYTES, Parts

# Where everything is, below a run's output_dir.
FOLDER = "dynamics"


@dataclass(frozen=True)
class Block:
    """The rows of one kind, model and step: what is read at once.

    Args:
        path (`Path`): The file.
        group (`int` or `None`): Its row group; None for the whole file.
        model_index, step (`int`): Whose rows.
    """

    path: Path
    group: int | None
    model_index: int
    step: int

    def read(self, columns: Sequence[str], names: Sequence[str] = ()) -> pa.Table:
        """The rows with `columns`; those of them in `names` as dictionaries.

        Raises:
            FileNotFoundError: If the run has merged its files meanwhile; ask for [`DynamicsStore.blocks`] again.
        """
        with pq.ParquetFile(self.path, read_dictionary=list(names)) as file:
            if self.group is None:
                return file.read(list(columns), use_threads=False)
            return file.read_row_group(self.group, list(columns), use_threads=False)


class DynamicsStore:
    """Files of one run.

    Reading needs nothing. A writer opens the store first, which keeps every other writer out until it is closed:
    `with store: ...`, or [`open`] and [`close`].

    Args:
        output_dir (`str` or `Path`): The run's output directory; the store is its folder `dynamics/`.
    """

    def __init__(self, output_dir: str | Path):
        self.output_dir = Path(output_dir)
        self.root = self.output_dir / FOLDER
        self._parts = Parts(self.root, lambda: self.read_meta()["schema_version"] if self.exists else None)
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

    def files(self, kind: Kind) -> list[Path]:
        """The parquet files of a kind, in order of (model index, first step); every row in them counts.

        Each file holds one model, with a row group per step.

        Raises:
            ValueError: If one is missing or damaged, with the way out.
        """
        return self._parts.consistent(lambda manifest: [*map(self._parts.path, manifest.of_kind(kind.name))])

    def steps(self, kind: Kind, model_index: int | None = None) -> list[int]:
        """Steps at which a model, or any, has rows of a kind, ascending."""
        return self._parts.manifest().steps(kind.name, model_index)

    def create(
        self, meta: dict, config: dict, attachments: Mapping[str, bytes], why: str = "a new run begins there"
    ) -> None:
        """Start a new store; an old one is moved aside once the new one is complete, and a log line says `why`.

        Values are written plain; what has no plain form is left out of config.yaml and named there in a comment.

        Args:
            meta, config (`dict`): For meta.json and config.yaml.
            attachments (`Mapping[str, bytes]`): File name -> content, see [`attach`].

        Raises:
            OSError: If the place cannot be written, with the path and what to do.
        """
        content = dict(attachments) | {
            "config.yaml": yaml_text(config).encode(),
            MANIFEST_NAME: Manifest().encode(),
            "meta.json": _encode_meta(meta),
        }
        with files.explained(self.root):
            new = self.output_dir / f".{FOLDER}-new"
            if new.exists():
                files.remove(new)
            for folder in sorted({(new / name).parent for name in content}):
                files.make_folder(folder)
            for name, payload in content.items():
                files.write(new / name, payload)
            if self.root.exists():
                move_aside(self.root, why)
            files.move_folder(new, self.root)

    def check_resume(self, meta: dict, same: Sequence[Same] = ()) -> dict:
        """Whether this store can be continued; nothing is written.

        Args:
            meta (`dict`): meta.json as this run would write it.
            same (`Sequence[Same]`): The entries of it that must be those that were recorded.

        Returns:
            `dict`: meta.json as recorded.

        Raises:
            ValueError: If there is nothing to continue, or one of `same` differs.
        """
        if not self.exists:
            raise ValueError(
                f"cannot resume probing: {self.root} holds no records of an earlier run. Resume in the output_dir "
                "that the run was started with, or start without resume_from_checkpoint or without probe_set."
                + where_is_run(self.root)
            )
        earlier = self.read_meta()
        if command := command_of(earlier):
            raise ValueError(
                f"cannot resume probing: {self.root} holds what trl-dynamics {command} wrote, no records of a "
                f"training run.{where_is_run(self.root, meta.get('run_id'))} Move {FOLDER} away, and those of the run "
                "to its place, or use another output_dir."
            )
        refuse_other_series(earlier, meta, same, self.root)
        return earlier

    def drop_after(self, step: int) -> None:
        """Drop the rows that a run which goes on after `step` will write again: those of later steps, and of kinds
        whose rows describe a step that is yet to be taken, those of `step` too. A store of an earlier schema version
        becomes one of today's.

        Raises:
            ValueError: If a file of steps that stay is missing or damaged.
            OSError: If the place cannot be written.
        """
        manifest = self._parts.manifest()
        last = {kind: step - 1 if rules["kept"] == BEFORE else step for kind, rules in manifest.kinds.items()}
        self._parts.check(part for part in manifest.parts if part.steps[0] <= last[part.kind])
        with files.explained(self.root):
            self._parts.drop(lambda part, other: other > last[part.kind])
            meta = self.read_meta()
            if meta["schema_version"] < SCHEMA_VERSION:
                self.write_meta(meta)

    def write(self, step: int, tables: Mapping[Kind, pa.Table | None], model_index: int = 0) -> None:
        """Write the rows of one step, replacing all that the step may have of these kinds; None takes them away. All
        of them count from the same moment on.

        Raises:
            ValueError: If a table is empty, of another step, or not in the schema of its kind, or a newer version
                wrote the rows that are there.
            OSError: If it cannot be written; nothing changed then.
        """
        for kind, rows in tables.items():
            if rows is None:
                continue
            if rows.schema != kind.schema:
                raise ValueError(f"{kind.name} do not have the written schema: {rows.schema}")
            if set(rows["step"].to_pylist()) != {step}:
                found = sorted(set(rows["step"].to_pylist()))
                raise ValueError(f"expected {kind.name} of step {step}, got steps {found}")
        with files.explained(self.root):
            self._require_root()
            self._parts.add(step, tables, model_index)

    def read(self, kind: Kind, steps: set[int] | None = None, columns: list[str] | None = None) -> pd.DataFrame:
        """All rows of a kind, or those of `steps`, in order of (model index, step), without a `run` column; the keys
        and `columns` only, where these are given. No rows where none were written.

        Raises:
            ValueError: If a column is unknown, a file is missing or damaged, or a newer version wrote the rows.
        """
        schema = kind.part_of(columns)
        tables = self._consistent(kind, lambda manifest: self._parts.tables(manifest, kind.name, steps, schema))
        frame = pa.concat_tables(tables or [schema.empty_table()]).to_pandas()
        repeated = frame.duplicated(list(kind.keys))
        if repeated.any():
            first = frame[repeated].iloc[0][list(kind.keys)].to_dict()
            raise ValueError(f"{self.root / kind.name} holds the same key twice: {first}")
        return frame

    def blocks(self, kind: Kind) -> list[Block]:
        """Every step of a kind, in order of (model index, step), to be read one at a time.

        Raises:
            ValueError: If a file is missing or damaged, or a newer version wrote the rows.
        """

        def found(manifest: Manifest) -> list[Block]:
            return [
                Block(self._parts.path(part), index if len(part.steps) > 1 else None, part.model_index, step)
                for part in manifest.of_kind(kind.name)
                for index, step in enumerate(part.steps)
            ]

        return sorted(self._consistent(kind, found), key=lambda block: (block.model_index, block.step))

    def compact(self, target_bytes: int = TARGET_BYTES) -> None:
        """Merge the files of every kind into few of at most about `target_bytes`, with a row group per step.

        Safe against a crash at any moment; needs memory for one step and disk space for one file.

        Raises:
            ValueError: If a file is missing or damaged.
            OSError: If it cannot be written; the rows stay as they are then.
        """
        with files.explained(self.root):
            self._parts.compact(target_bytes)

    def drop_damaged(self) -> list[tuple[int, int]]:
        """Give up files that are missing or damaged, which every file is read for; returns the (model index, step)
        that are lost with them."""
        bad = self._parts.damaged()
        names = {(part.kind, part.file) for part in bad}
        with files.explained(self.root):
            self._parts.drop(lambda part, _: (part.kind, part.file) in names)
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

    def attach(self, name: str, payload: bytes) -> None:
        """Write, or replace, a file that a recorder keeps beside its rows; `name` may have folders."""
        path = self.root / name
        with files.explained(path):
            self._require_root()
            files.make_folder(path.parent)
            files.write(path, payload)

    def attachment(self, name: str) -> bytes | None:
        """The content of an attachment, None where there is none."""
        path = self.root / name
        return path.read_bytes() if path.is_file() else None

    def _require_root(self) -> None:
        """Rows without the folder that says what they are of would be of no use to anybody."""
        if not self.root.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.root))

    def _consistent(self, kind: Kind, read: Callable[[Manifest], list]) -> list:
        if self.exists:
            self.read_meta()  # refuses a newer schema

        def checked(manifest: Manifest) -> list:
            self._parts.refuse_newer_rows(manifest, kind)
            return read(manifest)

        return self._parts.consistent(checked)


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
