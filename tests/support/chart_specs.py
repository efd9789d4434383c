"""What a chart draws once Vega-Lite has compiled it, and every chart that a report of some runs has."""

import re
from collections.abc import Iterator

import vl_convert

from trl_dynamics.report import gallery
from trl_dynamics.report.load import load_runs, split_series
from trl_dynamics.report.spec import VEGA_LITE


def all_charts(run_dirs) -> dict[str, dict]:
    """Every chart of the page and of the PNG export, by section and name."""
    runs = load_runs(run_dirs)
    series = split_series(runs)
    looks = gallery.page_looks(series)
    scored = (gallery.path_charts, gallery.squeezing_charts, gallery.force_charts, gallery.sample_charts)
    found = {}
    for one in series:
        drawers = (*scored, gallery.influence_charts_of) if one.summary else (gallery.influence_charts_of,)
        found |= {f"{one.label}-{name}": spec for draw in drawers for name, spec in draw(one, looks).items()}
    found |= {f"training-{name}": spec for name, spec in gallery.scalar_charts(runs, looks).items()}
    return found | {f"comparison-{name}": spec for name, spec in gallery.comparison_charts(series, looks).items()}


def tooltips(spec: dict) -> list[str]:
    """The expression of every tooltip, as the browser evaluates it."""
    vega = vl_convert.vegalite_to_vega(spec | {"width": 400}, vl_version=VEGA_LITE)
    return [node["tooltip"]["signal"] for node in nodes(vega["marks"]) if isinstance(node.get("tooltip"), dict)]


def objects_read(expression: str) -> set[str]:
    """`datum`, or `datum.datum` where it is the nearest point's: what a tooltip reads its fields from."""
    return set(re.findall(r"(datum(?:\.datum)?)\[", expression))


def colors(spec: dict, field: str) -> dict[str, str]:
    """Value of a field -> its colour, over all layers."""
    found = {}
    for node in nodes(spec):
        channel = node.get("color")
        if isinstance(channel, dict) and channel.get("field") == field:
            found |= dict(zip(channel["scale"]["domain"], channel["scale"]["range"], strict=True))
    return found


def nodes(value) -> Iterator[dict]:
    """Every object in a spec."""
    if isinstance(value, dict):
        yield value
        for child in value.values():
            yield from nodes(child)
    elif isinstance(value, list):
        for child in value:
            yield from nodes(child)
