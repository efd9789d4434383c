"""Runs from disk, as the report needs them: the records are reduced step by step, never loaded whole."""

from dataclasses import dataclass, field
from pathlib import Path

from trl_dynamics.influence.summary import InfluenceSummary, open_influence
from trl_dynamics.paths.kinds import RECORDS
from trl_dynamics.paths.pairs import paired
from trl_dynamics.paths.records import read_probe_set
from trl_dynamics.paths.summary import Summary, summarise_store
from trl_dynamics.probing.schema import ProbeSet
from trl_dynamics.store.store import DynamicsStore, open_store, run_names

# What `trl-dynamics akg` leaves in its folder, which is not a run.
AKG_FILES = ("influence.parquet", "summary.json")


@dataclass(frozen=True)
class Run:
    """One store: what produced it and what it holds.

    Args:
        name (`str`): Short and unique among the runs loaded together.
        meta (`dict`): meta.json.
        config (`dict`): config.yaml, empty if there is none.
        trainer_log (`list[dict]`): The trainer's log lines, empty for models tracked without training.
        summaries (`dict[str, Summary]`): What the records of each model say; empty where no probe set was tracked.
        probe_set ([`ProbeSet`] or `None`): What was scored; `None` where its copy cannot be read.
        influences (`dict[str, InfluenceSummary]`, *optional*): What single steps did, of models that have it.
    """

    name: str
    meta: dict
    config: dict
    trainer_log: list[dict]
    summaries: dict[str, Summary]
    probe_set: ProbeSet | None
    influences: dict[str, InfluenceSummary] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str | None:
        """Of the probe set, as recorded; runs are comparable probe by probe only where it is the same."""
        return self.meta.get("probe_set", {}).get("fingerprint")

    @property
    def steps(self) -> list[int]:
        """The recorded steps of all models in order."""
        return sorted({step for summary in self.summaries.values() for step in summary.steps})


@dataclass(frozen=True)
class Series:
    """One run and one model: the unit in which everything is computed and drawn; no summary without a tracked set."""

    label: str
    run: Run
    model: str
    summary: Summary | None

    @property
    def steps(self) -> list[int]:
        """The recorded steps in order."""
        return self.summary.steps if self.summary else []

    @property
    def judged(self) -> Summary | None:
        """What findings are about: `summary`, or, of models scored once each, the change since the first one."""
        return paired(self.run.summaries, self.run.meta)[self.model] if self.summary else None

    @property
    def influence(self) -> InfluenceSummary | None:
        """What single steps did, where it was recorded (`akg_every`)."""
        return self.run.influences.get(self.model)


def load_runs(run_dirs: list[str | Path]) -> list[Run]:
    """Read runs, named as `load_records` names them; the memory needed does not grow with the steps.

    Raises:
        ValueError: If a folder is no run, holds neither records nor influence, or is given twice.
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


def split_series(runs: list[Run]) -> list[Series]:
    """Every (run, model) of `runs`, labelled by the run and, where a run has several models, the model.

    Labels are unique: a run may be called like the model of another one, and then a number follows.
    """
    series: list[Series] = []
    for run in runs:
        models = run.summaries or run.influences
        for model in models:
            label = run.name if len(models) == 1 else f"{run.name}: {model}"
            series.append(Series(_unused(label, {one.label for one in series}), run, model, run.summaries.get(model)))
    return series


def _unused(label: str, taken: set[str]) -> str:
    number = 2
    free = label
    while free in taken:
        free, number = f"{label} ({number})", number + 1
    return free


def _load(name: str, store: DynamicsStore) -> Run:
    meta = store.read_meta()
    alone = None if store.steps(RECORDS) else open_influence(store.output_dir, meta)
    summaries = {} if alone else summarise_store(store)
    influences = {model: open_influence(store.output_dir, meta, model) for model in summaries} or {"policy": alone}
    return Run(
        name,
        meta,
        store.read_config(),
        store.read_trainer_log(),
        summaries,
        _read_probe_set(store),
        {model: influence for model, influence in influences.items() if influence is not None},
    )


def _read_probe_set(store: DynamicsStore) -> ProbeSet | None:
    # A set of a user's own types only was valid when scored but is refused by the reader; the records remain readable.
    try:
        return read_probe_set(store)
    except (OSError, ValueError):
        return None
