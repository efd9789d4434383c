"""Recorded influence -> curves and clouds: how far the prediction held, and what of a step moves the answers.

Values are nats per token of an answer; `step` is the number of optimiser steps done before the one that is predicted.
"""

import json

import numpy as np
import pandas as pd

from trl_dynamics.drawing import style
from trl_dynamics.drawing.axis import dots, log_steps, step_axis, step_transform, thin, titled
from trl_dynamics.drawing.lines import type_color
from trl_dynamics.drawing.spec import chart, data_rows, name_tip, rounded, tooltip, zero_line
from trl_dynamics.drawing.style import ALONE, Looks
from trl_dynamics.influence.kind import BATCH
from trl_dynamics.influence.rules import LARGE_ERROR
from trl_dynamics.influence.series import SAMPLED, accumulated_influence
from trl_dynamics.influence.summary import ALL, MAX_STRETCHES, PARTS, InfluenceSummary, per_token
from trl_dynamics.statistics import STABLE

# Steps that can be chosen in the scatter, and its dots at each.
MAX_CLOUDS, MAX_DOTS = 6, 400
MAX_POINTS = 3000
ERROR_TICKS = [power * factor for power in (0.0001, 0.001, 0.01, 0.1, 1, 10) for factor in (1, 3)]
TOGETHER = "all answers together"
# Who a step's parts are, as the page calls them, and their colours.
PART_NAMES = {"gradient": "this batch's gradient", "momentum": "momentum of earlier batches", "decay": "weight decay"}
WHOLE = "the whole step"
PART_COLORS = {WHOLE: "#8c8c8c", "gradient": "#1a7fc4", "momentum": "#d55e00", "decay": "#009e73"}


def predicted_and_true(influence: InfluenceSummary, looks: Looks = ALONE) -> dict | None:
    """A dot per answer: predicted against measured change in the batch's step, at one of a few steps."""
    known = influence.errors
    if known.empty:
        return None
    steps = thin(known["step"], MAX_CLOUDS)
    clouds = {step: _cloud(per_token(influence.read(step))) for step in steps}
    data = pd.concat(clouds.values(), ignore_index=True)
    limits = {step: _limits(cloud) for step, cloud in clouds.items()}
    domain = {"domainMin": {"expr": f"({_js(limits)})[at][0]"}, "domainMax": {"expr": f"({_js(limits)})[at][1]"}}
    axis = {"type": "quantitative", "scale": domain | {"nice": False, "zero": False}}
    ends = [{"step": step, "end": end} for step, both in limits.items() for end in both]
    number = {"type": "quantitative", "format": "+.3~e"}
    drawn = (
        f"'Predicted against measured, step ' + at + ({_js({s: _drawn(influence, c) for s, c in clouds.items()})})[at]"
    )
    return chart(
        [],
        {"expr": drawn},
        height=300,
        description="Predicted against measured change of every answer",
        params=[
            {
                "name": "at",
                "value": steps[-1],
                "bind": {"input": "select", "options": steps, "name": "step "},
            }
        ],
        layer=[
            {
                "data": {"values": [{name: rounded(value) for name, value in row.items()} for row in ends]},
                "transform": [{"filter": "datum.step === at"}],
                "mark": {"type": "line", "color": "#8c8c8c", "strokeDash": [4, 3], "strokeWidth": 1.2},
                "encoding": {"x": {"field": "end"} | axis, "y": {"field": "end"} | axis},
            },
            {
                "data": {"values": data_rows(data)},
                "transform": [{"filter": "datum.step === at"}],
                "mark": {"type": "point", "filled": True, "size": 26, "opacity": 0.75, "clip": True},
                "encoding": {
                    "x": {"field": "predicted"} | axis | {"axis": _small("predicted, nats per token")},
                    "y": {"field": "true"} | axis | {"axis": _small("measured, nats per token")},
                    "color": _type_color(influence.types, looks, "circle"),
                    "tooltip": [
                        name_tip("probe_id", "probe"),
                        name_tip("response_type", "answer"),
                        {"field": "predicted"} | number,
                        {"field": "true", "title": "measured"} | number,
                    ],
                },
            },
        ],
    )


def _cloud(rows: pd.DataFrame) -> pd.DataFrame:
    """The batch's answers, of evenly spaced probes where there are more than [`MAX_DOTS`]."""
    rows = rows[rows["update"] == BATCH].dropna(subset=["predicted", "true"])
    probes = sorted(rows["probe_id"].unique())
    count = max(1, min(len(probes), round(MAX_DOTS * len(probes) / len(rows))))
    kept = {probes[round(index)] for index in np.linspace(0, len(probes) - 1, count)}
    return rows.loc[rows["probe_id"].isin(kept), ["step", "probe_id", "response_type", "predicted", "true"]]


