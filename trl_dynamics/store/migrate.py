"""Stores of earlier schema versions. Version 1 had no manifest: every file of that name in records/ counted.

Version 2 had no samples: its manifest is read as one that lists records only. What is written to either becomes
today's version, which earlier releases refuse: they would rewrite the manifest without the samples.
"""

import re
from pathlib import Path

import pyarrow.parquet as pq

from trl_dynamics.store.manifest import Manifest, Part

_SHARD_V1 = re.compile(r"m(\d{3})-step(\d{9})\.parquet")


def manifest_of_v1(records_dir: Path) -> Manifest:
    """The manifest that a store of version 1 would have; its files stay as they are, nothing is written."""
    parts = []
    for path in records_dir.glob("*.parquet") if records_dir.is_dir() else []:
        if match := _SHARD_V1.fullmatch(path.name):
            rows = pq.read_metadata(path).num_rows
            parts.append(Part(path.name, int(match[1]), (int(match[2]),), (rows,), path.stat().st_size))
    return Manifest(tuple(sorted(parts, key=lambda part: part.order)))
