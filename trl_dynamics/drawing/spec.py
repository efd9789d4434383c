"""What every chart's spec has in common: schema, look, data rows and tooltips."""

import math

import numpy as np
import pandas as pd

from trl_dynamics.drawing import style

VEGA_LITE = "6.4"
SCHEMA = f"https://vega.github.io/schema/vega-lite/v{VEGA_LITE.split('.')[0]}.json"

CONFIG = {
    "background": None,
    "font": style.FONT,
    "view": {"stroke": None},
    "axis": {
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": 400,
        "domain": False,
        "ticks": False,
    },
    "legend": {"labelFontSize": 11, "symbolStrokeWidth": 2.5, "symbolSize": 220, "labelLimit": 240},
}


def chart(rows: list[dict], title: str | dict, *, height: int, **parts) -> dict:
    """A spec as wide as its place, with its data inside; `parts` are further top-level entries.

    A title that is an expression needs a `description` besides, for those who hear the page.
    """
    return {
        "$schema": SCHEMA,
        "title": {"text": title, "anchor": "start", "fontSize": 13, "fontWeight": 600, "offset": 8},
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": rows},
        "config": CONFIG,
        **parts,
    }


def zero_line() -> dict:
    """Axis entries that make the grid line at zero stronger."""
    strong = {"test": "datum.value === 0", "value": 1.4}
    return {"gridWidth": {"condition": strong, "value": 0.6}, "tickCount": 6}


def tooltip(series: str | None = None) -> list[dict]:
    """Step and value, and the name of the line if there are several."""
    own = [name_tip(series)] if series else []
    numbers = [
        {"field": "step", "type": "quantitative"},
        {"field": "value", "type": "quantitative", "format": ".4~g"},
    ]
    return own + numbers


def name_tip(field: str, title: str | None = None) -> dict:
    """The tooltip entry of a text field.

    The empty format is needed: without one, Vega-Lite 6.4 reads a text field of the nearest point from the wrong
    object, and the tooltip says "undefined".
    """
    return {"field": field, "type": "nominal", "format": ""} | ({"title": title} if title else {})


def data_rows(data: pd.DataFrame) -> list[dict]:
    """Rows of a frame as [`rounded`] values."""
    return [{name: rounded(value) for name, value in row.items()} for row in data.to_dict("records")]


def rounded(value: object) -> object:
    """Floats to five significant digits, None where one is not finite; everything else as it is.

    A line has a gap where its value is None, and no mark is drawn there.
    """
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def finite(values: pd.Series | pd.DataFrame) -> pd.Series | pd.DataFrame:
    """A Series or a frame of numbers with NaN for what is infinite."""
    return values.where(np.isfinite(values))
