"""Runs from disk, as the report needs them: the records are reduced step by step, never loaded whole."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trl_dynamics.findings.verdicts import Judged, by_model, judge
from trl_dynamics.probing.io import load as load_probe_set
from trl_dynamics.probing.schema import ProbeSet
from trl_dynamics.store.store import DynamicsStore, open_store, run_names

# What `trl-dynamics akg` leaves in its folder, which is not a run.
AKG_FILES = ("influence.parquet", "summary.json")
# The attachment of a store that observes probes.
PROBE_SET = "probe_set"


@dataclass(frozen=True)
class Run:
    """One store: what produced it and what it holds.

    Args:
        name (`str`): Short and unique among the runs loaded together.
        meta (`dict`): meta.json.
        config (`dict`): config.yaml, empty if there is none.
        trainer_log (`list[dict]`): The trainer's log lines, empty for models tracked without training.
        judged (`list[Judged]`): What each chapter makes of each model.
        probe_set ([`ProbeSet`] or `None`): What was scored; `None` where its copy cannot be read.
    """

    name: str
    meta: dict
    config: dict
    trainer_log: list[dict]
    judged: list[Judged]
    probe_set: ProbeSet | None

    def subjects(self, chapter: str) -> dict[str, object]:
        """Model -> what a chapter makes of it; empty where it has nothing."""
        return {one.model: one.subject for one in self.judged if one.chapter.name == chapter}


@dataclass(frozen=True)
class Series:
    """One run and one model: the unit in which everything is computed and drawn.

    Args:
        label (`str`): Unique among the series loaded together.
        run ([`Run`]): Where it is from.
        model (`str`): As in the records.
        judged (`list[Judged]`): What each chapter makes of it, in the order of chapters; at least one.
    """

    label: str
    run: Run
    model: str
    judged: list[Judged]

    def subject(self, chapter: str) -> object | None:
        """What a chapter makes of it; None where it has nothing."""
        return self.run.subjects(chapter).get(self.model)


def load_runs(run_dirs: list[str | Path]) -> list[Run]:
    """Read runs, named as `load_records` names them; the memory needed does not grow with the steps.

    Raises:
        ValueError: If a folder is no run, holds nothing that any chapter reads, or is given twice.
    """
    stores = [open_run(path) for path in run_dirs]
    return [_load(name, store) for name, store in zip(run_names(stores), stores, strict=True)]


def open_run(path: str | Path) -> DynamicsStore:
    """The store of a run, given its output directory or the `dynamics/` folder in it.

    Raises:
        ValueError: If there is none; says what to do where the folder is of `trl-dynamics akg`.
    """
    folder = Path(path)
    if not folder.exists():
        raise ValueError(f"{path} does not exist, expected the output_dir of a run with probe_set set")
    if all((folder / name).is_file() for name in AKG_FILES) and not DynamicsStore(folder).exists:
        raise ValueError(
            f"{path} was written by `trl-dynamics akg`, expected a run; read {folder / AKG_FILES[1]} or the table "
            f"{folder / AKG_FILES[0]}, or train with --akg_every and report the run's output_dir"
        )
    return open_store(path)


def split_series(runs: Iterable[Run]) -> list[Series]:
    """Every (run, model) of `runs`, labelled by the run and, where a run has several models, the model.

    Labels are unique: a run may be called like the model of another one, and then a number follows.
    """
    series: list[Series] = []
    for run in runs:
        models = by_model(run.judged)
        for model, judged in models.items():
            label = run.name if len(models) == 1 else f"{run.name}: {model}"
            series.append(Series(_unused(label, {one.label for one in series}), run, model, judged))
    return series


def _unused(label: str, taken: set[str]) -> str:
    number = 2
    free = label
    while free in taken:
        free, number = f"{label} ({number})", number + 1
    return free


def _load(name: str, store: DynamicsStore) -> Run:
    judged = judge(store)
    if not judged:
        raise ValueError(f"no records in {store.root}; run with a probe set first (probe_set=...)")
    return Run(name, store.read_meta(), store.read_config(), store.read_trainer_log(), judged, _read_probe_set(store))


def _read_probe_set(store: DynamicsStore) -> ProbeSet | None:
    # A set of a user's own types only was valid when scored but is refused by the reader; the records remain readable.
    try:
        return load_probe_set(store.root / PROBE_SET)
    except (OSError, ValueError):
        return None
