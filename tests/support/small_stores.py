"""Stores of a few rows, their content, and a disk that fails or a process that dies at a chosen operation."""

import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa

from trl_dynamics import ProbeSet
from trl_dynamics.influence.kind import INFLUENCE
from trl_dynamics.paths.kinds import RECORDS, SAMPLES
from trl_dynamics.paths.records import probe_set_files, write_baseline
from trl_dynamics.probing.schema import Probe
from trl_dynamics.scoring.identity import SAME, SAME_PROBES
from trl_dynamics.store import files
from trl_dynamics.store.manifest import SCHEMA_VERSION
from trl_dynamics.store.parts import Parts
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
    return keys | {name: [-step - 0.1 * i for i in range(len(rows))] for name in RECORDS.values}


def samples_of(step: int, probe_ids=("a", "b"), model: str = "größe", **changed) -> pa.Table:
    """Greedy answers of one step."""
    count = len(probe_ids)
    columns = {
        "model": [model] * count,
        "step": [step] * count,
        "probe_id": list(probe_ids),
        "num_tokens": [2] * count,
        "ended": [True, False][:count],
        "token_ids": [[step, 7]] * count,
        "text": [f" Schritt {step}\n\0</script>"] * count,
    } | {name: [-step - 0.1 * index for index in range(count)] for name in SAMPLES.values}
    return SAMPLES.table(columns | changed)


def expected(*steps: int, **options) -> pd.DataFrame:
    """The records of these steps, as [`columns`] makes them."""
    return pd.concat([RECORDS.table(columns(step, **options)).to_pandas() for step in steps], ignore_index=True)


def make_store(output_dir, steps=(0, 10, 20), **meta) -> DynamicsStore:
    store = DynamicsStore(output_dir)
    facts = {"probe_set": {"fingerprint": probe_set().fingerprint}, "batch_plan": {"fingerprint": PLAN}}
    store.create(facts | meta, {"learning_rate": 1e-5}, probe_set_files(probe_set()))
    write_baseline(store, STARS)
    for step in steps:
        write_records(store, RECORDS.table(columns(step)), step=step)
    return store


def write_records(store: DynamicsStore, table, *, step: int, model_index: int = 0, samples=None) -> None:
    """Records of one step, and samples if there are any."""
    store.write(step, {RECORDS: table, SAMPLES: samples}, model_index)


def check_resume(store: DynamicsStore, given: ProbeSet, plan: str, meta: dict | None = None) -> dict:
    """Whether a run that scores these probes in these batches may go on there."""
    facts = {"probe_set": {"fingerprint": given.fingerprint}, "batch_plan": {"fingerprint": plan}}
    return store.check_resume(facts | (meta or {}), [*SAME, *SAME_PROBES])


def resume(store: DynamicsStore, given: ProbeSet, plan: str, step: int, meta: dict | None = None) -> None:
    """What a run that goes on after the checkpoint of `step` does to its store."""
    check_resume(store, given, plan, meta)
    store.drop_after(step)


def influence_steps(folder: Path) -> list[int]:
    """Steps with influence of the run in a folder, or in a `dynamics` folder that was moved aside."""
    root = folder / "dynamics" if (folder / "dynamics").is_dir() else folder
    return Parts(root, lambda: SCHEMA_VERSION).manifest().steps(INFLUENCE.name)


def read_influence(folder: Path, steps: set[int] | None = None, columns: list[str] | None = None) -> pd.DataFrame:
    """Influence that the run in a folder recorded."""
    return DynamicsStore(folder).read(INFLUENCE, steps, columns)


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
