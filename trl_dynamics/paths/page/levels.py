"""Levels of response types: the charts with a row per type."""

from collections.abc import Mapping

import pandas as pd

from trl_dynamics.drawing.lines import type_color
from trl_dynamics.drawing.spec import chart, data_rows, finite, name_tip, rounded, tooltip
from trl_dynamics.drawing.style import ALONE, Looks
from trl_dynamics.paths.metrics import PER_SEQUENCE, PER_TOKEN
from trl_dynamics.paths.summary import Summary
from trl_dynamics.probing.schema import order_types


def levels(summary: Summary, looks: Looks = ALONE) -> dict | None:
    """Start (ring) and end (dot) per response type, joined by a line: per token or per sequence, as `measure` says.

    An end that is not finite has no mark. None where no end of any type is finite.
    """
    paths = {PER_TOKEN: finite(summary.path()), PER_SEQUENCE: finite(summary.path(PER_SEQUENCE))}
    parts = {f"{column}_start": path.iloc[0] for column, path in paths.items()}
    parts |= {f"{column}_end": path.iloc[-1] for column, path in paths.items()}
    ends = pd.DataFrame(parts).dropna(how="all").rename_axis("response_type").reset_index()
    if ends.empty:
        return None
    types = list(ends["response_type"])
    what = "Start (ring) and end (dot)" if len(paths[PER_TOKEN]) > 1 else "Level"
    y = {
        "field": "response_type",
        "type": "nominal",
        "sort": types,
        "axis": {"title": None, "labelLimit": 240, "grid": False},
    }
    x = {
        "type": "quantitative",
        "scale": {"zero": False},
        "axis": {"title": "log-probability, nats", "tickCount": 8},
    }
    shown = [name_tip("response_type", "response"), *(name_tip(f"{end}_text", end) for end in ("start", "end"))]
    texts = {end: f"isValid(datum.{end}) ? format(datum.{end}, '.3f') : 'not finite'" for end in ("start", "end")}
    return chart(
        data_rows(ends),
        {"expr": f"'{what} of every response type, per ' + (column == '{PER_TOKEN}' ? 'token' : 'sequence')"},
        height=22 * len(types),
        description=f"{what} of every response type",
        params=[
            {"name": "measure", "value": "change_token"},
            {"name": "column", "expr": f"test(/token$/, measure) ? '{PER_TOKEN}' : '{PER_SEQUENCE}'"},
        ],
        transform=[
            *({"calculate": f"datum[column + '_{end}']", "as": end} for end in ("start", "end")),
            *({"calculate": text, "as": f"{end}_text"} for end, text in texts.items()),
        ],
        encoding={"y": y, "color": type_color(types, looks, legend=False), "tooltip": shown},
        layer=[
            {
                "transform": [{"filter": "isValid(datum.start) && isValid(datum.end)"}],
                "mark": {"type": "rule", "strokeWidth": 3, "opacity": 0.45},
                "encoding": {"x": {"field": "start"} | x, "x2": {"field": "end"}},
            },
            {
                "mark": {"type": "point", "size": 55, "strokeWidth": 1.8, "filled": False},
                "encoding": {"x": {"field": "start"} | x},
            },
            {
                "mark": {"type": "point", "size": 95, "filled": True, "opacity": 1},
                "encoding": {"x": {"field": "end"} | x},
            },
        ],
    )


def levels_by_run(summaries: Mapping[str, Summary], looks: Looks = ALONE) -> dict | None:
    """Level of every response type at each run's last step, nats per token, a mark per run.

    A level that is not finite has no mark. None where none is finite.
    """
    rows = [
        {"run": label, "response_type": name, "value": rounded(float(value)), "step": int(path.index[-1])}
        for label, path in ((label, finite(summary.path())) for label, summary in summaries.items())
        for name, value in path.iloc[-1].dropna().items()
    ]
    if not rows:
        return None
    types = order_types(row["response_type"] for row in rows)
    drawn = looks.of_runs([*dict.fromkeys(row["run"] for row in rows)])
    domain = {"domain": list(drawn)}
    colors = domain | {"range": [look.color for look in drawn.values()]}
    shapes = domain | {"range": [look.shape for look in drawn.values()]}
    legend = {"title": None, "orient": "bottom", "columns": 2, "labelLimit": 260}
    return chart(
        rows,
        "Level of every response type at the last step",
        height=24 * len(types),
        mark={"type": "point", "filled": True, "size": 80, "opacity": 0.85},
        encoding={
            "y": {
                "field": "response_type",
                "type": "nominal",
                "sort": types,
                "axis": {"title": None, "labelLimit": 240, "grid": True},
            },
            "x": {
                "field": "value",
                "type": "quantitative",
                "scale": {"zero": False},
                "axis": {"title": "log-probability, nats per token", "grid": False, "tickCount": 8},
            },
            "color": {"field": "run", "type": "nominal", "scale": colors, "legend": legend},
            "shape": {"field": "run", "type": "nominal", "scale": shapes, "legend": legend},
            "tooltip": [name_tip("response_type", "response"), *tooltip("run")],
        },
    )
