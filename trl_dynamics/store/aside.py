"""What lies where a new store is to stand is moved aside, never overwritten, and one line says so."""

import json
import logging
import re
from pathlib import Path

from trl_dynamics.store import files
from trl_dynamics.store.manifest import SCHEMA_VERSION

logger = logging.getLogger(__name__)


def move_aside(root: Path, why: str) -> Path:
    """Rename `root` to the first free `<name>-old-<number>`, and tell what it was and why it had to go.

    Raises:
        OSError: If it cannot be renamed.
    """
    what, number = describe(root), 1
    while (target := root.with_name(f"{root.name}-old-{number}")).exists():
        number += 1
    files.move_folder(root, target)
    logger.warning(f"{root} held {what}: it was moved to {target.name}, since {why}")
    return target


def describe(root: Path) -> str:
    """What lies there, in a few words."""
    if not root.is_dir():
        return "something that is no folder"
    meta = _read(root)
    if meta is None:
        return "no records that this package can tell"
    if meta.get("schema_version", 1) > SCHEMA_VERSION:
        return f"records of a newer version of this package (schema {meta['schema_version']})"
    probes = meta.get("probe_set", {})
    command = command_of(meta)
    maker = f"trl-dynamics {command}" if command else f"a {meta.get('method')} run"
    return (
        f"the records of {maker} (probe set {probes.get('name')!r}, {probes.get('num_probes')} probes, fingerprint "
        f"{str(probes.get('fingerprint'))[:12]})"
    )


def command_of(meta: dict) -> str | None:
    """The command that made a store which no training run wrote, None for that of a training run."""
    kind = meta.get("kind", "train")
    return None if kind == "train" else kind


def is_tracked(meta: dict) -> bool:
    """Whether `trl-dynamics track` wrote the records, and no training run."""
    return meta.get("kind") == "track"


def where_is_run(root: Path, run_id: str | None = None) -> str:
    """A sentence that says in which folder beside `root` the newest records of a training run lie, of that run if it
    is known; empty where there are none."""
    found = {}
    for path in root.parent.glob(f"{root.name}-old-*"):
        number = re.fullmatch(rf"{re.escape(root.name)}-old-(\d+)", path.name)
        meta = _read(path)
        if number and meta and not command_of(meta) and run_id in (None, meta.get("run_id", run_id)):
            found[int(number[1])] = path.name
    return f" Records that were moved aside lie in {found[max(found)]}." if found else ""


def _read(root: Path) -> dict | None:
    try:
        meta = json.loads((root / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) else None
