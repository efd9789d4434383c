"""Stores of a few rows, their content, and a disk that fails or a process that dies at a chosen operation."""

import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from trl_dynamics import ProbeSet
from trl_dynamics.probing.schema import Probe
from trl_dynamics.store import files
from trl_dynamics.store.records import VALUE_COLUMNS, to_table
from trl_dynamics.store.store import DynamicsStore

PLAN = "plan-1"
STARS = [[1, 2], [3]]


class Killed(BaseException):
    """The process ends here; nothing of ours runs after it, not even what cleans up after errors."""


def probe_set(answer: str = " Ja.") -> ProbeSet:
    return ProbeSet((Probe("größe", "Why?", {"chosen": answer, "rejected": " No."}),), name="größen")


def columns(step: int, model: str = "größe", probe_ids=("a", "b")) -> dict[str, list]:
    rows = [(probe_id, response_type) for probe_id in probe_ids for response_type in ("chosen", "rejected")]
    keys = {
        "model": [model] * len(rows),
        "step": [step] * len(rows),
        "probe_id": [probe_id for probe_id, _ in rows],
        "response_type": [response_type for _, response_type in rows],
        "num_tokens": [3] * len(rows),
        "truncated": [False] * len(rows),
    }
    return keys | {name: [-step - 0.1 * i for i in range(len(rows))] for name in VALUE_COLUMNS}


def expected(*steps: int, **options) -> pd.DataFrame:
    """The records of these steps, as [`columns`] makes them."""
    return pd.concat([to_table(columns(step, **options)).to_pandas() for step in steps], ignore_index=True)


def make_store(output_dir, steps=(0, 10, 20), **meta) -> DynamicsStore:
    store = DynamicsStore(output_dir)
    facts = {"probe_set": {"fingerprint": probe_set().fingerprint}, "batch_plan": {"fingerprint": PLAN}}
    store.create(probe_set(), facts | meta, {"learning_rate": 1e-5})
    store.write_baseline(STARS)
    for step in steps:
        store.write_records(to_table(columns(step)), step=step)
    return store


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def count_operations(monkeypatch, work: Callable[[], object]) -> list[str]:
    """The operations on the disk that `work` consists of, in order."""
    done = []
    with monkeypatch.context() as patch:
        perform = files.perform

        def counted(operation, path, action, *arguments):
            done.append(operation)
            return perform(operation, path, action, *arguments)

        patch.setattr(files, "perform", counted)
        work()
    return done


def interrupt(monkeypatch, error: BaseException, *, at: int, moment: str = "before") -> None:
    """Let operation number `at` raise `error`, before, halfway through (a write of half the bytes) or after it."""
    perform, number = files.perform, iter(range(10**9))

    def interrupted(operation, path, action, *arguments):
        if next(number) != at:
            return perform(operation, path, action, *arguments)
        if moment == "halfway" and operation == "write" and arguments:
            action(arguments[0][: len(arguments[0]) // 2])
        elif moment == "after":
            perform(operation, path, action, *arguments)
        raise error

    monkeypatch.setattr(files, "perform", interrupted)


def fail(monkeypatch, code: int, *, operation: str, name: str = "") -> None:
    """Let every `operation` on a path whose name contains `name` fail with an errno."""
    perform = files.perform

    def broken(current, path, action, *arguments):
        if current == operation and name in path.name:
            if operation == "write" and arguments:
                action(arguments[0][: len(arguments[0]) // 2])
            raise OSError(code, os.strerror(code))
        return perform(current, path, action, *arguments)

    monkeypatch.setattr(files, "perform", broken)
