"""The records and samples of a store on disk: files that never change, and the manifest that says which of them count.

A change is one exchange: new files are written, the manifest is replaced, the files it no longer lists are removed.
Whoever is killed in between leaves the state before or the state after, and files that nobody reads.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from trl_dynamics.store import files, parquet
from trl_dynamics.store.manifest import MANIFEST_NAME, Manifest, Part, damage, read_manifest
from trl_dynamics.store.migrate import manifest_of_v1
from trl_dynamics.store.records import RECORDS, SAMPLES

TARGET_BYTES = 512 * 2**20
_OURS = re.compile(r"m\d{3,}-step\d{9,}(-\d{6,})?\.parquet(\.tmp)?")
_TRIES = 5


class Shards:
    """The records and samples of one store; what is done to a step is done to both in the same exchange.

    Args:
        root (`Path`): The `dynamics/` folder.
        schema_version (`Callable[[], int | None]`): The store's schema version, None where there is no store yet.
    """

    def __init__(self, root: Path, schema_version: Callable[[], int | None]):
        self.root, self._manifest_path = root, root / MANIFEST_NAME
        self._schema_version = schema_version

    def manifest(self) -> Manifest:
        """What counts; a store of version 1 is read without being changed.

        Raises:
            ValueError: If it is damaged, missing from a store that had one, or of a newer version.
        """
        if self._manifest_path.is_file():
            return read_manifest(self._manifest_path)
        version = self._schema_version()
        if version is None or version == 1:
            return manifest_of_v1(self.root / RECORDS)
        raise ValueError(
            f"{self._manifest_path} is missing: the folder was changed from outside or copied incompletely. Copy it "
            "again from where it was written"
        )

    def check(self, parts: tuple[Part, ...] | list[Part]) -> None:
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

    def path(self, part: Part) -> Path:
        """Where the file of a part lies."""
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
        self,
        manifest: Manifest,
        steps: set[int] | None = None,
        kind: str = RECORDS,
        columns: list[str] | None = None,
    ) -> list[pa.Table]:
        """The rows of every step, or of `steps`, in order of (model index, step)."""
        wanted = [part for part in manifest.of_kind(kind) if steps is None or steps & set(part.steps)]
        found = [
            (part.model_index, step, table)
            for part in wanted
            for step, table in parquet.read_steps(self.root, part, steps, columns)
        ]
        return [table for _, _, table in sorted(found, key=lambda row: row[:2])]

    def add(self, table: pa.Table, step: int, model_index: int, samples: pa.Table | None = None) -> Path:
        """Write the records of one step, and its samples if there are any, into files of their own; whatever the step
        had before is replaced. Returns the file of the records."""

        def writing(kind: str, rows: pa.Table) -> Callable[[Callable[[int, int], str]], Part]:
            return lambda name: parquet.write_part(
                self.root, name(model_index, step), model_index, iter([(step, rows)]), kind
            )

        writes = [writing(RECORDS, table)]
        if samples is not None:
            files.make_folder(self.root / SAMPLES)
            writes.append(writing(SAMPLES, samples))
        come = self._exchange(lambda part, other: part.model_index == model_index and other == step, *writes)
        return self.path(come[0])

    def drop(self, is_gone: Callable[[Part, int], bool]) -> None:
        """Take steps out; files that also hold other steps are copied without them. Leftovers of crashes go too."""
        if not self._manifest_path.is_file() or self.manifest().touched(is_gone):
            self._exchange(is_gone)
        self.sweep()

    def compact(self, target_bytes: int = TARGET_BYTES) -> None:
        """Merge neighbouring files of a kind and model up to `target_bytes` each; every merge is one exchange."""
        manifest = self.manifest()
        self.check(manifest.parts)
        for group in parquet.groups(manifest.parts, target_bytes):
            names = {part.file for part in group}
            self._exchange(
                lambda part, _, names=names: part.file in names,
                lambda name, group=group: parquet.merge(self.root, name(*group[0].order[1:]), group),
            )
        self.sweep()

    def sweep(self) -> None:
        """Remove files of ours that the manifest does not list: leftovers of crashes."""
        listed = self.manifest().names
        folders = [self.root / kind for kind in (RECORDS, SAMPLES)]
        for path in [path for folder in folders if folder.is_dir() for path in folder.iterdir()]:
            if _OURS.fullmatch(path.name) and path.name not in listed:
                files.remove(path)

    def _exchange(
        self, is_gone: Callable[[Part, int], bool], *writes: Callable[[Callable[[int, int], str]], Part]
    ) -> list[Part]:
        manifest, come = self.manifest(), []

        def name(model_index: int, step: int) -> str:
            return manifest.new_name(model_index, step, taken=len(come))

        gone = manifest.touched(is_gone)
        try:
            for write in writes:
                come.append(write(name))
            for part in gone:
                kept = {step for step in part.steps if not is_gone(part, step)}
                if kept:
                    self.check([part])
                    tables: Iterator = parquet.read_steps(self.root, part, kept)
                    target = name(part.model_index, min(kept))
                    come.append(parquet.write_part(self.root, target, part.model_index, tables, part.kind))
            files.write(self._manifest_path, manifest.exchange(gone, come).encode())
        except Exception:
            self._discard(come)
            raise
        for part in gone:
            files.remove(self.path(part))
        return come

    def _discard(self, parts: list[Part]) -> None:
        """Remove what an exchange that failed has written, unless its manifest made it to the disk after all."""
        with contextlib.suppress(OSError, ValueError):
            listed = self.manifest().names
            for part in parts:
                if part.file not in listed:
                    files.remove(self.path(part))
