"""Stores of earlier schema versions, read as today's: nothing is written.

Version 1 had no manifest: every file `m000-step000000000.parquet` in records/ counted. Up to version 3 a folder of
files `step-000000000.parquet` was a kind of its own that no manifest listed, and whose rows of step s were taken again
by a run that resumed after step s. The first exchange of a writer lists them all in a manifest of today's version.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from trl_dynamics.store.kind import BEFORE, THROUGH
from trl_dynamics.store.manifest import FIRST_KIND, Manifest, Part

_FILE_V1 = re.compile(r"m(\d{3})-step(\d{9})\.parquet")
_UNLISTED = re.compile(r"step-(\d{9,})\.parquet")


def manifest_of_v1(root: Path) -> Manifest:
    """The manifest that a store of version 1 would have."""
    named = [(_FILE_V1.fullmatch(path.name), path) for path in _files(root / FIRST_KIND)]
    parts = [_part(path, FIRST_KIND, int(name[1]), int(name[2])) for name, path in named if name]
    return Manifest(tuple(sorted(parts, key=lambda part: part.order)), version=1)


def with_unlisted(root: Path, manifest: Manifest) -> Manifest:
    """The manifest of a store below version 4 with the files that it did not list."""
    folders = {path.name: path for path in root.iterdir() if path.is_dir()} if root.is_dir() else {}
    found = [
        _part(path, kind, 0, int(name[1]))
        for kind, folder in folders.items()
        for path in _files(folder)
        if (name := _UNLISTED.fullmatch(path.name))
    ]
    kept = {part.kind: THROUGH for part in manifest.parts} | {part.kind: BEFORE for part in found}
    kinds = {kind: {"kept": rows, "version": 1} for kind, rows in kept.items()}
    parts = sorted([*manifest.parts, *found], key=lambda part: part.order)
    return Manifest(tuple(parts), kinds, manifest.serial, manifest.version)


def _files(folder: Path) -> Iterator[Path]:
    return folder.iterdir() if folder.is_dir() else iter(())


def _part(path: Path, kind: str, model_index: int, step: int) -> Part:
    return Part(path.name, model_index, (step,), path.stat().st_size, kind)
