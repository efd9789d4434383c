"""Every section of a report: those of the chapters, and what the trainer logged."""

import math

import pandas as pd

from trl_dynamics import chapters
from trl_dynamics.drawing.lines import metric_by_run
from trl_dynamics.drawing.section import Panel, Place, Section, Sections, Shown
from trl_dynamics.drawing.spec import finite
from trl_dynamics.drawing.style import ALONE, Looks
from trl_dynamics.findings.chapter import Chapter
from trl_dynamics.report.load import Run, Series

# Keys of the trainer's log that are drawn first, in this order; then whatever else it logged.
SCALARS = (
    "loss",
    "eval_loss",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "reward",
    "mean_token_accuracy",
    "entropy",
    "kl",
    "grad_norm",
    "learning_rate",
)
MAX_SCALARS = 12
_NOT_SCALARS = ("step", "epoch")


def all_sections(runs: list[Run], series: list[Series]) -> list[Section]:
    """Every section that has something to show, in the order of the page."""
    looks = page_looks(series)
    found = [training_section(runs, looks)]
    for chapter in chapters.load_all():
        shown = shown_by(chapter, series)
        found += sections_of(chapter).draw(shown, looks) if shown else []
    return sorted((one for one in found if one is not None), key=lambda section: section.place)


def page_looks(series: list[Series]) -> Looks:
    """One look per run and per response type, for all charts of these series and of their runs."""
    labels = dict.fromkeys([*(one.label for one in series), *(one.run.name for one in series)])
    judged = [part for one in series for part in one.judged]
    return Looks.of(labels, {name for part in judged for name in sections_of(part.chapter).types(part.subject)})


def sections_of(chapter: Chapter) -> Sections:
    """How a chapter is shown."""
    return chapters.load(chapter.sections)


def shown_by(chapter: Chapter, series: list[Series]) -> list[Shown]:
    """What a chapter draws: the series of which it has something."""
    subjects = [(f"s{index}", one, one.subject(chapter.name)) for index, one in enumerate(series)]
    return [
        Shown(one.label, key, one.run.name, one.model, subject, one.run.meta, one.run.probe_set)
        for key, one, subject in subjects
        if subject is not None
    ]


def training_section(runs: list[Run], looks: Looks = ALONE) -> Section | None:
    """What the trainers logged; None where nothing was logged."""
    charts = scalar_charts(runs, looks)
    hint = "What the trainer logged itself, on the same steps."
    return (
        Section("training", "Training scalars", "training", hint, [Panel(charts)], place=Place.TRAINING)
        if charts
        else None
    )


def scalar_charts(runs: list[Run], looks: Looks = ALONE) -> dict[str, dict]:
    """What the trainer logged, a line per run, at most [`MAX_SCALARS`] charts."""
    logs = {run.name: scalar_curves(run.trainer_log) for run in runs if run.trainer_log}
    keys = list(dict.fromkeys(key for curves in logs.values() for key in curves))
    ordered = [key for key in SCALARS if key in keys] + sorted(key for key in keys if key not in SCALARS)
    found = {}
    for key in ordered[:MAX_SCALARS]:
        curves = {name: curves[key] for name, curves in logs.items() if key in curves}
        spec = metric_by_run(curves, key, "", looks=looks)
        if spec:
            found[key] = spec
    return found


def scalar_curves(trainer_log: list[dict]) -> dict[str, pd.Series]:
    """Numbers of a trainer's log by key, indexed by step, NaN for what is not finite.

    A key without any finite number is left out, and so is the summary line of the end.
    """
    values: dict[str, dict[int, float]] = {}
    for line in trainer_log:
        if "step" not in line or "train_runtime" in line:
            continue
        for key, value in line.items():
            if key not in _NOT_SCALARS and (value is None or isinstance(value, int | float)):
                values.setdefault(key, {})[int(line["step"])] = math.nan if value is None else float(value)
    curves = {key: finite(pd.Series(by_step, dtype=float).sort_index()) for key, by_step in values.items()}
    return {key: curve for key, curve in curves.items() if curve.notna().any()}
