"""Summary of the records -> Vega-Lite spec, one function per chart; a spec is a plain dict that holds its data.

Every chart over steps has the parameter `log_steps`, which stretches the early steps; `learning_paths` also has
`measure`. The page sets both; without a page they keep the value they are made with.
"""

import json
import re
from collections.abc import Mapping

import pandas as pd

from trl_dynamics.paths.metrics import PER_SEQUENCE, PER_TOKEN
from trl_dynamics.paths.summary import Summary
from trl_dynamics.report import style
from trl_dynamics.report.gaps import bands, curve, remark
from trl_dynamics.report.glossary import METRIC_TERMS, SAMPLE_TERMS
from trl_dynamics.report.spec import chart, data_rows, finite, name_tip, rounded, tooltip, zero_line
from trl_dynamics.report.steps import dots, log_steps, step_axis, step_transform, thin, titled
from trl_dynamics.report.style import ALONE, Looks

MAX_POINTS = 5000
# A y axis shows at least this much (nats, probability), so that noise does not look like a trend.
MIN_SPAN, MIN_SPAN_MASS = 0.1, 0.02

_TYPE_LEGEND = {"title": None, "orient": "right", "symbolType": "stroke", "symbolOpacity": 1}
# What makes a learning path stand out: the pointer is near it, or it is chosen or rejected.
_IN_FOCUS = {"param": "focus", "empty": False}
_IS_MAIN = {"field": "response_type", "oneOf": list(style.MAIN_TYPES)}

# Name of a measure -> its label, the column and whether it is a change since the start.
MEASURES: dict[str, tuple[str, str, bool]] = {
    "change_token": ("change since start, per token", PER_TOKEN, True),
    "token": ("log-probability per token", PER_TOKEN, False),
    "change_sequence": ("change since start, per sequence", PER_SEQUENCE, True),
    "sequence": ("log-probability per sequence", PER_SEQUENCE, False),
}


