"""What a chart draws once Vega-Lite has compiled it, and every chart that a report of some runs has."""

import re
from collections.abc import Iterator

import vl_convert

from trl_dynamics import chapters
from trl_dynamics.drawing.section import Shown
from trl_dynamics.drawing.spec import VEGA_LITE
from trl_dynamics.report.load import load_runs, split_series
from trl_dynamics.report.sections import all_sections, shown_by


def all_charts(run_dirs) -> dict[str, dict]:
    """Every chart of the page and of the PNG export, by series or section, and name."""
    runs = load_runs(run_dirs)
    panels = [(section, panel) for section in all_sections(runs, split_series(runs)) for panel in section.panels]
    named = [(panel.label or section.name, panel.all_charts) for section, panel in panels]
    return {f"{where}-{name}": spec for where, charts in named for name, spec in charts.items()}


def shown_of(run_dirs, chapter: str = "paths") -> list[Shown]:
    """What a chapter draws of these runs."""
    return shown_by(chapters.load(chapters.CHAPTERS[chapter]), split_series(load_runs(run_dirs)))


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
