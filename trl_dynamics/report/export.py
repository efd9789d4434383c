"""Runs -> pictures and tables: PNG per chart without a browser, CSV without any extra package."""

import math
import re
from pathlib import Path

import pandas as pd

from trl_dynamics.paths.summary import MEASURES
from trl_dynamics.report import extra, gallery, gaps
from trl_dynamics.report.load import load_runs, split_series
from trl_dynamics.report.spec import VEGA_LITE
from trl_dynamics.report.text import page_value

# Pixels: the learning paths, and the smaller charts of a panel.
WIDE, NARROW = 760, 460
SCALE = 2.0


def export_png(run_dirs: list[str | Path], folder: str | Path) -> list[Path]:
    """Write every chart of the report as `<series>-<chart>.png`; no browser is needed.

    Raises:
        ReportExtraMissing: If vl-convert-python is not installed.
        ValueError: If a folder holds no records.
    """
    renderer = extra.vl_convert()
    runs = load_runs(run_dirs)
    series = split_series(runs)
    looks, specs = gallery.page_looks(series), {}
    for one in series:
        charts = gallery.influence_charts_of(one, looks)
        if one.summary is not None:
            scored = (gallery.path_charts, gallery.squeezing_charts, gallery.force_charts, gallery.sample_charts)
            charts = {name: spec for draw in scored for name, spec in draw(one, looks).items()} | charts
        specs |= {f"{one.label}-{name}": _titled(spec, one.label) for name, spec in charts.items()}
    specs |= {f"training-{name}": spec for name, spec in gallery.scalar_charts(runs, looks).items()}
    specs |= {f"comparison-{name}": spec for name, spec in gallery.comparison_charts(series, looks).items()}
    written = []
    for path, spec in zip(_paths(folder, list(specs), ".png"), specs.values(), strict=True):
        width = WIDE if path.stem.endswith(("learning_paths", "levels")) else NARROW
        printed = page_value(spec) | {"width": width, "config": spec["config"] | {"background": "white"}}
        path.write_bytes(renderer.vegalite_to_png(printed, vl_version=VEGA_LITE, scale=SCALE))
        written.append(path)
    return written


def export_csv(run_dirs: list[str | Path], folder: str | Path) -> list[Path]:
    """Write what there is of `paths.csv` (mean and quantiles over probes), `metrics.csv` and `influence.csv`.

    Columns of paths.csv: run, model, measure, response_type, step, mean, num_probes, q10, q50, q90; `measure` is
    logp_mean, logp_sum, or one of them with `_change` for the paired change since the start. Columns of metrics.csv:
    run, model, metric, step, value; metrics of greedy answers are called `samples/...`. Columns of influence.csv,
    which has means over answers, per token: run, model, step, update, response_type, predicted, true (empty for
    updates that were not taken), logp before the step, num_answers. All values are in nats; a field is empty where
    a value is not finite.

    Raises:
        ValueError: If a folder holds no records.
    """
    paths, values, influences = [], [], []
    for series in split_series(load_runs(run_dirs)):
        keys = {"run": series.run.name, "model": series.model}
        if series.influence is not None:
            influences.append(series.influence.means.assign(**keys))
        if series.summary is None:
            continue
        for measure, (column, since_start) in MEASURES.items():
            found = gaps.bands(series.summary, column, since_start=since_start).reset_index()
            paths.append(found.assign(**keys, measure=measure))
        values.append(gaps.metric_table(series.summary).assign(**keys))
        if series.summary.samples is not None:
            values.append(series.summary.samples.metric_table().assign(**keys))
    first = ["run", "model"]
    found = {"paths": (paths, [*first, "measure"]), "metrics": (values, first), "influence": (influences, first)}
    tables = {name: _with_first(pd.concat(parts), columns) for name, (parts, columns) in found.items() if parts}
    written = _paths(folder, list(tables), ".csv")
    for path, table in zip(written, tables.values(), strict=True):
        table.replace([math.inf, -math.inf], math.nan).to_csv(path, index=False)
    return written


def _paths(folder: str | Path, names: list[str], suffix: str) -> list[Path]:
    """Files in `folder` for `names`, which may hold anything; two names never share a file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stems: list[str] = []
    for name in names:
        stem = base = re.sub(r"[^\w.=-]+", "_", name).strip("._") or "chart"
        number = 1
        while stem.lower() in (other.lower() for other in stems):
            number += 1
            stem = f"{base}_{number}"
        stems.append(stem)
    return [folder / f"{stem}{suffix}" for stem in stems]


def _titled(spec: dict, label: str) -> dict:
    return spec | {"title": spec["title"] | {"subtitle": label, "subtitleFontSize": 11}}


def _with_first(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    return table[[*columns, *(name for name in table.columns if name not in columns)]]