def drawn_steps(summary: Summary) -> list[int]:
    """The steps that [`learning_paths`] draws: all, unless that would be more than [`MAX_POINTS`] points."""
    return thin(summary.steps, MAX_POINTS // len(summary.types))


def learning_paths(summary: Summary, looks: Looks = ALONE) -> dict | None:
    """Mean per response type over the steps; the band (chosen, rejected, the one in focus) is 10-90 % of probes.

    A line has a gap where no value of its type is finite. None if nothing is finite.
    """
    types, steps = summary.types, drawn_steps(summary)
    data = _all_measures(summary)
    if data[[*MEASURES]].isna().all(axis=None):
        return None
    data = data[data["step"].isin(steps)]
    has_gaps = bool(data[[*MEASURES]].isna().any(axis=None))
    title = "Learning paths: mean log-probability per response type"
    return chart(
        data_rows(data),
        titled(title, len(steps), len(summary.steps)) + remark(summary),
        height=400,
        params=[
            {"name": "measure", "value": "change_token"},
            {"name": "span", "expr": f"({json.dumps(_spans(data))})[measure]"},
            log_steps(steps),
        ],
        transform=[
            {"calculate": "datum[measure]", "as": "value"},
            {"calculate": "datum[measure + '_lo']", "as": "lo"},
            {"calculate": "datum[measure + '_hi']", "as": "hi"},
            *step_transform(),
        ],
        encoding={"x": step_axis(steps), "color": type_color(types, looks)},
        layer=[_path_bands(), _path_lines(types, dots(steps, gaps=has_gaps)), _path_tooltips()],
    )


def _all_measures(summary: Summary) -> pd.DataFrame:
    """A row per step and response type scored there; per measure its mean and, as `_lo` and `_hi`, its 10-90 % band.

    What is not finite is NaN.
    """
    parts = []
    for name, (_, column, since_start) in MEASURES.items():
        found = bands(summary, column, since_start=since_start)[["mean", "q10", "q90"]]
        parts.append(found.rename(columns={"mean": name, "q10": f"{name}_lo", "q90": f"{name}_hi"}))
    return pd.concat(parts, axis=1).reset_index()


def _spans(data: pd.DataFrame) -> dict[str, list[float]]:
    """What the y axis covers per measure: every line, and the bands that are always seen, not those of other types."""
    main = data["response_type"].isin(style.MAIN_TYPES)
    spans = {}
    for name in MEASURES:
        seen = pd.concat([data[name], *(data.loc[main, f"{name}_{end}"] for end in ("lo", "hi"))]).dropna()
        low, high = (float(seen.min()), float(seen.max())) if len(seen) else (0.0, 0.0)
        spans[name] = _widened([low, high], MIN_SPAN).get("domain", [rounded(low), rounded(high)])
    return spans


def _path_bands() -> dict:
    picked = {"param": "pick", "empty": False}
    return {
        "mark": {"type": "area", "clip": True},
        "encoding": {
            "y": {"field": "lo", "type": "quantitative"},
            "y2": {"field": "hi"},
            "opacity": {
                "condition": [
                    {"test": {"or": [_IN_FOCUS, picked]}, "value": 0.22},
                    {"test": _IS_MAIN, "value": 0.1},
                ],
                "value": 0,
            },
        },
    }


def _path_lines(types: list[str], points: bool | dict) -> dict:
    """The lines; a click into the legend sets `pick`, which dims the other types."""
    pick = {"name": "pick", "select": {"type": "point", "fields": ["response_type"]}, "bind": "legend"}
    dashes = {"domain": types, "range": [style.type_dash(name) for name in types]}
    return {
        "mark": {"type": "line", "point": points},
        "encoding": {
            "y": {
                "field": "value",
                "type": "quantitative",
                "axis": {"title": "nats"} | zero_line(),
                "scale": {"zero": False, "domainMin": {"expr": "span[0]"}, "domainMax": {"expr": "span[1]"}},
            },
            "strokeWidth": {
                "condition": [{"test": _IN_FOCUS, "value": 4}, {"test": _IS_MAIN, "value": 2.8}],
                "value": 1.5,
            },
            "strokeDash": {
                "field": "response_type",
                "type": "nominal",
                "scale": dashes,
                "legend": _TYPE_LEGEND,
            },
            "opacity": {"condition": {"param": "pick", "value": 1}, "value": 0.12},
        },
        "params": [pick],
    }


def _path_tooltips() -> dict:
    """Points that are not seen, for the pointer to catch: the nearest one sets `focus` and has the numbers."""
    select = {
        "type": "point",
        "fields": ["response_type"],
        "on": "pointerover",
        "clear": "pointerout",
        "nearest": True,
    }
    return {
        "transform": [{"filter": "isValid(datum.value)"}],
        "mark": {"type": "point", "opacity": 0, "size": 60},
        "params": [{"name": "focus", "select": select}],
        "encoding": {
            "y": {"field": "value", "type": "quantitative"},
            "tooltip": [
                name_tip("response_type", "response"),
                {"field": "step", "type": "quantitative"},
                {"field": "value", "type": "quantitative", "format": "+.3f", "title": "mean (nats)"},
                {"field": "lo", "type": "quantitative", "format": "+.3f", "title": "10 %"},
                {"field": "hi", "type": "quantitative", "format": "+.3f", "title": "90 %"},
            ],
        },
    }


def argmax_and_chosen(summary: Summary) -> dict | None:
    """Along chosen: the likeliest token and the chosen token; the area between is the gap. None without chosen."""
    top, gap = curve(summary, "argmax_logp"), curve(summary, "argmax_minus_chosen")
    if top.isna().all():
        return None
    data = pd.DataFrame({"argmax": top, "chosen": top - gap}).rename_axis("step").reset_index()
    steps = thin(data["step"], MAX_POINTS // 2)
    data = data[data["step"].isin(steps)]
    names = {"argmax": "#7d7d7d", "chosen": style.TYPE_COLORS["chosen"]}
    y = {"type": "quantitative", "scale": {"zero": False}, "axis": {"title": "nats per token"}}
    color = {
        "field": "curve",
        "type": "nominal",
        "scale": {"domain": list(names), "range": list(names.values())},
        "legend": {"title": None, "orient": "bottom", "symbolType": "stroke"},
    }
    return chart(
        data_rows(data),
        titled("Along chosen: argmax and chosen", len(steps), len(top)),
        height=190,
        params=[log_steps(steps)],
        transform=step_transform(),
        encoding={"x": step_axis(steps)},
        layer=[
            {
                "mark": {"type": "area", "opacity": 0.12, "color": "#888888"},
                "encoding": {"y": {"field": "chosen"} | y, "y2": {"field": "argmax"}},
            },
            {
                "transform": [{"fold": list(names), "as": ["curve", "value"]}],
                "mark": {"type": "line", "strokeWidth": 2.2, "point": dots(steps, gaps=bool(top.isna().any()))},
                "encoding": {"y": {"field": "value"} | y, "color": color, "tooltip": tooltip("curve")},
            },
        ],
    )


def rejected_path(summary: Summary) -> dict | None:
    """Change of rejected since the start with its 10-90 % band, nats per token. None without rejected."""
    found = bands(summary, since_start=True).reset_index()
    found = found.loc[found["response_type"] == "rejected", ["step", "mean", "q10", "q90"]]
    missing = found["mean"].isna()
    if missing.all():
        return None
    steps = thin(found["step"], MAX_POINTS)
    data = found[found["step"].isin(steps)].rename(columns={"mean": "value"})
    y = {"type": "quantitative", "axis": {"title": "nats per token"} | zero_line()}
    color = style.TYPE_COLORS["rejected"]
    points = dots(steps, color, gaps=bool(missing.any()))
    return chart(
        data_rows(data),
        titled("Rejected: change since start", len(steps), len(found)),
        height=190,
        params=[log_steps(steps)],
        transform=step_transform(),
        encoding={"x": step_axis(steps)},
        layer=[
            {
                "mark": {"type": "area", "opacity": 0.15, "color": color},
                "encoding": {"y": {"field": "q10"} | y, "y2": {"field": "q90"}},
            },
            {
                "mark": {"type": "line", "strokeWidth": 2.2, "color": color, "point": points},
                "encoding": {"y": {"field": "value"} | y, "tooltip": tooltip()},
            },
        ],
    )


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
                "scale": {"zero": False} | _widened(known, min_span),
                "axis": {"title": unit, "format": ".4~g"} | zero_line(),
            },
            "color": channel | {"scale": scale | {"range": [look.color for look in drawn.values()]}, "legend": legend},
            "strokeDash": channel
            | {"scale": scale | {"range": [look.dash for look in drawn.values()]}, "legend": legend},
            "tooltip": tooltip("run" if len(curves) > 1 else None),
        },
    )


