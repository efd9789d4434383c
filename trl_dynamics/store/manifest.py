"""The manifest: which files hold which steps of which kind of row. Readers trust it and nothing else.

part   one parquet file of one kind and one model: its steps ascending, one row group per step
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

# Of the store. 1: a file per step, all of them counted. 2: the manifest says which files count. 3: it lists two kinds
# of rows, and files named step-*.parquet count without being listed. 4: it lists every kind.
SCHEMA_VERSION = 4
MANIFEST_NAME = "manifest.json"
# The kind of rows in versions that had no other, or did not name it.
FIRST_KIND = "records"


@dataclass(frozen=True)
class Part:
    """One file of rows, which never changes.

    Args:
        file (`str`): Its name in the folder of its kind.
        model_index (`int`): The model whose rows it holds.
        steps (`tuple[int, ...]`): Ascending, one row group each.
        num_bytes (`int`): Size of the file.
        kind (`str`): Name of the kind, and of the folder.
    """

    file: str
    model_index: int
    steps: tuple[int, ...]
    num_bytes: int
    kind: str

    @property
    def order(self) -> tuple[str, int, int]:
        return self.kind, self.model_index, self.steps[0]


@dataclass(frozen=True)
class Manifest:
    """Every part of a store, in order of (kind, model index, first step).

    Args:
        parts (`tuple[Part, ...]`): What is there.
        kinds (`Mapping[str, dict]`): Kind -> `kept` and `version`, see [`Kind`].
        serial (`int`): Number of the next file, so that no name is used twice.
        version (`int`): Schema version of the store that it was read from.
    """

    parts: tuple[Part, ...] = ()
    kinds: Mapping[str, dict] = field(default_factory=dict)
    serial: int = 1
    version: int = SCHEMA_VERSION

    @property
    def names(self) -> set[tuple[str, str]]:
        """(kind, file name) of every part."""
        return {(part.kind, part.file) for part in self.parts}

    def of_kind(self, kind: str, model_index: int | None = None) -> tuple[Part, ...]:
        """The parts of a kind, of one model or of all, in order of (model index, first step)."""
        return tuple(p for p in self.parts if p.kind == kind and model_index in (None, p.model_index))

    def steps(self, kind: str, model_index: int | None = None) -> list[int]:
        """Steps at which a model, or any, has rows of a kind, ascending."""
        return sorted({step for part in self.of_kind(kind, model_index) for step in part.steps})

    def new_name(self, model_index: int, step: int, *, taken: int = 0) -> str:
        """A file name that was never used in this store; `taken` names were given out since the manifest was read."""
        return f"m{model_index:03d}-step{step:09d}-{self.serial + taken:06d}.parquet"

    def exchange(self, gone: Iterable[Part], come: list[Part], kinds: Mapping[str, dict]) -> "Manifest":
        """The manifest after parts were exchanged for others; the new ones used up one number each."""
        dropped = {(part.kind, part.file) for part in gone}
        parts = [part for part in self.parts if (part.kind, part.file) not in dropped] + come
        return replace(
            self,
            parts=tuple(sorted(parts, key=lambda part: part.order)),
            kinds=dict(self.kinds) | dict(kinds),
            serial=self.serial + len(come),
            version=SCHEMA_VERSION,
        )

    def touched(self, is_gone: Callable[[Part, int], bool]) -> list[Part]:
        """The parts with at least one step for which `is_gone(part, step)`."""
        return [part for part in self.parts if any(is_gone(part, step) for step in part.steps)]

    def encode(self) -> bytes:
        """As JSON, a part per line; steps as runs [first, last, stride], so that merged parts stay short."""
        lines = [
            json.dumps(
                {
                    "kind": part.kind,
                    "file": part.file,
                    "model_index": part.model_index,
                    "steps": runs(part.steps),
                    "bytes": part.num_bytes,
                }
            )
            for part in self.parts
        ]
        body = ",\n".join(lines)
        head = {"schema_version": SCHEMA_VERSION, "serial": self.serial, "kinds": dict(self.kinds)}
        return f'{json.dumps(head)[:-1]}, "parts": [\n{body}\n]}}\n'.encode()


def runs(steps: Iterable[int]) -> list[list[int]]:
    """Steps as ascending runs of one stride, [first, last, stride] each; their order is kept."""
    found: list[list[int]] = []
    for step in steps:
        last = found[-1] if found else None
        if last is not None and step > last[1] and last[2] in (0, step - last[1]):
            last[1], last[2] = step, step - last[1]
        else:
            found.append([step, step, 0])
    return [[first, last, stride or 1] for first, last, stride in found]


def _steps(found: list) -> tuple[int, ...]:
    """Steps as they were encoded: runs, or one by one in versions below 4."""
    return tuple(
        step for run in found for step in ([run] if isinstance(run, int) else range(run[0], run[1] + 1, run[2]))
    )


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
            Part(row["file"], row["model_index"], _steps(row["steps"]), row["bytes"], row.get("kind", FIRST_KIND))
            for row in content["parts"]
        )
        return Manifest(parts, content.get("kinds", {}), content["serial"], content["schema_version"])
    except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
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
