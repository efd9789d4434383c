"""Models that `trl-dynamics track` scored once each: every later one is compared with the first."""

import copy
from dataclasses import replace

import pandas as pd

from trl_dynamics.paths.samples import Samples
from trl_dynamics.paths.summary import Summary, summarise_step
from trl_dynamics.store.aside import is_tracked


def paired(summaries: dict[str, Summary], meta: dict) -> dict[str, Summary]:
    """Summaries in which each later model starts, at step 0, as the first one, and is itself at step 1.

    What was recorded of such a model alone is its `own`. All stay as they are where a model has several steps. So does
    a model that reads the probes in another way than the first (`plans` in meta.json): their numbers are of different
    tokens.

    Args:
        summaries (`dict[str, Summary]`): By model, of one store.
        meta (`dict`): The store's meta.json.
    """
    first, *later = _first_and_later(meta)
    single = all(len(summary.steps) == 1 for summary in summaries.values())
    if not is_tracked(meta) or first not in summaries or not single:
        return summaries
    pairs = {name: _pair(summaries[first], summaries[name]) for name in later if name in summaries}
    return summaries | {name: replace(pair, compared_with=first) for name, pair in pairs.items()}


def _first_and_later(meta: dict) -> list[str | None]:
    """The model that others are compared with, and those others; None where meta.json names no model."""
    plans = meta.get("plans", {})
    order = sorted((target["model_index"], target["model"]) for target in meta.get("targets", []))
    if not order:
        return [None]
    plan = plans.get(str(order[0][0]))
    names = [name for index, name in order if plan is not None and plans.get(str(index)) == plan]
    return list(dict.fromkeys([order[0][1], *names]))


def _pair(start: Summary, end: Summary) -> Summary:
    tables = [_at(summary.first, step) for step, summary in enumerate((start, end))]
    samples = None
    if start.samples is not None and end.samples is not None:
        rows = [summary.samples.rows.assign(step=step) for step, summary in enumerate((start, end))]
        samples = Samples(pd.concat(rows, ignore_index=True))
    parts = [summarise_step(tables[0], table) for table in tables]
    samples = samples or end.samples
    return replace(end, parts=parts, first=tables[0], read=tables.__getitem__, samples=samples, alone=end)


def _at(table, step: int):
    moved = copy.copy(table)
    moved.step = step
    return moved