def _drawn(influence: InfluenceSummary, cloud: pd.DataFrame) -> str:
    shown = cloud["probe_id"].nunique()
    return f" ({shown} of {influence.num_probes} probes drawn)" if shown < influence.num_probes else ""


def _limits(cloud: pd.DataFrame) -> list[float]:
    values = cloud[["predicted", "true"]].to_numpy()
    low, high = float(values.min()), float(values.max())
    margin = 0.04 * (high - low or abs(high) or 1.0)
    return [rounded(low - margin), rounded(high + margin)]


def first_order_error(influence: InfluenceSummary, looks: Looks = ALONE) -> dict | None:
    """Relative error of the first order over the steps, per type and together; dotted, what rounding makes of it."""
    errors = influence.errors
    if errors.empty:
        return None
    errors = errors[np.isfinite(errors["error"]) & (errors["error"] > 0)]
    if errors["step"].nunique() < 2:
        return None
    errors = with_gaps(errors, influence.steps)
    steps = thin(errors["step"], MAX_POINTS // (len(influence.types) + 1))
    errors = errors[errors["step"].isin(steps)].rename(columns={"error": "value"})
    together = errors[errors["response_type"] == ALL].assign(response_type=TOGETHER)
    noise = together[np.isfinite(together["rounding"]) & (together["rounding"] > 0)]
    scale = {"type": "log", "nice": False}
    y = {
        "type": "quantitative",
        "scale": scale,
        "axis": {"title": "relative error", "format": "~%", "values": ERROR_TICKS},
    }
    line = {"mark": {"type": "line", "strokeWidth": 1.3}, "encoding": {"y": {"field": "value"} | y}}
    return chart(
        [],
        titled("Error of the first order", len(steps), len(influence.steps)),
        height=240,
        params=[log_steps(steps)],
        encoding={"x": step_axis(steps)},
        layer=[
            _over_steps(errors[errors["response_type"] != ALL], ["value", "response_type"], line)
            | {
                "encoding": line["encoding"]
                | {"color": _type_color(influence.types, looks), "tooltip": tooltip("response_type")}
            },
            _over_steps(
                together,
                ["value", "response_type"],
                {
                    "mark": {"type": "line", "strokeWidth": 3, "color": "#8c8c8c", "point": dots(steps, "#8c8c8c")},
                    "encoding": {"y": {"field": "value"} | y, "tooltip": tooltip("response_type")},
                },
            ),
            _over_steps(
                noise,
                ["rounding"],
                {
                    "mark": {"type": "line", "strokeWidth": 1.5, "strokeDash": [1, 3], "color": "#8c8c8c"},
                    "encoding": {"y": {"field": "rounding"} | y},
                },
            ),
            _rule(LARGE_ERROR, y),
        ],
    )


def step_parts(influence: InfluenceSummary) -> dict | None:
    """How much each part of the batch's step moves the answers, over time. None for an optimiser without parts."""
    parts = influence.parts
    if parts.empty or parts[list(PARTS)].isna().all(axis=None) or len(parts) < 2:
        return None
    steps = thin(parts["step"], MAX_POINTS // 4)
    parts = parts[parts["step"].isin(steps)].rename(columns=PART_NAMES | {"whole": WHOLE})
    names = [WHOLE, *PART_NAMES.values()]
    data = parts.melt("step", names, "part", "value")
    if data.dropna()["step"].nunique() < 2:
        return None
    present = [name for name in names if (data.loc[data["part"] == name, "value"] > 0).any()]
    colors = dict(zip(names, PART_COLORS.values(), strict=True))
    legend = {"title": None, "orient": "bottom", "columns": 2, "symbolType": "stroke", "labelLimit": 260}
    return chart(
        data_rows(data[data["part"].isin(present)]),
        titled("What moves the answers in one step", len(steps), len(influence.steps)),
        height=240,
        params=[log_steps(steps)],
        transform=step_transform(),
        mark={"type": "line", "strokeWidth": 2.2, "point": dots(steps)},
        encoding={
            "x": step_axis(steps),
            "y": {
                "field": "value",
                "type": "quantitative",
                "axis": _small("root mean square, nats per token") | zero_line(),
            },
            "color": {
                "field": "part",
                "type": "nominal",
                "scale": {"domain": present, "range": [colors[name] for name in present]},
                "legend": legend,
            },
            "tooltip": tooltip("part"),
        },
    )


def accumulated(influence: InfluenceSummary, looks: Looks = ALONE) -> dict | None:
    """Predicted changes added up over the recorded steps (dashed) beside the measured ones (solid), per type."""
    means = influence.means.query("update == @BATCH").dropna(subset=["predicted", "true"])
    if means["step"].nunique() < 2:
        return None
    # Means over probes, as if they were one answer of one token: what is added up stays the same.
    sums = {"predicted_sum": means["predicted"], "true_sum": means["true"], "logp_sum": means["logp"]}
    found = accumulated_influence(means.assign(model="", probe_id="", num_tokens=1, **sums))
    sampled = " (sampled: the recorded steps alone)" if SAMPLED in set(found["coverage"]) else ""
    found = with_gaps(found, [step + 1 for step in influence.steps])
    steps = thin(found["step"], MAX_POINTS // (2 * len(influence.types)))
    found = found[found["step"].isin(steps)]
    data = found.melt(["response_type", "step"], ["predicted", "observed"], "curve", "value")
    pick = {"name": "pick", "select": {"type": "point", "fields": ["response_type"]}, "bind": "legend"}
    return chart(
        data_rows(data),
        titled(f"Accumulated influence{sampled}", len(steps), influence.means["step"].nunique()),
        height=240,
        params=[log_steps(steps), pick],
        transform=step_transform(),
        mark={"type": "line", "strokeWidth": 1.8},
        encoding={
            "x": step_axis(steps),
            "y": {"field": "value", "type": "quantitative", "axis": _small("nats per token") | zero_line()},
            "color": _type_color(influence.types, looks),
            "opacity": {"condition": {"param": "pick", "value": 1}, "value": 0.12},
            "strokeDash": {
                "field": "curve",
                "type": "nominal",
                "scale": {"domain": ["observed", "predicted"], "range": [[1, 0], [5, 3]]},
                "legend": None,
            },
            "tooltip": [name_tip("response_type", "answer"), *tooltip("curve")],
        },
    )


def rank_line(influence: InfluenceSummary) -> dict | None:
    """Agreement of neighbouring recorded steps: its interval, and the level below which a ranking is unstable."""
    stretches = influence.stretches
    if stretches.empty:
        return None
    stretches = stretches.assign(step=stretches["after"]).set_index("step")
    if len(influence.steps) - 1 <= MAX_STRETCHES:  # else they are a choice, and what it lacks is no gap
        stretches = stretches.reindex(influence.steps[1:])
    stretches = stretches.rename_axis("step").reset_index()
    steps = [int(step) for step in stretches["step"]]
    y = {
        "type": "quantitative",
        "scale": {"domain": [rounded(min(0.5, float(stretches["low"].min()))), 1]},
        "axis": {"title": "Spearman's correlation", "tickCount": 5},
    }
    numbers = [{"field": name, "type": "quantitative", "format": ".3f"} for name in ("value", "low", "high")]
    between = [{"field": name, "type": "quantitative"} for name in ("before", "after")]
    return chart(
        data_rows(stretches),
        titled("Ranking kept since the recorded step before", len(steps), len(influence.steps) - 1),
        height=240,
        params=[log_steps(steps)],
        transform=step_transform(),
        encoding={"x": step_axis(steps), "tooltip": [*between, *numbers]},
        layer=[
            {
                "mark": {"type": "rule", "strokeWidth": 5, "opacity": 0.35, "color": style.RISE},
                "encoding": {"y": {"field": "low"} | y, "y2": {"field": "high"}},
            },
            {
                "mark": {
                    "type": "line",
                    "strokeWidth": 2,
                    "color": style.RISE,
                    "point": {"color": style.RISE, "size": 30},
                },
                "encoding": {"y": {"field": "value"} | y},
            },
            _rule(STABLE, y),
        ],
    )


def with_gaps(data: pd.DataFrame, steps: list[int]) -> pd.DataFrame:
    """Rows by response type and step, with a row of missing values where a type lacks one of these steps."""
    every = pd.MultiIndex.from_product([data["response_type"].unique(), steps], names=["response_type", "step"])
    return data.set_index(["response_type", "step"]).reindex(every).reset_index()


def _over_steps(data: pd.DataFrame, columns: list[str], layer: dict) -> dict:
    return {"data": {"values": data_rows(data[["step", *columns]])}, "transform": step_transform()} | layer


def _rule(level: float, y: dict) -> dict:
    return {
        "data": {"values": [{"level": level}]},
        "mark": {"type": "rule", "strokeDash": [6, 4], "color": "#8c8c8c"},
        "encoding": {"x": None, "tooltip": None, "y": {"field": "level"} | y},
    }


def _small(title: str) -> dict:
    return {"title": title, "format": ".3~g", "tickCount": 6}


def _type_color(types: list[str], looks: Looks, symbol: str = "stroke") -> dict:
    """The colour channel by response type, its names below the chart."""
    legend = {"title": None, "orient": "bottom", "columns": 2, "labelLimit": 200, "symbolOpacity": 1}
    sizes = {"symbolType": symbol, "symbolSize": 60 if symbol == "circle" else 150}
    return type_color(types, looks) | {"legend": legend | sizes}


def _js(by_step: dict) -> str:
    """A dict whose keys are steps, as an expression's object."""
    return json.dumps({str(step): value for step, value in by_step.items()})
