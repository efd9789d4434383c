"""One gradient step on one softmax, drawn: probabilities before and after, and by what factor each label changed."""

import math
from dataclasses import dataclass
from pathlib import Path

from trl_dynamics.drawing import style
from trl_dynamics.drawing.spec import VEGA_LITE, chart, name_tip, rounded
from trl_dynamics.report import extra
from trl_dynamics.report.page import inline_json

TEMPLATE = "squeeze.html.j2"
ROLES = {
    "y− (pushed down)": style.TYPE_COLORS["rejected"],
    "y+ (pushed up)": style.TYPE_COLORS["chosen"],
    "y* (the likeliest besides)": style.TYPE_COLORS["greedy"],
    "all others": "#8c8c8c",
}
REJECTED, CHOSEN, RIVAL, OTHER = ROLES
# Pixels of a chart in the picture; the page's charts are as wide as their place.
WIDTH, HEIGHT, AXIS, SCALE = 430, 170, 40, 2.0
# A factor as close to 1 as this is no change to the eye.
STAYS = 1e-4


@dataclass(frozen=True)
class StepCase:
    """One step on one distribution over V labels.

    Args:
        name (`str`): Short identifier.
        title (`str`): What it shows.
        text (`str`): The same in a sentence or two.
        strength (`float`): What the step moves a logit by, per unit of residual.
        before (`list[float]`): V probabilities before the step.
        after (`list[float]`): V probabilities after it.
        rival (`int`): y*, the likeliest label besides the one stepped on, before the step.
        chosen (`int`, *optional*): y+, the label pushed up.
        rejected (`int`, *optional*): y−, the label pushed down.
    """

    name: str
    title: str
    text: str
    strength: float
    before: list[float]
    after: list[float]
    rival: int
    chosen: int | None = None
    rejected: int | None = None

    @property
    def drained(self) -> float:
        """What all labels but y− (y+ in a step without y−) and y* lost, as probability."""
        named = (self.chosen if self.rejected is None else self.rejected, self.rival)
        lost = self._rest(self.before, named) - self._rest(self.after, named)
        return lost if abs(lost) >= 0.5e-4 else 0.0  # what four digits cannot show has no sign either

    @property
    def rising(self) -> tuple[int, int]:
        """How many of the labels that the step does not name rise, and how many they are."""
        others = [v for v in range(len(self.before)) if v not in (self.chosen, self.rejected)]
        return sum(self.after[v] > self.before[v] for v in others), len(others)

    @property
    def counted(self) -> str:
        """[`StepCase.rising`] in words."""
        rising, of = self.rising
        return f"{rising} of the {of} labels that the step does not name rise"

    def role(self, label: int) -> str:
        """What a label is in this step, one of [`ROLES`]."""
        return {self.rival: RIVAL, self.chosen: CHOSEN, self.rejected: REJECTED}.get(label, OTHER)

    @staticmethod
    def _rest(probabilities: list[float], named: tuple[int, ...]) -> float:
        return sum(p for label, p in enumerate(probabilities) if label not in named)


def number_rows(case: StepCase) -> list[tuple[str, str, str]]:
    """(label, before, after) of the labels with a name, and of all others together, as text."""
    named = {"p(y−)": case.rejected, "p(y+)": case.chosen, "p(y*)": case.rival}
    named = {name: label for name, label in named.items() if label is not None}
    rows = [(name, _number(case.before[label]), _number(case.after[label])) for name, label in named.items()]
    rest = [case._rest(side, tuple(named.values())) for side in (case.before, case.after)]
    return [*rows, ("all others", *map(_number, rest))]


def probabilities(case: StepCase) -> dict:
    """Bars per label, the likeliest first: before (outline) and after (filled)."""
    y = {
        "type": "quantitative",
        "scale": {"domain": [0, _top(case)]},
        "axis": {"title": "probability", "tickCount": 5, "minExtent": AXIS},
    }
    return chart(
        _rows(case),
        "Probability before (outline) and after",
        height=HEIGHT,
        encoding={"x": _label_axis(case), "tooltip": _tooltip()},
        layer=[
            {"mark": {"type": "bar", "width": 5}, "encoding": {"y": {"field": "after"} | y, "color": _color()}},
            {
                "mark": {"type": "bar", "width": 7, "filled": False, "stroke": "#6f747c", "strokeWidth": 0.9},
                "encoding": {"y": {"field": "before"} | y},
            },
            {
                "transform": [{"filter": "isValid(datum.sign)"}],
                "mark": {"type": "text", "dy": -7, "fontSize": 12, "fontWeight": 600},
                "encoding": {
                    "y": {"field": "highest"} | y,
                    "text": {"field": "sign", "type": "nominal"},
                    "color": _color(),
                },
            },
        ],
    )


