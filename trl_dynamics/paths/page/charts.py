"""Summary of the records -> Vega-Lite spec, one function per chart; a spec is a plain dict that holds its data.

Every chart over steps has the parameter `log_steps`, which stretches the early steps; `learning_paths` also has
`measure`. The page sets both; without a page they keep the value they are made with.
"""

import json
from collections.abc import Mapping

import pandas as pd

from trl_dynamics.drawing import style
from trl_dynamics.drawing.axis import dots, log_steps, step_axis, step_transform, thin, titled
from trl_dynamics.drawing.lines import MAX_POINTS, TYPE_LEGEND, metric_by_run, type_color, widened
from trl_dynamics.drawing.spec import chart, data_rows, name_tip, rounded, tooltip, zero_line
from trl_dynamics.drawing.style import ALONE, Looks
from trl_dynamics.drawing.terms import Metric
from trl_dynamics.drawing.text import capital
from trl_dynamics.paths.metrics import METRICS, PER_SEQUENCE, PER_TOKEN
from trl_dynamics.paths.page.gaps import bands, curve, remark
from trl_dynamics.paths.samples import SAMPLE_METRICS
from trl_dynamics.paths.summary import Summary

# A y axis shows at least this much (nats), so that noise does not look like a trend.
MIN_SPAN = 0.1
MAIN_TYPES = ("chosen", "rejected")

# What makes a learning path stand out: the pointer is near it, or it is chosen or rejected.
_IN_FOCUS = {"param": "focus", "empty": False}
_IS_MAIN = {"field": "response_type", "oneOf": list(MAIN_TYPES)}

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
    main = data["response_type"].isin(MAIN_TYPES)
    spans = {}
    for name in MEASURES:
        seen = pd.concat([data[name], *(data.loc[main, f"{name}_{end}"] for end in ("lo", "hi"))]).dropna()
        low, high = (float(seen.min()), float(seen.max())) if len(seen) else (0.0, 0.0)
        spans[name] = widened([low, high], MIN_SPAN).get("domain", [rounded(low), rounded(high)])
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
                "legend": TYPE_LEGEND,
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


def metric(summaries: Mapping[str, Summary], name: str, looks: Looks = ALONE) -> dict | None:
    """One metric of [`paths.metrics.METRICS`], a line per run."""
    return _line(METRICS[name], {label: curve(summary, name) for label, summary in summaries.items()}, looks)


def sample_metric(summaries: Mapping[str, Summary], name: str, looks: Looks = ALONE) -> dict | None:
    """One metric of [`paths.samples.SAMPLE_METRICS`], a line per run that was asked for greedy answers."""
    answers = {label: summary.samples for label, summary in summaries.items()}
    curves = {label: found.metric(name).reindex(found.steps) for label, found in answers.items() if found is not None}
    return _line(SAMPLE_METRICS[name], curves, looks)


def _line(metric: Metric, curves: dict[str, pd.Series], looks: Looks) -> dict | None:
    return metric_by_run(curves, capital(metric.title), metric.axis, min_span=metric.span, looks=looks)


def type_change(summaries: Mapping[str, Summary], response_type: str, looks: Looks = ALONE) -> dict | None:
    """Change of one response type since the start, nats per token, a line per run."""
    curves = {}
    for label, summary in summaries.items():
        change = summary.change_since_start()
        curves[label] = change[response_type] if response_type in change else pd.Series(dtype=float)
    title = f"{response_type}: change since start"
    return metric_by_run(curves, title, "nats per token", min_span=MIN_SPAN, looks=looks)
