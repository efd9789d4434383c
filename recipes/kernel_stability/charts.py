"""Heat maps of rank correlations between checkpoints, as PNG; no browser is needed."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from trl_dynamics.drawing.spec import SCHEMA, VEGA_LITE
from trl_dynamics.report.extra import vl_convert
from trl_dynamics.statistics import STABLE

COLUMNS, CELL = 3, 44
BOUNDS = [0.5, 0.7, STABLE, 0.95]
COLORS = ["#b2182b", "#ef8a62", "#fddbc7", "#d1e5f0", "#67a9cf"]
TITLES = {"kernel": "Rankings by the size of K", "influence": "Rankings by influence"}


def write_charts(matrices: Mapping[str, Mapping[str, pd.DataFrame]], folder: Path) -> None:
    """One picture per measure, one heat map per model: Spearman's correlation, mean over seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    for measure, by_model in matrices.items():
        spec = grid(by_model, f"{TITLES[measure]}: Spearman's correlation between checkpoints, mean over seeds")
        (folder / f"{measure}.png").write_bytes(vl_convert().vegalite_to_png(spec, vl_version=VEGA_LITE, scale=1.2))


def grid(by_model: Mapping[str, pd.DataFrame], title: str) -> dict:
    """Heat maps side by side."""
    maps = [heat_map(name, matrix) for name, matrix in by_model.items()]
    return {
        "$schema": SCHEMA,
        "title": {"text": title, "anchor": "start", "fontSize": 14, "offset": 12},
        "concat": maps,
        "columns": COLUMNS,
        "spacing": 36,
        "config": {"background": "white", "view": {"stroke": None}, "axis": {"domain": False, "ticks": False}},
    }


def heat_map(name: str, matrix: pd.DataFrame) -> dict:
    """One model's matrix with its numbers: blue from .9 on, red below, where rankings count as unstable."""
    unit = "epoch" if name in ("mlp", "cnn") else "step"
    rows = [
        {"before": int(before), "after": int(after), "value": round(float(matrix.loc[before, after]), 4)}
        for before in matrix.index
        for after in matrix.columns
    ]
    axes = {
        side: {"field": field, "type": "ordinal", "title": unit, "axis": {"labelAngle": 0, "labelFontSize": 11}}
        for side, field in (("x", "after"), ("y", "before"))
    }
    scale = {"type": "threshold", "domain": BOUNDS, "range": COLORS}
    color = {"field": "value", "type": "quantitative", "scale": scale, "title": "Spearman"}
    dark = {"condition": {"test": "datum.value < 0.5", "value": "white"}, "value": "#222"}
    return {
        "title": {"text": name, "anchor": "start", "fontSize": 13},
        "width": CELL * len(matrix),
        "height": 30 * len(matrix),
        "data": {"values": rows},
        "encoding": axes,
        "layer": [
            {"mark": "rect", "encoding": {"color": color}},
            {
                "mark": {"type": "text", "fontSize": 11},
                "encoding": {"text": {"field": "value", "format": ".2f"}, "color": dark},
            },
        ],
    }
