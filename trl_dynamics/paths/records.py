"""The records of a store, and what comes with them: the probe set that was scored, and the frozen y* tokens."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from trl_dynamics.paths.kinds import RECORDS
from trl_dynamics.probing.io import load as load_probe_set
from trl_dynamics.probing.io import to_files
from trl_dynamics.probing.schema import ProbeSet
from trl_dynamics.store.store import DynamicsStore, read_runs

PROBE_SET = "probe_set"


def load_records(*output_dirs: str | Path) -> pd.DataFrame:
    """Records of one or more runs as one frame, unique by (run, model, step, probe_id, response_type).

    Args:
        output_dirs: Runs' output directories (or their `dynamics/` folders).

    Returns:
        `pandas.DataFrame`: The columns of [`paths.kinds.RECORDS`] with `run` in front.

    Raises:
        ValueError: If a folder holds no records.
    """
    return read_runs("load_records", output_dirs, read_records)


def read_records(store: DynamicsStore, steps: set[int] | None = None) -> pd.DataFrame:
    """All records of a run, or those of `steps`, in order of (model index, step).

    Raises:
        ValueError: If there are none, or a file is missing or damaged.
    """
    frame = store.read(RECORDS, steps)
    if frame.empty:
        raise no_records(store)
    return frame


def no_records(store: DynamicsStore) -> ValueError:
    """The error about a store without records."""
    return ValueError(f"no records in {store.root / RECORDS.name}; run with a probe set first (probe_set=...)")


def probe_set_files(probe_set: ProbeSet) -> dict[str, bytes]:
    """A probe set as attachments of a store."""
    return {f"{PROBE_SET}/{name}": text.encode() for name, text in to_files(probe_set).items()}


def read_probe_set(store: DynamicsStore) -> ProbeSet:
    """The probe set that was scored."""
    return load_probe_set(store.root / PROBE_SET)


def write_baseline(store: DynamicsStore, star_ids: list[list[int]], *, model_index: int = 0) -> None:
    """Freeze y* per response, before the first records: one list of token ids per encoded response, in the batch
    plan's item order."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"star_ids": pa.array(star_ids, type=pa.list_(pa.int64()))}), sink)
    store.attach(_baseline(model_index), sink.getvalue().to_pybytes())


def has_baseline(store: DynamicsStore, model_index: int = 0) -> bool:
    """Whether y* of a model was frozen."""
    return store.attachment(_baseline(model_index)) is not None


def read_baseline(store: DynamicsStore, *, model_index: int = 0) -> list[list[int]]:
    """The frozen y* token ids, one list per encoded response.

    Raises:
        ValueError: If they were never written, or the file is damaged.
    """
    path, payload = store.root / _baseline(model_index), store.attachment(_baseline(model_index))
    lost = "without the frozen y* tokens the run's squeezing metrics cannot go on"
    if payload is None:
        raise ValueError(f"{path} is missing: {lost}")
    try:
        return pq.read_table(pa.BufferReader(payload))["star_ids"].to_pylist()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is damaged ({error}): {lost}. Copy it again from a backup") from error


def _baseline(model_index: int) -> str:
    return "baseline.parquet" if model_index == 0 else f"baseline-m{model_index:03d}.parquet"
