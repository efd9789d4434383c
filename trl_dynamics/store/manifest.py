"""The manifest: which files hold which steps. Readers trust it and nothing else.

part   one parquet file of one kind (records or samples) and one model: its steps ascending, one row group per step
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from trl_dynamics.store.records import RECORDS, SCHEMA_VERSION

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Part:
    """One file of records or samples, which never changes.

    Args:
        file (`str`): Its name in the folder of its kind.
        model_index (`int`): The model whose records it holds.
        steps (`tuple[int, ...]`): Ascending, one row group each.
        rows (`tuple[int, ...]`): Rows per step.
        num_bytes (`int`): Size of the file.
        kind (`str`, *optional*): `"records"` or `"samples"`, which is also the folder that it lies in.
    """

    file: str
    model_index: int
    steps: tuple[int, ...]
    rows: tuple[int, ...]
    num_bytes: int
    kind: str = RECORDS

    @property
    def order(self) -> tuple[str, int, int]:
        return self.kind, self.model_index, self.steps[0]


@dataclass(frozen=True)
class Manifest:
    """Every part of a store, in order of (kind, model index, first step).

    Args:
        parts (`tuple[Part, ...]`): What is there.
        serial (`int`): Number of the next file, so that no name is used twice.
    """

    parts: tuple[Part, ...] = ()
    serial: int = 1

    @property
    def names(self) -> set[str]:
        return {part.file for part in self.parts}

    def of_kind(self, kind: str) -> tuple[Part, ...]:
        """The parts of a kind, in order of (model index, first step)."""
        return tuple(part for part in self.parts if part.kind == kind)

    def steps(self, model_index: int = 0, kind: str = RECORDS) -> list[int]:
        """Steps of a model, ascending."""
        return sorted(step for part in self.of_kind(kind) if part.model_index == model_index for step in part.steps)

    def new_name(self, model_index: int, step: int, *, taken: int = 0) -> str:
        """A file name that was never used in this store; `taken` names were given out since the manifest was read."""
        return f"m{model_index:03d}-step{step:09d}-{self.serial + taken:06d}.parquet"

    def exchange(self, gone: list[Part], come: list[Part]) -> "Manifest":
        """The manifest after parts were exchanged for others; the new ones used up one number each."""
        dropped = {part.file for part in gone}
        parts = [part for part in self.parts if part.file not in dropped] + come
        return replace(self, parts=tuple(sorted(parts, key=lambda part: part.order)), serial=self.serial + len(come))

    def touched(self, is_gone: Callable[[Part, int], bool]) -> list[Part]:
        """The parts with at least one step for which `is_gone(part, step)`."""
        return [part for part in self.parts if any(is_gone(part, step) for step in part.steps)]

    def encode(self) -> bytes:
        """As JSON, one line per part."""
        lines = [
            json.dumps(
                {
                    "kind": part.kind,
                    "file": part.file,
                    "model_index": part.model_index,
                    "steps": part.steps,
                    "rows": part.rows,
                    "bytes": part.num_bytes,
                }
            )
            for part in self.parts
        ]
        body = ",\n".join(lines)
        head = f'"schema_version": {SCHEMA_VERSION},\n"serial": {self.serial},\n'
        return f'{{{head}"parts": [\n{body}\n]}}\n'.encode()


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        ValueError: If it is damaged, or a newer version of this package wrote it.
    """
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
        refuse_newer(path, content["schema_version"])
        parts = tuple(
            Part(
                row["file"],
                row["model_index"],
                tuple(row["steps"]),
                tuple(row["rows"]),
                row["bytes"],
                row.get("kind", RECORDS),  # version 2 had no other kind
            )
            for row in content["parts"]
        )
        return Manifest(parts, content["serial"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a manifest ({error!r}); it was changed or damaged from outside. Copy the run's "
            f"{path.parent.name}/ folder again from where it was written"
        ) from error


def refuse_newer(path: Path, version: int) -> None:
    """Refuse what a newer version of this package wrote.

    Raises:
        ValueError: If `version` is above this package's, with the remedy.
    """
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {version}, this version reads up to {SCHEMA_VERSION}; upgrade trl-dynamics"
        )


def damage(root: Path, part: Part) -> str | None:
    """What is wrong with the file of a part below `root`, None if it is there in full length."""
    try:
        size = (root / part.kind / part.file).stat().st_size
    except FileNotFoundError:
        return "is missing"
    return None if size == part.num_bytes else f"has {size} bytes instead of {part.num_bytes}"
