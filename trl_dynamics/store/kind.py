"""A kind of row that a store can hold: its name, columns and keys, and which rows a resumed run keeps."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

# Which rows stay when a run goes on from the checkpoint of step s: those of steps up to s, or of steps before s.
THROUGH, BEFORE = "through", "before"


@dataclass(frozen=True, eq=False)
class Kind:
    """Rows of one kind.

    Args:
        name (`str`): Also the folder of its files below `dynamics/`.
        keys (`tuple[str, ...]`): Columns that name a row; no two rows have the same. `step` is a number, others are
            text.
        columns (`Mapping[str, str | pyarrow.DataType]`): The other columns in order. A text stands for a measured
            number (float64) and says what it means; a type for anything else.
        kept (`str`): `"through"` or `"before"`: whether rows of step s stay when a run resumes after step s.
        version (`int`): Of the columns; a reader refuses rows of a newer one.
    """

    name: str
    keys: tuple[str, ...]
    columns: Mapping[str, str | pa.DataType]
    kept: str = THROUGH
    version: int = 1

    def __post_init__(self):
        assert "step" in self.keys and self.kept in (THROUGH, BEFORE)

    @cached_property
    def values(self) -> dict[str, str]:
        """The measured columns with what they mean."""
        return {name: meaning for name, meaning in self.columns.items() if isinstance(meaning, str)}

    @property
    def rules(self) -> dict:
        """What the manifest says of this kind."""
        return {"kept": self.kept, "version": self.version}

    @cached_property
    def schema(self) -> pa.Schema:
        """All columns as they are written; none has nulls."""
        types = {name: pa.int64() if name == "step" else pa.string() for name in self.keys}
        types |= {name: pa.float64() if isinstance(kind, str) else kind for name, kind in self.columns.items()}
        fields = [pa.field(name, kind, nullable=False) for name, kind in types.items()]
        return pa.schema(fields, metadata={f"trl_dynamics_{self.name}_version": str(self.version)})

    def table(self, columns: Mapping[str, object]) -> pa.Table:
        """Columns by name as a table of this kind.

        Raises:
            ValueError: If a column is missing or not one of this kind.
        """
        names = self.schema.names
        if set(columns) != set(names):
            raise ValueError(f"{self.name} need exactly the columns {names}, got {sorted(columns)}")
        return pa.table({name: columns[name] for name in names}, schema=self.schema)

    def part_of(self, columns: list[str] | None) -> pa.Schema:
        """The schema of all columns, or of the keys and `columns` in the order given.

        Raises:
            ValueError: If one is unknown.
        """
        if columns is None:
            return self.schema
        if unknown := sorted(set(columns) - set(self.schema.names)):
            raise ValueError(f"{self.name} have no column {unknown[0]!r}, only {', '.join(self.schema.names)}")
        return pa.schema([self.schema.field(name) for name in dict.fromkeys([*self.keys, *columns])])