def factors(case: StepCase) -> dict:
    """A dot per label on a logarithmic scale: p after / p before; above 1 it rises."""
    rows = _rows(case)
    lowest, highest = (pick(math.log10(row["factor"]) for row in rows) for pick in (min, max))
    decades = [10.0**power for power in range(math.floor(lowest), math.ceil(highest) + 1)]
    y = {
        "type": "quantitative",
        "scale": {"type": "log", "domain": [decades[0], decades[-1]]},
        "axis": {"title": "factor p′/p", "values": decades, "format": "~g", "minExtent": AXIS},
    }
    return chart(
        rows,
        "Factor by which the step multiplies each label",
        height=HEIGHT,
        encoding={"x": _label_axis(case), "tooltip": _tooltip()},
        layer=[
            {
                "mark": {"type": "rule", "strokeWidth": 1.6, "opacity": 0.6},
                "encoding": {"y": {"field": "factor"} | y, "y2": {"field": "one"}, "color": _color()},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 26, "opacity": 1},
                "encoding": {
                    "y": {"field": "factor"} | y,
                    "color": _color(),
                    "shape": {
                        "field": "direction",
                        "type": "nominal",
                        "scale": {
                            "domain": ["rises", "falls", "stays"],
                            "range": ["triangle-up", "triangle-down", "circle"],
                        },
                        "legend": None,
                    },
                },
            },
            {
                "mark": {"type": "rule", "strokeWidth": 0.8, "color": "#6f747c"},
                "encoding": {"x": None, "tooltip": None, "y": {"datum": 1.0, "type": "quantitative"}},
            },
        ],
    )


def build_page(cases: list[StepCase], output: str | Path) -> Path:
    """Write the cases as a single HTML file that fetches nothing.

    Raises:
        ReportExtraMissing: If jinja2 or vl-convert-python is not installed.
    """
    renderer, template = extra.vl_convert(), extra.template(TEMPLATE)
    charts = {f"{case.name}-{draw.__name__}": draw(case) for case in cases for draw in (probabilities, factors)}
    page = template.render(
        cases=[{"case": case, "numbers": number_rows(case)} for case in cases],
        roles=ROLES,
        data_json=inline_json({"charts": charts}),
        vega=renderer.javascript_bundle(vl_version=VEGA_LITE),
    )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    return output


def export_png(cases: list[StepCase], output: str | Path) -> Path:
    """Write the cases as one picture, a row each; no browser is needed.

    Raises:
        ReportExtraMissing: If vl-convert-python is not installed.
    """
    renderer, output = extra.vl_convert(), Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(renderer.vegalite_to_png(picture(cases), vl_version=VEGA_LITE, scale=SCALE))
    return output


def picture(cases: list[StepCase]) -> dict:
    """One spec of all cases: per row both charts, with the numbers under its title."""
    rows = []
    for case in cases:
        numbers = ",  ".join(f"{label} {before} → {after}" for label, before, after in number_rows(case))
        heading = {
            "text": case.title,
            "subtitle": [numbers, f"{case.counted};  drained mass {case.drained:+.4f}"],
            "anchor": "start",
            "fontSize": 15,
            "subtitleFontSize": 11.5,
            "subtitleLineHeight": 16,
            "offset": 10,
        }
        rows.append({"title": heading, "hconcat": [_part(probabilities(case)), _part(factors(case))], "spacing": 40})
    whole = probabilities(cases[0])
    return {
        "$schema": whole["$schema"],
        "config": whole["config"] | {"background": "white", "padding": 16},
        "vconcat": rows,
        "spacing": 34,
    }


def _part(spec: dict) -> dict:
    kept = {key: value for key, value in spec.items() if key not in ("$schema", "config", "autosize")}
    return kept | {"width": WIDTH}


def _rows(case: StepCase) -> list[dict]:
    signs = {case.rival: "y*", case.chosen: "y+", case.rejected: "y−"}
    rows = []
    for label, (before, after) in enumerate(zip(case.before, case.after, strict=True)):
        direction = "stays" if abs(after / before - 1) < STAYS else "rises" if after > before else "falls"
        row = {"label": label, "role": case.role(label), "direction": direction, "one": 1.0}
        row |= {"before": before, "after": after, "factor": after / before, "highest": max(before, after)}
        rows.append(
            {key: rounded(value) for key, value in row.items()} | ({"sign": signs[label]} if label in signs else {})
        )
    return rows


def _label_axis(case: StepCase) -> dict:
    return {
        "field": "label",
        "type": "quantitative",
        "scale": {"domain": [-1, len(case.before)], "nice": False},
        "axis": {"title": f"{len(case.before)} labels, the likeliest first", "labels": False, "grid": False},
    }


def _color() -> dict:
    scale = {"domain": list(ROLES), "range": list(ROLES.values())}
    return {"field": "role", "type": "nominal", "scale": scale, "legend": None}


def _tooltip() -> list[dict]:
    numbers = [{"field": name, "type": "quantitative", "format": ".3~g"} for name in ("before", "after", "factor")]
    return [name_tip("role"), *numbers]


def _top(case: StepCase) -> float:
    return rounded(1.15 * max(*case.before, *case.after))


def _number(value: float) -> str:
    return f"{value:.4f}" if value >= 0.001 else f"{value:.1e}"
