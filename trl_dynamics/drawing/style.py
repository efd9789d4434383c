"""How response types and runs look, the same in every chart: colour-blind-safe colours, and a dash per group."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from trl_dynamics.probing.schema import CUSTOM, IN_DISTRIBUTION, IRRELEVANT, RANDOM, REPHRASE, group_of, order_types

TYPE_COLORS: dict[str, str] = {
    "chosen": "#1a7fc4",
    "rejected": "#d55e00",
    "chosen_initial": "#56b4e9",
    "greedy": "#6b4fa0",
    "chosen_self_rephrase": "#00a5a5",
    "chosen_rephrase_semantic": "#3f6fd8",
    "chosen_rephrase_format": "#8a9bea",
    "rejected_rephrase_semantic": "#e69f00",
    "rejected_rephrase_format": "#c98c6b",
    "other_train": "#009e73",
    "other_test": "#7fae00",
    "human_unrelated": "#cc79a7",
    "chosen_permuted": "#8c8c8c",
    "other_test_permuted": "#b08fc7",
    "random_words": "#a89070",
}
# Types of the user's own take these in the order of their names.
CUSTOM_COLORS = ("#aa4499", "#c2a500", "#2a9d8f", "#e15759", "#5b8c5a", "#9c755f", "#4e79a7", "#ff9da7")
GROUP_DASHES: dict[str, list[int]] = {
    IN_DISTRIBUTION: [1, 0],
    REPHRASE: [7, 3],
    IRRELEVANT: [2, 2],
    RANDOM: [8, 3, 2, 3],
    CUSTOM: [12, 3],
}
# What goes up and what goes down, in heat maps and behind tokens: readable on a light and on a dark page.
RISE, FALL = "#4393c3", "#d6604d"

RUN_COLORS = ("#1a7fc4", "#d55e00", "#009e73", "#cc79a7", "#c2a500", "#56b4e9", "#8c8c8c", "#aa4499")
RUN_SHAPES = (
    "circle",
    "square",
    "cross",
    "diamond",
    "triangle-up",
    "triangle-down",
    "triangle-right",
    "triangle-left",
)
RUN_DASHES = ([1, 0], [7, 3], [2, 2], [8, 3, 2, 3])

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


class RunLook(NamedTuple):
    """How a run is drawn: colour and dash of its lines, shape of its marks."""

    color: str
    dash: list[int]
    shape: str


@dataclass(frozen=True)
class Looks:
    """The looks of one page: a run and a response type have the same one in every chart, whatever a chart leaves out.

    Args:
        runs (`dict[str, RunLook]`, *optional*): Label of a run or series -> its look.
        types (`dict[str, str]`, *optional*): Response type -> its colour.
    """

    runs: dict[str, RunLook] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, labels: Iterable[str], types: Iterable[str]) -> "Looks":
        """Of all runs of a page, in its order, and of all its response types."""
        return cls(run_looks(labels), type_colors(types))

    def of_runs(self, labels: Sequence[str]) -> dict[str, RunLook]:
        """Look of each of these runs; by their position where the page does not know one of them."""
        return {label: self.runs[label] for label in labels} if {*labels} <= {*self.runs} else run_looks(labels)

    def of_types(self, types: Sequence[str]) -> dict[str, str]:
        """Colour of each of these types; by their names where the page does not know one of them."""
        return {name: self.types[name] for name in types} if {*types} <= {*self.types} else type_colors(types)


# A chart without a page: its own subset decides.
ALONE = Looks()


def type_colors(types: Iterable[str]) -> dict[str, str]:
    """Response type to colour, in the usual order of types."""
    ordered = order_types(types)
    custom = [name for name in ordered if name not in TYPE_COLORS]
    own = {name: CUSTOM_COLORS[index % len(CUSTOM_COLORS)] for index, name in enumerate(custom)}
    return {name: TYPE_COLORS.get(name) or own[name] for name in ordered}


def type_dash(name: str) -> list[int]:
    """Dash pattern of a response type: that of its group."""
    return GROUP_DASHES[group_of(name)]


def run_looks(labels: Iterable[str]) -> dict[str, RunLook]:
    """Run label to look, by position."""
    return {
        label: RunLook(
            RUN_COLORS[index % len(RUN_COLORS)],
            RUN_DASHES[index // len(RUN_COLORS) % len(RUN_DASHES)],
            RUN_SHAPES[index % len(RUN_SHAPES)],
        )
        for index, label in enumerate(labels)
    }
