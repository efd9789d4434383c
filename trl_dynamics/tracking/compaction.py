"""Many small record files as a few large ones, copied step by step: memory is that of one step.

Files are never changed. What is copied lands in a new file; the old ones go once the manifest has the new one.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trl_dynamics.tracking import files
from trl_dynamics.tracking.manifest import Part
from trl_dynamics.tracking.records import RECORD_SCHEMA, VALUE_COLUMNS

# Dictionaries pay for keys only; measured values keep their bytes apart, so that exponents compress: a third less on
# disk than pyarrow's defaults, and written in a quarter of the time.
_WRITER_OPTIONS = {
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": [name for name in RECORD_SCHEMA.names if name not in VALUE_COLUMNS],
    "column_encoding": dict.fromkeys(VALUE_COLUMNS, "BYTE_STREAM_SPLIT"),
}


class _Pieces:
    """Takes what pyarrow writes and hands it on, so that no error of the disk has to travel through pyarrow."""

    closed = False

    def __init__(self):
        self._pieces: list[bytes] = []

    def write(self, payload) -> int:
        self._pieces.append(bytes(payload))
        return len(self._pieces[-1])

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def take(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


def write_part(folder: Path, name: str, model_index: int, tables: Iterator[tuple[int, pa.Table]]) -> Part:
    """Write (step, records) pairs, ascending, as one file with a row group per step.

    Raises:
        OSError: If it cannot be written; nothing is left of it then.
    """
    steps, rows, num_bytes, pieces = [], [], 0, _Pieces()

    def pass_on() -> int:
        payload = pieces.take()
        file.write(payload)
        return len(payload)

    with files.new_file(folder / name) as file:
        with pq.ParquetWriter(pieces, RECORD_SCHEMA, **_WRITER_OPTIONS) as writer:
            for step, table in tables:
                writer.write_table(table.cast(RECORD_SCHEMA), row_group_size=len(table))
                steps.append(step)
                rows.append(len(table))
                num_bytes += pass_on()
        num_bytes += pass_on()
    return Part(name, model_index, tuple(steps), tuple(rows), num_bytes)


def read_steps(folder: Path, part: Part, steps: set[int] | None = None) -> Iterator[tuple[int, pa.Table]]:
    """The records of a part, step by step; of `steps` only, where given."""
    with pq.ParquetFile(folder / part.file) as file:
        for index, step in enumerate(part.steps):
            if steps is None or step in steps:
                # A file of a single step may have its rows in several groups.
                table = file.read() if len(part.steps) == 1 else file.read_row_group(index)
                yield step, table.cast(RECORD_SCHEMA)


def merge(folder: Path, name: str, parts: list[Part]) -> Part:
    """Copy the parts of one model, in ascending order of steps, into one new file."""
    tables = (pair for part in parts for pair in read_steps(folder, part))
    return write_part(folder, name, parts[0].model_index, tables)


def groups(parts: tuple[Part, ...], target_bytes: int) -> list[list[Part]]:
    """Which neighbouring parts of a model to merge: together at most `target_bytes`, groups of one left out."""
    found: list[list[Part]] = []
    for part in parts:
        last = found[-1] if found else None
        fits = last and last[0].model_index == part.model_index
        if fits and sum(other.num_bytes for other in last) + part.num_bytes <= target_bytes:
            last.append(part)
        else:
            found.append([part])
    return [group for group in found if len(group) > 1]
