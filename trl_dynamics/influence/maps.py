"""Recorded influence -> heat maps: which update moves which type of answer, and how long such a ranking holds.

The colour says up or down, its strength how far; both read on a light and on a dark page.
"""

import json
import math

import pandas as pd

from trl_dynamics.drawing import style
from trl_dynamics.drawing.axis import thin, titled
from trl_dynamics.drawing.spec import chart, name_tip, rounded
from trl_dynamics.drawing.text import percent
from trl_dynamics.influence.rules import judged_steps
from trl_dynamics.influence.summary import InfluenceSummary

# Steps that can be chosen in the force map.
MAX_MAPS = 10
# How strong the colour of the weakest and of the strongest cell is.
STRENGTHS = (0.03, 0.75)


def force_map(influence: InfluenceSummary) -> dict | None:
    """Predicted change of every observed type per update, at one of a few steps, and how far off the batch's were.

    None where nothing predicted is finite.
    """
    means = influence.means.dropna(subset=["predicted"])
    if means.empty:
        return None
    steps = thin(means["step"], MAX_MAPS)
    means = means[means["step"].isin(steps)]
    bound = {"input": "select", "options": steps, "name": "step "}
    drawn = titled("", len(steps), len(influence.steps))
    title = {"expr": f"'Force map at step ' + at + ({json.dumps(_misses(influence, steps))})[at] + '{drawn}'"}
    return _map(means.rename(columns={"predicted": "value"}), influence, title) | {
        "params": [{"name": "at", "value": steps[-1], "bind": bound}],
        "transform": [{"filter": "datum.step === at"}],
        "description": "Force map: predicted change of every observed type of answer per update",
    }


def _misses(influence: InfluenceSummary, steps: list[int]) -> dict[int, str]:
    """By step, how far off the predictions of the batch's column were, for the title."""
    judged = judged_steps(influence)
    off = dict(zip(judged["step"], judged["error"], strict=True)) if len(judged) else {}
    return {step: f": batch off by {percent(off[step])}" if step in off else "" for step in steps}


def force_change(influence: InfluenceSummary) -> dict | None:
    """How the force map differs between the first and the last recorded step that have one. None for a single one."""
    means = influence.means.dropna(subset=["predicted"])
    if means["step"].nunique() < 2:
        return None
    first, last = int(means["step"].min()), int(means["step"].max())
    tables = [
        means.query("step == @step").set_index(["update", "response_type"])["predicted"] for step in (first, last)
    ]
    change = (tables[1] - tables[0]).dropna().rename("value").reset_index().assign(step=last)
    return _map(change, influence, f"Force map, step {last} minus step {first}") if len(change) else None


def _map(values: pd.DataFrame, influence: InfluenceSummary, title: str | dict) -> dict:
    """Cells of update x observed type; the colour's strength is relative to the strongest cell of the step."""
    values = values.dropna(subset=["value"])
    unit = 3 * math.floor(math.log10(max(float(values["value"].abs().max()), 1e-300)) / 3)
    rows = []
    for step, cells in values.groupby("step"):
        largest = float(cells["value"].abs().max()) or 1.0
        digits = max(0, 2 - math.floor(math.log10(largest) - unit))
        for cell in cells.itertuples():
            row = {"step": int(step), "update": cell.update, "observed": cell.response_type, "value": cell.value}
            row |= {"text": signed(cell.value / 10.0**unit, min(digits, 4)), "strength": abs(cell.value) / largest}
            rows.append({name: rounded(value) for name, value in row.items()})
    labels = {"title": None, "grid": False, "labelLimit": 180}
    position = {"scale": {"paddingInner": 0.04, "paddingOuter": 0}}
    return chart(
        rows,
        title,
        height=26 * len(influence.types),
        encoding={
            "x": {"field": "update", "type": "nominal", "sort": influence.updates}
            | position
            | {
                "axis": labels
                | {"title": f"update; cells in {unit_text(unit)}", "labelAngle": -25, "orient": "bottom"}
            },
            "y": {"field": "observed", "type": "nominal", "sort": influence.types} | position | {"axis": labels},
            "tooltip": [
                name_tip("update"),
                name_tip("observed"),
                {"field": "value", "type": "quantitative", "format": "+.3~e", "title": "nats per token"},
            ],
        },
        layer=[
            {
                "mark": {"type": "rect", "cornerRadius": 3},
                "encoding": {
                    "color": {
                        "condition": {"test": "datum.value >= 0", "value": style.RISE},
                        "value": style.FALL,
                    },
                    "opacity": {
                        "field": "strength",
                        "type": "quantitative",
                        "scale": {"domain": [0, 1], "range": [*STRENGTHS]},
                        "legend": None,
                    },
                },
            },
            {"mark": {"type": "text", "fontSize": 11}, "encoding": {"text": {"field": "text", "type": "nominal"}}},
        ],
    )


def rank_matrix(influence: InfluenceSummary) -> dict | None:
    """How alike the rankings of the fixed updates' influence are at every two of a few steps."""
    matrix = influence.matrix
    if len(matrix) < 2:
        return None
    steps = list(matrix.index)
    rows = [
        {"row": a, "column": b, "value": rounded(float(matrix.at[a, b])), "text": f"{matrix.at[a, b]:.2f}".lstrip("0")}
        for a in steps
        for b in steps
        if not math.isnan(matrix.at[a, b])
    ]
    place = {"type": "ordinal", "sort": steps, "scale": {"paddingInner": 0.04, "paddingOuter": 0}}
    axis = {"title": "step", "labelAngle": 0, "grid": False}
    return chart(
        rows,
        titled("Does the ranking hold?", len(steps), len(influence.steps)),
        height=24 * len(steps),
        encoding={
            "x": {"field": "column"} | place | {"axis": axis},
            "y": {"field": "row"} | place | {"axis": axis},
            "tooltip": [
                {"field": "row", "type": "ordinal", "title": "step"},
                {"field": "column", "type": "ordinal", "title": "and step"},
                {"field": "value", "type": "quantitative", "format": ".3f", "title": "Spearman"},
            ],
        },
        layer=[
            {
                "mark": {"type": "rect", "cornerRadius": 3},
                "encoding": {
                    "color": {"condition": {"test": "datum.value >= 0", "value": style.RISE}, "value": style.FALL},
                    "opacity": {
                        "field": "value",
                        "type": "quantitative",
                        "scale": {"domain": [-1, 0, 1], "range": [STRENGTHS[1], *STRENGTHS]},
                        "legend": None,
                    },
                },
            },
            {"mark": {"type": "text", "fontSize": 10}, "encoding": {"text": {"field": "text", "type": "nominal"}}},
        ],
    )


def signed(value: float, digits: int) -> str:
    """With its sign, a minus that is as wide as a plus, and no sign for what the digits cannot show."""
    text = f"{value:+.{digits}f}"
    return "0" if float(text) == 0 else text.replace("-", "−")


def unit_text(power: int) -> str:
    """`10⁻³ nats per token`."""
    superscript = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{superscript} nats per token" if power else "nats per token"
