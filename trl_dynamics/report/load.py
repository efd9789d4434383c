"""Runs from disk, as the report needs them."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from trl_dynamics.probing.schema import ProbeSet
from trl_dynamics.tracking.store import load_records, open_store, run_names


@dataclass(frozen=True)
class Run:
    """One store: what produced it and what it holds.

    Args:
        name (`str`): Short and unique among the runs loaded together.
        meta (`dict`): meta.json.
        config (`dict`): config.yaml, empty if there is none.
        trainer_log (`list[dict]`): The trainer's log lines, empty for models tracked without training.
        frame (`pandas.DataFrame`): The records, with a `run` column.
        probe_set ([`ProbeSet`] or `None`): What was scored; `None` where its copy cannot be read.
    """

    name: str
    meta: dict
    config: dict
    trainer_log: list[dict]
    frame: pd.DataFrame
    probe_set: ProbeSet | None

    @property
    def fingerprint(self) -> str | None:
        """Of the probe set, as recorded; runs are comparable probe by probe only where it is the same."""
        return self.meta.get("probe_set", {}).get("fingerprint")


@dataclass(frozen=True)
class Series:
    """One run and one model: the unit in which everything is computed and drawn."""

    label: str
    run: Run
    frame: pd.DataFrame

    @property
    def steps(self) -> list[int]:
        """The recorded steps in order."""
        return [int(step) for step in sorted(self.frame["step"].unique())]


def load_runs(run_dirs: list[str | Path]) -> list[Run]:
    """Read runs, named as `load_records` names them.

    Raises:
        ValueError: If a folder is no run, holds no records, or is given twice.
    """
    records = load_records(*run_dirs)
    stores = [open_store(path) for path in run_dirs]
    return [
        Run(
            name,
            store.read_meta(),
            store.read_config(),
            store.read_trainer_log(),
            records[records["run"] == name].reset_index(drop=True),
            _read_probe_set(store),
        )
        for name, store in zip(run_names(stores), stores, strict=True)
    ]


def split_series(runs: list[Run]) -> list[Series]:
    """Every (run, model) of `runs`, labelled by the run and, where a run has several models, the model."""
    series = []
    for run in runs:
        models = list(dict.fromkeys(run.frame["model"]))
        for model in models:
            label = run.name if len(models) == 1 else f"{run.name}: {model}"
            series.append(Series(label, run, run.frame[run.frame["model"] == model].reset_index(drop=True)))
    return series


def _read_probe_set(store) -> ProbeSet | None:
    # A set of a user's own types only was valid when scored but is refused by the reader; the records remain readable.
    try:
        return store.read_probe_set()
    except (OSError, ValueError):
        return None
