"""The records of one model at one step as tables of response_type x probe: what every metric and effect reads.

Two steps are compared pair by pair once they share a layout ([`StepTable.like`]). A suffix names the axes of an array:

    values_TP   T response types, P probes; NaN where a probe lacks the type, or what was scored is not finite

An answer counts as a whole or not at all: where one measured column is NaN or infinite, so is every other one here.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from trl_dynamics.probing.schema import order_types

KEYS = ("model", "step", "probe_id", "response_type")
# The columns that something is computed from; nothing else is read from disk.
# Finite for every answer that a healthy model scores; `eos_logp` is NaN where an answer was cut.
ALWAYS_FINITE = (
    "logp_sum",
    "logp_mean",
    "prob_mean",
    "argmax_logp_sum",
    "entropy_mean",
    "sum_sq_mean",
    "rest_mass_mean",
)
MEASURED = (*ALWAYS_FINITE, "eos_logp")
COLUMNS = (*KEYS, "num_tokens", "truncated", *MEASURED)


class StepTable:
    """Records of one model at one step.

    Made by [`StepTable.of`], [`split`] or [`split_frame`].

    Attributes:
        step (`int`): The step.
        types (`list[str]`): Response types in the usual order.
        probe_ids (`pyarrow.StringArray`): The probes, each once.
        vocab_size (`int` or `None`): Labels that the model's distributions are over, where it is known.
    """

    def __init__(
        self,
        step: int,
        types: list[str],
        probe_ids: pa.Array,
        place: np.ndarray,
        rows: pa.Table,
        vocab_size: int | None,
    ):
        self.step, self.types, self.probe_ids, self.vocab_size = step, types, probe_ids, vocab_size
        self._place, self._rows = place, rows
        self._values: dict[str, np.ndarray] = {}

    @classmethod
    def of(cls, rows: pa.Table, vocab_size: int | None = None) -> "StepTable":
        """The rows of one model and step, in any order.

        Raises:
            ValueError: If a response is there twice.
        """
        step = rows["step"][0].as_py()
        type_codes, names = _codes(rows["response_type"])
        probe_codes, probe_ids = _codes(rows["probe_id"])
        types = order_types(names.to_pylist())
        rank = np.array([types.index(name) for name in names.to_pylist()])
        place = rank[type_codes] * len(probe_ids) + probe_codes
        counts = np.bincount(place)
        if counts.max() > 1:
            row, probe = divmod(int(counts.argmax()), len(probe_ids))
            raise ValueError(
                f"the records hold the same key twice: step {step}, probe_id {probe_ids[probe].as_py()!r}, "
                f"response_type {types[row]!r}"
            )
        return cls(step, types, probe_ids, place, rows, vocab_size)

    def values(self, column: str) -> np.ndarray:
        """One column as float64 `values_TP`; not to be written to."""
        if column not in self._values:
            flat_TP = np.full(len(self.types) * len(self.probe_ids), np.nan)
            values = self._rows[column].to_numpy()
            lost = self._lost if column in MEASURED else None
            flat_TP[self._place] = values if lost is None else np.where(lost, np.nan, values)
            self._values[column] = flat_TP.reshape(len(self.types), len(self.probe_ids))
        return self._values[column]

    @property
    def not_finite(self) -> tuple[int, int]:
        """How many of the scored answers are not finite, and how many were scored."""
        return 0 if self._lost is None else int(self._lost.sum()), len(self._place)

    def presence(self) -> "StepTable":
        """These records with a 0 for everything that was scored and is not finite: tells it from what is lacking."""
        rows = self._rows
        for column in MEASURED if self._lost is not None else ():
            lost = self._lost & ~self._rows["truncated"].to_numpy() if column == "eos_logp" else self._lost
            filled = pa.array(np.where(lost, 0.0, self._rows[column].to_numpy()))
            rows = rows.set_column(rows.schema.get_field_index(column), column, filled)
        return StepTable(self.step, self.types, self.probe_ids, self._place, rows, self.vocab_size)

    @cached_property
    def _lost(self) -> np.ndarray | None:
        """Which rows are not finite; None where all are."""
        lost = np.zeros(len(self._place), dtype=bool)
        for column in ALWAYS_FINITE:
            lost |= ~np.isfinite(self._rows[column].to_numpy())
        lost |= np.isinf(self._rows["eos_logp"].to_numpy())
        return lost if lost.any() else None

    def row(self, response_type: str, column: str) -> np.ndarray:
        """One column of one response type over the probes; all NaN where no probe has the type."""
        if response_type not in self.types:
            return np.full(len(self.probe_ids), np.nan)
        return self.values(column)[self.types.index(response_type)]

    def like(self, other: "StepTable") -> "StepTable":
        """These records with the types and probes of `other`, so that the two can be subtracted."""
        if self.types == other.types and self.probe_ids.equals(other.probe_ids):
            return self
        return self.select(other.types, other.probe_ids)

    def select(self, types: list[str], probe_ids: pa.Array) -> "StepTable":
        """These records with other types and probes; what is not among them is left out."""
        type_codes, probe_codes = np.divmod(self._place, len(self.probe_ids))
        to_type = np.array([types.index(name) if name in types else -1 for name in self.types])
        to_probe = pc.index_in(self.probe_ids, value_set=probe_ids).fill_null(-1).to_numpy()
        row, probe = to_type[type_codes], to_probe[probe_codes]
        kept = (row >= 0) & (probe >= 0)
        place = (row.astype(np.int64) * len(probe_ids) + probe)[kept]
        return StepTable(self.step, types, probe_ids, place, self._rows.filter(pa.array(kept)), self.vocab_size)


def split(rows: pa.Table, vocab_size: int | None = None) -> list[StepTable]:
    """Rows of one model, in any order, as one table per step, by ascending step."""
    steps = rows["step"].to_numpy()
    if (np.diff(steps) < 0).any():
        order = np.argsort(steps, kind="stable")
        rows, steps = rows.take(pa.array(order)), steps[order]
    starts = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist()] if len(steps) else []
    ends = [*starts[1:], len(steps)]
    return [StepTable.of(rows.slice(start, end - start), vocab_size) for start, end in zip(starts, ends, strict=True)]


def split_frame(
    frame: pd.DataFrame, vocab_size: int | None = None, columns: Sequence[str] = COLUMNS
) -> list[StepTable]:
    """A frame of records as one table per step, by ascending step.

    Raises:
        ValueError: If the frame holds several runs or models.
    """
    for key in ("run", "model"):
        if key in frame and frame[key].nunique() > 1:
            found = sorted(frame[key].unique())
            raise ValueError(f"metrics need the records of one {key}, got {found}; select one first")
    return split(pa.Table.from_pandas(frame[list(columns)], preserve_index=False), vocab_size)


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """A column of strings as (code of every row, the strings), each string used at least once."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    encoded = column.unify_dictionaries().combine_chunks()
    encoded = encoded.chunk(0) if isinstance(encoded, pa.ChunkedArray) else encoded
    codes, names = encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.cast(pa.string())
    used = np.bincount(codes, minlength=len(names)) > 0
    if not used.all():
        codes, names = (np.cumsum(used) - 1)[codes], names.filter(pa.array(used))
    return codes, names
