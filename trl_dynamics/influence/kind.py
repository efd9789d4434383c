"""What single steps of a run were predicted to do to every observed answer, and what they did: schema, files, reading.

    dynamics/influence/step-*.parquet   one file per step that was looked at; replaced as a whole or not at all

Everything is in nats and of an answer's own tokens, without the end-of-turn token, as in the records. Rows are keyed
by (model, step, update, probe_id, response_type), where `step` counts the optimiser steps done *before* the one that
is predicted. The update `"batch"` is the step that training took. Any other name is that of a response type: its rows
say what the gradient of the SFT loss of all observed answers of that type would have done, had the optimiser taken it
in place of the batch's. What it remembers of earlier steps, and weight decay, are not part of them.
"""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from trl_dynamics.store import files
from trl_dynamics.store.records import FOLDER

INFLUENCE = "influence"
BATCH = "batch"

INFLUENCE_KEY_COLUMNS = ("model", "step", "update", "probe_id", "response_type")
# What is measured per update and answer, and what each value means. Where a step has no such part: NaN.
INFLUENCE_VALUE_COLUMNS: dict[str, str] = {
    "logp_sum": "log pi(answer | prompt) before the step, summed over the answer's tokens",
    "predicted_sum": "its change in the step, predicted to first order: the sum of the next three",
    "update_sum": "the part that this step's gradient makes",
    "momentum_sum": "the part that gradients of earlier steps make",
    "decay_sum": "the part that weight decay makes",
    "error_sum": "by how much predicted_sum is off as a derivative, at 99.9 % confidence; NaN where it is exact",
    "true_sum": "its change as measured after the step; NaN for steps that were not taken",
    "force_norm": "norm of dL/dz over all positions and labels of the update; NaN where L is not known",
    "grad_norm": "norm of the update's gradient before clipping",
    "lr": "learning rate of the step",
}
# Per token of the answer, in order; `true` is empty for steps that were not taken.
INFLUENCE_TOKEN_COLUMNS: dict[str, pa.DataType] = {
    "token_ids": pa.int32(),
    "token_texts": pa.string(),
    "predicted": pa.float32(),
    "true": pa.float32(),
}
INFLUENCE_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.int64() if name == "step" else pa.string()) for name in INFLUENCE_KEY_COLUMNS),
        pa.field("num_tokens", pa.int32()),
        *(pa.field(name, pa.float64()) for name in INFLUENCE_VALUE_COLUMNS),
        *(pa.field(name, pa.list_(kind)) for name, kind in INFLUENCE_TOKEN_COLUMNS.items()),
    ],
    metadata={"trl_dynamics_influence_version": "1"},
)
_NAME = re.compile(r"step-(\d{9,})\.parquet")
# Names repeat from row to row, measured values do not.
_OPTIONS = {
    "compression": "zstd",
    "use_dictionary": [*INFLUENCE_KEY_COLUMNS, "token_ids.list.element", "token_texts.list.element"],
    "column_encoding": dict.fromkeys(
        [*INFLUENCE_VALUE_COLUMNS, "predicted.list.element", "true.list.element"], "BYTE_STREAM_SPLIT"
    ),
}


def write(root: Path, columns: dict[str, list]) -> Path:
    """Write the rows of one step, replacing all that the step may have.

    Args:
        root (`Path`): The run's `dynamics/` folder.
        columns (`dict[str, list]`): Values by name, of all columns of [`INFLUENCE_SCHEMA`].

    Raises:
        ValueError: If a column is missing or unknown, or the rows are none or of several steps.
        OSError: If the file cannot be written; nothing changed then.
    """
    if set(columns) != set(INFLUENCE_SCHEMA.names):
        raise ValueError(f"influence needs exactly the columns {INFLUENCE_SCHEMA.names}, got {sorted(columns)}")
    steps = sorted(set(columns["step"]))
    if len(steps) != 1:
        raise ValueError(f"a file of influence holds one step, got rows of {steps or 'none'}")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=INFLUENCE_SCHEMA), sink, **_OPTIONS)
    path = root / INFLUENCE / f"step-{steps[0]:09d}.parquet"
    with files.explained(path):
        files.make_folder(path.parent)
        files.write(path, sink.getvalue().to_pybytes())
    return path


def read(
    run_dir: str | Path, steps: Collection[int] | None = None, columns: Sequence[str] | None = None
) -> pd.DataFrame:
    """The rows of a run in order of steps, with the keys and `columns` only where these are given.

    Args:
        run_dir (`str` or `Path`): The run's output directory, or the `dynamics/` folder in it.
        steps (`Collection[int]`, *optional*): Only these; those that were not recorded are left out.
        columns (`Sequence[str]`, *optional*): Names of [`INFLUENCE_SCHEMA`] besides the keys.

    Returns:
        `pandas.DataFrame`: No rows where nothing was recorded (`akg_every`).

    Raises:
        ValueError: If the folder does not exist, a column is unknown, or a file is damaged.
    """
    names = INFLUENCE_SCHEMA.names
    if columns is not None:
        if unknown := sorted(set(columns) - set(names)):
            raise ValueError(f"influence has no column {unknown[0]!r}, only {', '.join(names)}")
        names = list(dict.fromkeys([*INFLUENCE_KEY_COLUMNS, *columns]))
    schema = pa.schema([INFLUENCE_SCHEMA.field(name) for name in names])
    found = [_read(path, names, schema) for step, path in _files(_root(run_dir)) if steps is None or step in steps]
    return pa.concat_tables(found or [schema.empty_table()]).to_pandas()


def load_influence(*output_dirs: str | Path) -> pd.DataFrame:
    """Influence of one or more runs as one frame, unique by (run, model, step, update, probe_id, response_type).

    Args:
        output_dirs: Runs' output directories (or their `dynamics/` folders).

    Returns:
        `pandas.DataFrame`: The columns of [`INFLUENCE_SCHEMA`] with `run` in front; no rows where the runs were not
        asked for it (`akg_every`).

    Raises:
        ValueError: If a folder is no run.
    """
    from trl_dynamics.store.store import read_runs  # which drops influence along with its records

    return read_runs("load_influence", output_dirs, lambda store: read(store.output_dir))


def recorded_steps(run_dir: str | Path) -> list[int]:
    """Steps that have rows, ascending.

    Raises:
        ValueError: If the folder does not exist.
    """
    return [step for step, _ in _files(_root(run_dir))]


def drop_from(root: Path, step: int) -> None:
    """Remove the rows of `step` and of every later one, which a run that goes on from there will take again."""
    for found, path in _files(root):
        if found >= step:
            files.remove(path)


def _root(run_dir: str | Path) -> Path:
    path = Path(run_dir)
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; expected the output_dir of a run")
    return path / FOLDER if (path / FOLDER).is_dir() else path


def _files(root: Path) -> list[tuple[int, Path]]:
    """Steps and files, ascending; a `.tmp` that a crash left is not among them."""
    folder = root / INFLUENCE
    named = [(_NAME.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ())]
    return sorted((int(name[1]), path) for name, path in named if name)


def _read(path: Path, names: list[str], schema: pa.Schema) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            return file.read(names).select(names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); copy it again from where it was written, or "
            "remove it to go on without this step"
        ) from error
