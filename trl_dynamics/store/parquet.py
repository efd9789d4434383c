"""Many small files of records or samples as a few large ones, copied step by step: memory is that of one step.

Files are never changed. What is copied lands in a new file; the old ones go once the manifest has the new one.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trl_dynamics.store import files
from trl_dynamics.store.manifest import Part
from trl_dynamics.store.records import RECORDS, SAMPLE_VALUE_COLUMNS, SAMPLES, SCHEMAS, VALUE_COLUMNS

# Dictionaries pay for keys only; measured values keep their bytes apart, so that exponents compress: a third less on
# disk than pyarrow's defaults, and written in a quarter of the time.
_WRITER_OPTIONS = {
    kind: {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": [name for name in SCHEMAS[kind].names if name not in (*values, "token_ids", "text")],
        "column_encoding": dict.fromkeys(values, "BYTE_STREAM_SPLIT"),
    }
    for kind, values in ((RECORDS, VALUE_COLUMNS), (SAMPLES, SAMPLE_VALUE_COLUMNS))
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


def write_part(
    root: Path, name: str, model_index: int, tables: Iterator[tuple[int, pa.Table]], kind: str = RECORDS
) -> Part:
    """Write (step, rows) pairs, ascending, as one file of `kind` with a row group per step.

    Raises:
        OSError: If it cannot be written; nothing is left of it then.
    """
    steps, rows, num_bytes, pieces = [], [], 0, _Pieces()

    def pass_on() -> int:
        payload = pieces.take()
        file.write(payload)
        return len(payload)

    with files.new_file(root / kind / name) as file:
        with pq.ParquetWriter(pieces, SCHEMAS[kind], **_WRITER_OPTIONS[kind]) as writer:
            for step, table in tables:
                writer.write_table(table.cast(SCHEMAS[kind]), row_group_size=len(table))
                steps.append(step)
                rows.append(len(table))
                num_bytes += pass_on()
        num_bytes += pass_on()
    return Part(name, model_index, tuple(steps), tuple(rows), num_bytes, kind)


def read_steps(
    root: Path, part: Part, steps: set[int] | None = None, columns: list[str] | None = None
) -> Iterator[tuple[int, pa.Table]]:
    """The rows of a part, step by step; of `steps` and with `columns` only, where given."""
    schema = SCHEMAS[part.kind]
    schema = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    with pq.ParquetFile(root / part.kind / part.file) as file:
        for index, step in enumerate(part.steps):
            if steps is None or step in steps:
                # A file of a single step may have its rows in several groups.
                one = len(part.steps) == 1
                table = file.read(columns) if one else file.read_row_group(index, columns)
                yield step, table.select(schema.names).cast(schema)


def merge(root: Path, name: str, parts: list[Part]) -> Part:
    """Copy the parts of one kind and model, in ascending order of steps, into one new file."""
    tables = (pair for part in parts for pair in read_steps(root, part))
    return write_part(root, name, parts[0].model_index, tables, parts[0].kind)


def groups(parts: tuple[Part, ...], target_bytes: int) -> list[list[Part]]:
    """Which neighbouring parts of a kind and model to merge: at most `target_bytes` in all, groups of one left out."""
    found: list[list[Part]] = []
    for part in parts:
        last = found[-1] if found else None
        fits = last and last[0].order[:2] == part.order[:2]
        if fits and sum(other.num_bytes for other in last) + part.num_bytes <= target_bytes:
            last.append(part)
        else:
            found.append([part])
    return [group for group in found if len(group) > 1]
