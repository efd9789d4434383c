"""Lines that any subject draws: a value over the steps per run, and the colour channel by response type.

Every chart over steps has the parameter `log_steps`, which stretches the early steps. The page sets it; without a page
it keeps the value it is made with.
"""

from collections.abc import Mapping

import pandas as pd

from trl_dynamics.drawing.axis import dots, log_steps, step_axis, step_transform, thin, titled
from trl_dynamics.drawing.spec import chart, finite, rounded, tooltip, zero_line
from trl_dynamics.drawing.style import ALONE, Looks

MAX_POINTS = 5000
TYPE_LEGEND = {"title": None, "orient": "right", "symbolType": "stroke", "symbolOpacity": 1}


def metric_by_run(
    curves: Mapping[str, pd.Series], title: str, unit: str, *, min_span: float = 0.0, looks: Looks = ALONE
) -> dict | None:
    """One line per run of any value over the steps; a single run gets no legend. None if no run has a finite value.

    Args:
        curves (`Mapping[str, pandas.Series]`): Run label to values indexed by step; a line has a gap where its value
            is not finite.
        min_span (`float`, *optional*): The least that the y axis covers.
        looks ([`Looks`], *optional*): Of the page that the chart is on.
    """
    curves = {label: finite(values) for label, values in curves.items()}
    curves = {label: values for label, values in curves.items() if values.notna().any()}
    if not curves:
        return None
    per_run = MAX_POINTS // len(curves)
    kept = {label: values[values.index.isin(thin(values.index, per_run))] for label, values in curves.items()}
    rows = [
        {"run": label, "step": int(step), "value": rounded(value)}
        for label, values in kept.items()
        for step, value in values.items()
    ]
    steps = sorted({row["step"] for row in rows})
    gaps = any(values.isna().any() for values in curves.values())
    known = [row["value"] for row in rows if row["value"] is not None]
    drawn = looks.of_runs([*curves])
    scale = {"domain": list(drawn)}
    channel = {"field": "run", "type": "nominal"}
    legend = (
        {"title": None, "orient": "bottom", "symbolType": "stroke", "columns": 2, "labelLimit": 260}
        if len(curves) > 1
        else None
    )
    return chart(
        rows,
        titled(title, max(map(len, kept.values())), max(map(len, curves.values()))),
        height=190,
        params=[log_steps(steps)],
        transform=step_transform(),
        mark={"type": "line", "strokeWidth": 2.2, "point": dots(steps, gaps=gaps)},
        encoding={
            "x": step_axis(steps),
            "y": {
                "field": "value",
                "type": "quantitative",
                "scale": {"zero": False} | widened(known, min_span),
                "axis": {"title": unit, "format": ".4~g"} | zero_line(),
            },
            "color": channel | {"scale": scale | {"range": [look.color for look in drawn.values()]}, "legend": legend},
            "strokeDash": channel
            | {"scale": scale | {"range": [look.dash for look in drawn.values()]}, "legend": legend},
            "tooltip": tooltip("run" if len(curves) > 1 else None),
        },
    )


def type_color(types: list[str], looks: Looks = ALONE, *, legend: bool = True) -> dict:
    """The colour channel by response type."""
    return {
        "field": "response_type",
        "type": "nominal",
        "scale": {"domain": types, "range": list(looks.of_types(types).values())},
        "legend": TYPE_LEGEND if legend else None,
    }


def widened(values: list[float], min_span: float) -> dict:
    """The domain of an axis that covers at least `min_span`; nothing where the values do."""
    low, high = min(values), max(values)
    middle = (low + high) / 2
    # A constant has no scale of its own.
    min_span = max(min_span, abs(middle) or 1.0) if low == high else min_span
    if high - low >= min_span:
        return {}
    return {"domain": [rounded(middle - min_span / 2), rounded(middle + min_span / 2)]}
