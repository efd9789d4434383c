"""The rows of a store on disk: files that never change, and the manifest that says which of them count.

A change is one exchange: new files are written, the manifest is replaced, the files it no longer lists are removed.
A process that is killed in between leaves the state before or the state after, and files that nobody reads.

While a run goes on, neighbouring files of one size class are merged, [`FAN`] at a time and in the exchange that adds
the last of them, up to [`MAX_STEPS`] steps. So a run of n steps has about n / MAX_STEPS files and a few more, each
row is copied a few times, and no step takes longer to write or to read because the run is long.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import pyarrow as pa

from trl_dynamics.store import files, parquet
from trl_dynamics.store.kind import Kind
from trl_dynamics.store.manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest, Part, damage, read_manifest
from trl_dynamics.store.migrate import manifest_of_v1, with_unlisted

# Files of one size class that are merged into one of the next.
FAN = 16
# Steps in one file: reading one of them means reading the footer, which describes the columns of all.
MAX_STEPS = 256
# Nothing larger is made while a run goes on: copying that much takes about a second.
RUNNING_BYTES = 64 * 2**20
TARGET_BYTES = 512 * 2**20
_OURS = re.compile(r"(m\d{3,}-step\d{9,}(-\d{6,})?|step-\d{9,})\.parquet(\.tmp)?")
_TRIES = 5

Write = Callable[[Callable[[int, int], str]], Part]


class Parts:
    """The rows of one store, of whatever kinds.

    Args:
        root (`Path`): The `dynamics/` folder.
        schema_version (`Callable[[], int | None]`): The store's schema version, None where there is no store yet.
    """

    def __init__(self, root: Path, schema_version: Callable[[], int | None]):
        self.root, self._manifest_path = root, root / MANIFEST_NAME
        self._schema_version = schema_version

    def manifest(self) -> Manifest:
        """What counts; a store of an earlier version is read without being changed.

        Raises:
            ValueError: If it is damaged, missing from a store that had one, or of a newer version.
        """
        if self._manifest_path.is_file():
            found = read_manifest(self._manifest_path)
        elif self._schema_version() in (None, 1):
            found = manifest_of_v1(self.root)
        else:
            raise ValueError(
                f"{self._manifest_path} is missing: the folder was changed from outside or copied incompletely. Copy "
                "it again from where it was written"
            )
        return found if found.version >= SCHEMA_VERSION else with_unlisted(self.root, found)

    def check(self, parts: Iterable[Part]) -> None:
        """Refuse files that are missing or do not have their full length.

        Raises:
            ValueError: With the first such file and the way out.
        """
        for part in parts:
            if problem := damage(self.root, part):
                raise ValueError(
                    f"{self.path(part)} {problem}, it holds steps {part.steps[0]} to {part.steps[-1]}: the "
                    "folder was changed from outside or copied incompletely. Copy it again from where it was written, "
                    f"or go on without these steps: DynamicsStore({str(self.root.parent)!r}).drop_damaged()"
                )

    def refuse_newer_rows(self, manifest: Manifest, kind: Kind) -> None:
        """Refuse to read, or to add to, rows of a newer version of their kind.

        Raises:
            ValueError: With both versions.
        """
        version = manifest.kinds.get(kind.name, {}).get("version", 1)
        if version > kind.version:
            raise ValueError(
                f"{self.root / kind.name} has {kind.name} of version {version}, this version reads up to "
                f"{kind.version}; upgrade trl-dynamics"
            )

    def damaged(self) -> list[Part]:
        """The parts whose files are missing, not of their full length, or cannot be read; every file is read."""
        return [part for part in self.manifest().parts if damage(self.root, part) or not self._is_readable(part)]

    def path(self, part: Part) -> Path:
        """Where the file of a part is."""
        return self.root / part.kind / part.file

    def consistent(self, read: Callable[[Manifest], object]) -> object:
        """Read along a manifest; again, when a run that is still writing exchanged files meanwhile."""
        for _ in range(_TRIES):
            manifest = self.manifest()
            try:
                self.check(manifest.parts)
                return read(manifest)
            except (OSError, ValueError):
                if self.manifest() == manifest:
                    raise
        raise ValueError(f"{self.root} changes faster than it can be read; try again when the run has ended")

    def tables(
        self, manifest: Manifest, kind: str, steps: set[int] | None = None, schema: pa.Schema | None = None
    ) -> list[pa.Table]:
        """The rows of every step, or of `steps`, in order of (model index, step)."""
        wanted = [part for part in manifest.of_kind(kind) if steps is None or steps & set(part.steps)]
        # A run that is still writing merges files of few steps soon, others late: those of few steps are read first.
        wanted.sort(key=lambda part: len(part.steps))
        found = [
            (part.model_index, step, table)
            for part in wanted
            for step, table in parquet.read_steps(self.root, part, steps, schema)
        ]
        return [table for _, _, table in sorted(found, key=lambda row: row[:2])]

    def add(self, step: int, tables: Mapping[Kind, pa.Table | None], model_index: int) -> None:
        """Write the rows of one step; rows that it has of these kinds are replaced, or dropped where there are none
        now. All of them count from the same moment on."""
        try:
            self._add(step, tables, model_index, self._to_merge)
        except (OSError, ValueError):
            # Earlier files that are damaged, or a disk without room for a copy of them, cost no new rows.
            self._add(step, tables, model_index, lambda parts, step: [])

    def _add(
        self,
        step: int,
        tables: Mapping[Kind, pa.Table | None],
        model_index: int,
        to_merge: Callable[[tuple[Part, ...], int], list[Part]],
    ) -> None:
        manifest, gone, writes = self.manifest(), [], []
        for kind, table in tables.items():
            parts = manifest.of_kind(kind.name, model_index)
            if table is None:
                gone += [part for part in parts if step in part.steps]
                continue
            self.refuse_newer_rows(manifest, kind)
            if not (self.root / kind.name).is_dir():
                files.make_folder(self.root / kind.name)
            group = to_merge(parts, step)
            gone += group or [part for part in parts if step in part.steps]
            writes.append(self._writing(kind.name, model_index, group, (step, table)))
        merged = {(part.kind, part.file) for part in gone if step not in part.steps}
        self._exchange(
            manifest,
            gone,
            lambda part, other: other == step or (part.kind, part.file) in merged,
            *writes,
            kinds={kind.name: kind.rules for kind, table in tables.items() if table is not None},
        )

    def drop(self, is_gone: Callable[[Part, int], bool]) -> None:
        """Take steps out; files that also hold other steps are copied without them. Leftovers of crashes go too."""
        manifest = self.manifest()
        gone = manifest.touched(is_gone)
        if gone or manifest.version < SCHEMA_VERSION:
            self._exchange(manifest, gone, is_gone)
        self.sweep()

    def compact(self, target_bytes: int = TARGET_BYTES) -> None:
        """Merge neighbouring files of a kind and model up to `target_bytes` each; every merge is one exchange."""
        manifest = self.manifest()
        self.check(manifest.parts)
        for group in groups(manifest.parts, target_bytes):
            writing = self._writing(group[0].kind, group[0].model_index, group)
            self._exchange(self.manifest(), group, lambda part, step: True, writing)
        self.sweep()

    def sweep(self) -> None:
        """Remove files of ours that the manifest does not list: leftovers of crashes."""
        manifest = self.manifest()
        for kind in {part.kind for part in manifest.parts} | set(manifest.kinds):
            folder = self.root / kind
            for path in list(folder.iterdir()) if folder.is_dir() else ():
                if _OURS.fullmatch(path.name) and (kind, path.name) not in manifest.names:
                    files.remove(path)

    def _is_readable(self, part: Part) -> bool:
        try:
            return all(len(rows) > 0 for _, rows in parquet.read_steps(self.root, part))
        except ValueError:
            return False

    def _to_merge(self, parts: tuple[Part, ...], step: int) -> list[Part]:
        """The parts that the rows of a new last step complete to a file of the next size classes."""
        if any(max(part.steps) >= step for part in parts):
            return []
        group: list[Part] = []
        size, num_bytes = 1, 0
        while True:
            rest = parts[: len(parts) - len(group)]
            found = rest[-(FAN - 1) :]
            num_bytes += sum(part.num_bytes for part in found)
            same = len(found) == FAN - 1 and all(size <= len(part.steps) < size * FAN for part in found)
            # Steps that were not written in their order may leave files whose ranges overlap.
            ascend = all(max(part.steps) < min(after.steps) for part, after in pairwise([*found, *group]))
            num_steps = 1 + sum(len(part.steps) for part in [*found, *group])
            if not same or not ascend or num_bytes > RUNNING_BYTES or num_steps > MAX_STEPS:
                return group
            group, size = [*found, *group], size * FAN

    def _writing(self, kind: str, model_index: int, group: list[Part], *more: tuple[int, pa.Table]) -> Write:
        """The write of one file from the rows of parts and of further (step, rows) pairs after them."""

        def write(name: Callable[[int, int], str]) -> Part:
            self.check(group)
            first = group[0].steps[0] if group else more[0][0]
            rows: Iterator = (pair for source in (parquet.merged(self.root, group), more) for pair in source)
            return parquet.write_part(self.root, name(model_index, first), model_index, kind, rows)

        return write

    def _exchange(
        self,
        manifest: Manifest,
        gone: list[Part],
        is_gone: Callable[[Part, int], bool],
        *writes: Write,
        kinds: Mapping[str, dict] | None = None,
    ) -> None:
        """Replace the parts `gone` by what `writes` write and by copies of the steps that stay of them."""
        come: list[Part] = []

        def name(model_index: int, step: int) -> str:
            return manifest.new_name(model_index, step, taken=len(come))

        try:
            for write in writes:
                come.append(write(name))
            for part in gone:
                left = {step for step in part.steps if not is_gone(part, step)}
                if left:
                    self.check([part])
                    rows = parquet.read_steps(self.root, part, left)
                    target = name(part.model_index, min(left))
                    come.append(parquet.write_part(self.root, target, part.model_index, part.kind, rows))
            files.write(self._manifest_path, manifest.exchange(gone, come, kinds or {}).encode())
        except Exception:
            self._discard(come)
            raise
        for part in gone:
            files.remove(self.path(part))

    def _discard(self, parts: list[Part]) -> None:
        """Remove what an exchange that failed has written, unless its manifest made it to the disk after all."""
        with contextlib.suppress(OSError, ValueError):
            listed = self.manifest().names
            for part in parts:
                if (part.kind, part.file) not in listed:
                    files.remove(self.path(part))


def groups(parts: Iterable[Part], target_bytes: int) -> list[list[Part]]:
    """Which neighbouring parts of a kind and model to merge: at most `target_bytes` and [`MAX_STEPS`] in all, groups
    of one left out."""
    found: list[list[Part]] = []
    for part in parts:
        last = found[-1] if found else None
        fits = last and last[0].order[:2] == part.order[:2] and last[-1].steps[-1] < part.steps[0]
        both = [*last, part] if fits else []
        small = sum(len(one.steps) for one in both) <= MAX_STEPS and sum(one.num_bytes for one in both) <= target_bytes
        if fits and small:
            last.append(part)
        else:
            found.append([part])
    return [group for group in found if len(group) > 1]
