"""Runs -> pictures and tables: PNG per chart without a browser, CSV without any extra package."""

import math
import re
from pathlib import Path

import pandas as pd

from trl_dynamics import chapters
from trl_dynamics.drawing.section import WIDE
from trl_dynamics.drawing.spec import VEGA_LITE
from trl_dynamics.report import extra
from trl_dynamics.report.load import load_runs, split_series
from trl_dynamics.report.sections import all_sections, sections_of, shown_by
from trl_dynamics.report.text import page_value

# Pixels of a chart, by whether it has a row of its own on the page.
WIDE_PIXELS, NARROW_PIXELS = 760, 460
SCALE = 2.0


def export_png(run_dirs: list[str | Path], folder: str | Path) -> list[Path]:
    """Write every chart of the report as `<series>-<chart>.png`; no browser is needed.

    Charts of all runs are called `<section>-<chart>.png`.

    Raises:
        ReportExtraMissing: If vl-convert-python is not installed.
        ValueError: If a folder holds no records.
    """
    renderer = extra.vl_convert()
    runs = load_runs(run_dirs)
    pictures: dict[str, tuple[dict, int]] = {}
    for section in all_sections(runs, split_series(runs)):
        for panel in section.panels:
            width = WIDE_PIXELS if panel.layout == WIDE else NARROW_PIXELS
            for name, spec in panel.all_charts.items():
                pictures[f"{panel.label or section.name}-{name}"] = _titled(spec, panel.label), width
    written = _paths(folder, list(pictures), ".png")
    for path, (spec, width) in zip(written, pictures.values(), strict=True):
        printed = page_value(spec) | {"width": width, "config": spec["config"] | {"background": "white"}}
        path.write_bytes(renderer.vegalite_to_png(printed, vl_version=VEGA_LITE, scale=SCALE))
    return written


def export_csv(run_dirs: list[str | Path], folder: str | Path) -> list[Path]:
    """Write the tables of every chapter that has some, one file each; a field is empty where a value is not finite.

    The columns are those that the `frames` of each chapter describes; run and model come first.

    Raises:
        ValueError: If a folder holds no records.
    """
    series, tables = split_series(load_runs(run_dirs)), {}
    for chapter in chapters.load_all():
        if shown := shown_by(chapter, series):
            found: dict[str, pd.DataFrame] = sections_of(chapter).frames(shown)
            assert not set(found) & set(tables), f"two chapters write {sorted(set(found) & set(tables))}"
            tables |= found
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
    return spec | {"title": spec["title"] | {"subtitle": label, "subtitleFontSize": 11}} if label else spec