def metric(summaries: Mapping[str, Summary], name: str, looks: Looks = ALONE) -> dict | None:
    """One metric of [`paths.metrics.METRICS`], a line per run."""
    term = METRIC_TERMS[name]
    span = MIN_SPAN_MASS if name == "drained_mass" else MIN_SPAN
    curves = {label: curve(summary, name) for label, summary in summaries.items()}
    return metric_by_run(curves, _capital(term.title), re.split("[,;]", term.unit)[0], min_span=span, looks=looks)


def sample_metric(summaries: Mapping[str, Summary], name: str, looks: Looks = ALONE) -> dict | None:
    """One metric of [`paths.samples.SAMPLE_METRICS`], a line per run that was asked for greedy answers."""
    term, answers = SAMPLE_TERMS[name], {label: summary.samples for label, summary in summaries.items()}
    curves = {label: found.metric(name).reindex(found.steps) for label, found in answers.items() if found is not None}
    unit = term.unit.split(",")[0]
    return metric_by_run(curves, _capital(term.title), unit, min_span=MIN_SPAN, looks=looks)


def type_change(summaries: Mapping[str, Summary], response_type: str, looks: Looks = ALONE) -> dict | None:
    """Change of one response type since the start, nats per token, a line per run."""
    curves = {}
    for label, summary in summaries.items():
        change = summary.change_since_start()
        curves[label] = change[response_type] if response_type in change else pd.Series(dtype=float)
    title = f"{response_type}: change since start"
    return metric_by_run(curves, title, "nats per token", min_span=MIN_SPAN, looks=looks)


def type_color(types: list[str], looks: Looks = ALONE, *, legend: bool = True) -> dict:
    """The colour channel by response type."""
    return {
        "field": "response_type",
        "type": "nominal",
        "scale": {"domain": types, "range": list(looks.of_types(types).values())},
        "legend": _TYPE_LEGEND if legend else None,
    }


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _widened(values: list[float], min_span: float) -> dict:
    low, high = min(values), max(values)
    middle = (low + high) / 2
    # A constant has no scale of its own.
    min_span = max(min_span, abs(middle) or 1.0) if low == high else min_span
    if high - low >= min_span:
        return {}
    return {"domain": [rounded(middle - min_span / 2), rounded(middle + min_span / 2)]}
