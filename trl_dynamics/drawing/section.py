"""What a chapter hands to a report: sections with charts, tables and data; rows of the run card; terms; CSV tables.

The page, the PNG and CSV export and the tests loop over these and know no subject.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from trl_dynamics.drawing.style import Looks
from trl_dynamics.drawing.terms import Term
from trl_dynamics.probing.schema import ProbeSet

# How a panel's charts are arranged: below each other, side by side, or side by side with more room.
WIDE, GRID, PAIRS = "wide", "grid", "pairs"


class Place(IntEnum):
    """Where on the page a section belongs; within a place the order of chapters counts."""

    CURVES, TRAINING, LOOK_UP, COMPARISON = range(4)


class Cell(NamedTuple):
    """A field of a table with a class of the page's style, `"up"` or `"down"`."""

    text: str
    mark: str


@dataclass(frozen=True)
class Shown:
    """One model of a run, as a chapter draws it.

    Args:
        label (`str`): Unique on the page.
        key (`str`): What the names of its charts begin with.
        run (`str`): The run's name.
        model (`str`): As in the records.
        subject: What the chapter made of the model's rows.
        meta (`Mapping`): The run's meta.json.
        probe_set ([`ProbeSet`], *optional*): What was scored; None where its copy cannot be read.
    """

    label: str
    key: str
    run: str
    model: str
    subject: object
    meta: Mapping = field(default_factory=dict)
    probe_set: ProbeSet | None = None


@dataclass(frozen=True)
class Table:
    """A table that can be folded up.

    Args:
        title (`str`): What it shows.
        columns (`Sequence[str]`): Their heads.
        rows (`Sequence[Sequence]`): Texts, numbers and [`Cell`]s.
        num_names (`int`, *optional*): How many columns are names; those after them are numbers.
        hint (`str`, *optional*): How to read it.
        notes (`Sequence[str]`, *optional*): What else belongs to it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence]
    num_names: int = 1
    hint: str = ""
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Panel:
    """What a section shows of one series, or of all of them together.

    Args:
        charts (`dict[str, dict]`): Name -> spec.
        label (`str`, *optional*): Of the series; empty for a panel of all.
        key (`str`, *optional*): What the names of its charts begin with; by default the section's name.
        remark (`str`, *optional*): Follows the label.
        layout (`str`, *optional*): [`WIDE`], [`GRID`] or [`PAIRS`].
        spanning (`Sequence[str]`, *optional*): Charts that take a whole row of a grid.
        readings (`Mapping[str, str]`, *optional*): Chart -> how to read it.
        notices, hints, notes (`Sequence[str]`, *optional*): What to heed before the charts, what to know before them,
            and what to know after them.
        nothing (`str`, *optional*): Why there is no chart.
        folded (`Sequence[Panel]`, *optional*): More charts, folded up, under their labels.
        tables (`Sequence[Table]`, *optional*): Tables below.
    """

    charts: dict[str, dict] = field(default_factory=dict)
    label: str = ""
    key: str = ""
    remark: str = ""
    layout: str = GRID
    spanning: Sequence[str] = ()
    readings: Mapping[str, str] = field(default_factory=dict)
    notices: Sequence[str] = ()
    hints: Sequence[str] = ()
    notes: Sequence[str] = ()
    nothing: str = ""
    folded: "Sequence[Panel]" = ()
    tables: Sequence[Table] = ()

    @property
    def all_charts(self) -> dict[str, dict]:
        """Its charts, and those that are folded up."""
        return self.charts | {name: spec for panel in self.folded for name, spec in panel.charts.items()}


@dataclass(frozen=True)
class Control:
    """A choice that sets a parameter of charts.

    Args:
        param (`str`): Its name in the charts' specs.
        label (`str`): What is chosen.
        options (`Mapping[str, str]`): Value -> its name; the first one is set.
    """

    param: str
    label: str
    options: Mapping[str, str]


@dataclass(frozen=True)
class Widget:
    """What a script of the chapter draws; it registers itself with `page.register(SECTION, start)`.

    Args:
        data: What the script is given, ready for JSON.
        script (`Path`): The script's file.
        waiting (`str`): What is shown in its place without scripts.
        title, hint (`str`, *optional*): Above it.
    """

    data: object
    script: Path
    waiting: str
    title: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading and a place in the navigation.

    Args:
        name (`str`): Short identifier, unique on the page.
        title (`str`): Its heading.
        link (`str`): What the navigation calls it.
        hint (`str`, *optional*): How to read it.
        panels (`Sequence[Panel]`, *optional*): One per series, or one of all.
        control ([`Control`], *optional*): A choice for its charts.
        widget ([`Widget`], *optional*): What a script draws, below the panels.
        place ([`Place`], *optional*): Where on the page it belongs.
    """

    name: str
    title: str
    link: str
    hint: str = ""
    panels: Sequence[Panel] = ()
    control: Control | None = None
    widget: Widget | None = None
    place: Place = Place.CURVES

    @property
    def charts(self) -> dict[str, dict]:
        """Every chart by its name on the page."""
        drawn = [(panel.key or self.name, panel.all_charts) for panel in self.panels]
        return {f"{key}-{name}": spec for key, charts in drawn for name, spec in charts.items()}


@dataclass(frozen=True)
class Card:
    """What a chapter adds to the card of a run: rows of label and value, and tables."""

    rows: Sequence[tuple[str, str]] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Sections:
    """How a chapter is shown.

    Args:
        draw (`Callable`): The series that have a subject, in order, and the page's looks -> sections.
        types (`Callable`, *optional*): A subject -> the response types that it shows, which have one colour each.
        frames (`Callable`, *optional*): The same series -> file name (without .csv) -> table.
        card (`Callable`, *optional*): meta.json of a run, and model -> subject (empty where nothing was recorded) ->
            its part of the run card.
        words, metrics (`Sequence[Term]`, *optional*): Its terms in the glossary.
    """

    draw: Callable[[list[Shown], Looks], list[Section]]
    types: Callable[[object], list[str]] = lambda subject: []
    frames: Callable[[list[Shown]], dict[str, pd.DataFrame]] = lambda shown: {}
    card: Callable[[Mapping, Mapping[str, object]], Card] = lambda meta, subjects: Card()
    words: Sequence[Term] = ()
    metrics: Sequence[Term] = ()


def as_frame(shown: Shown, table: pd.DataFrame, *first: str) -> pd.DataFrame:
    """A table of one series with the columns run and model in front, then `first`, then the others."""
    keys = {"run": shown.run, "model": shown.model}
    table = table.assign(**keys)
    front = [*keys, *first]
    return table[[*front, *(name for name in table.columns if name not in front)]]
