"""Runs -> one offline HTML page: what was run, what was found, every curve, every probe."""

import base64
import json
from pathlib import Path

import numpy as np

from trl_dynamics.influence.rules import calm_text, find_in_influence
from trl_dynamics.paths import rules
from trl_dynamics.paths.comparison import compare
from trl_dynamics.paths.pairs import as_trained
from trl_dynamics.report import cards, extra, gallery, gaps
from trl_dynamics.report.charts import MEASURES
from trl_dynamics.report.explorer import explorer
from trl_dynamics.report.glossary import HOW_TO_READ, TERMS
from trl_dynamics.report.influence_tokens import token_strips
from trl_dynamics.report.load import Run, Series, load_runs, split_series
from trl_dynamics.report.spec import CONFIG, VEGA_LITE
from trl_dynamics.report.steps import is_log_spaced
from trl_dynamics.report.style import Looks
from trl_dynamics.report.text import page_value

TEMPLATE = "report.html.j2"
# Of a section, in order: names of charts to specs.
PANELS = ("paths", "squeezing", "forces", "answers")
# With more series than this their charts start folded up.
MAX_UNFOLDED = 4


def build_page(run_dirs: list[str | Path], output: str | Path) -> Path:
    """Write the report of one or more runs as a single HTML file that fetches nothing.

    Args:
        run_dirs (`list[str | Path]`): Output directories of runs (or their `dynamics/` folders); the first one of a
            training method is what the others of it are compared with.
        output (`str` or `Path`): The file to write; its folder is created when missing.

    Raises:
        ReportExtraMissing: If jinja2 or vl-convert-python is not installed.
        ValueError: If a folder holds no records.
    """
    renderer, template = extra.vl_convert(), extra.template(TEMPLATE)
    runs = load_runs(run_dirs)
    series = split_series(runs)
    scored = [one for one in series if one.summary is not None]
    looks = gallery.page_looks(series)
    sections = [_section(index, one, looks) for index, one in enumerate(series)]
    scalars, comparison = gallery.scalar_charts(runs, looks), gallery.comparison_charts(series, looks)
    drawn = [section[panel] for section in sections for panel in (*PANELS, "influence")]
    specs = {key: spec for charts in drawn for key, spec in charts.items()}
    specs |= _keyed("scalar", scalars) | _keyed("compare", comparison)
    strips = token_strips(series)
    main_chart = next((spec for section in sections for spec in section["paths"].values()), None)
    page = template.render(
        title=", ".join(run.name for run in runs),
        runs=[_run_view(run) for run in runs],
        sections=sections,
        unfolded=len(series) <= MAX_UNFOLDED,
        comparisons=_between(scored),
        scalars=_keyed("scalar", scalars),
        comparison=_keyed("compare", comparison),
        measures={name: label for name, (label, _, _) in MEASURES.items()},
        scored=bool(scored),
        log_steps=any(is_log_spaced(one.steps) for one in scored),
        terms=TERMS,
        how_to_read=HOW_TO_READ,
        strips=bool(strips),
        static_chart=_svg_uri(renderer, main_chart) if main_chart else "",
        data_json=inline_json(page_value(_data(specs) | {"explorer": explorer(scored, looks), "strips": strips})),
        vega=renderer.javascript_bundle(vl_version=VEGA_LITE),
    )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    return output


def inline_json(value) -> str:
    """JSON for the inside of a script element: no text in it can close the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _run_view(run: Run) -> dict:
    return {
        "name": run.name,
        "card": cards.run_card(run),
        "types": cards.type_rows(run),
        "dropped": cards.dropped_rows(run),
        "config": cards.config_text(run),
    }


def _section(index: int, series: Series, looks: Looks) -> dict:
    influence = {
        "label": series.label,
        "influence": _keyed(f"s{index}", gallery.influence_charts_of(series, looks)),
        "influence_note": gallery.influence_note(series),
    }
    if series.summary is None:
        found = find_in_influence(series.influence)
        nothing = (
            None if found else f"No finding about influence: {calm_text(series.influence)}. No probe set was tracked."
        )
        return influence | {"scored": False, "findings": found, "nothing": nothing} | {name: {} for name in PANELS}
    judged = series.judged
    found = rules.find(judged, as_trained(series.run.meta, series.model), series.influence)
    single, calm = len(series.steps) < 2, rules.calm_text(judged)
    nothing = "One step was scored: there is no change to judge." if len(judged.steps) < 2 else None
    return influence | {
        "scored": True,
        "method": series.run.meta.get("method", ""),
        "single": single,
        "findings": found,
        "nothing": nothing or (None if found else rules.summary_text([], series.label, calm)),
        "paths": _keyed(f"s{index}", gallery.path_charts(series, looks)),
        "squeezing": _keyed(f"s{index}", gallery.squeezing_charts(series, looks)),
        "forces": _keyed(f"s{index}", gallery.force_charts(series, looks)),
        "answers": _keyed(f"s{index}", gallery.sample_charts(series, looks)),
        "asked": series.run.meta.get("samples"),
        "thinned": gallery.thinned_note(series),
        "not_finite": gaps.note(series),
        "panel_notes": gallery.panel_notes(series),
        "changes": cards.change_rows(series),
        "start": series.steps[0],
        "end": series.steps[-1],
    }


def _between(series: list[Series]) -> list[dict]:
    """Per training method, findings between its first series and the others; who was left out, and why."""
    by_method: dict[str, list[Series]] = {}
    for one in series:
        by_method.setdefault(one.run.meta.get("method", ""), []).append(one)
    return [_compared(first, others) for first, *others in by_method.values() if others]


def _compared(first: Series, others: list[Series]) -> dict:
    apart = {one.label: _why_not_comparable(first, one) for one in others}
    summaries = {one.label: one.summary for one in (first, *others) if not apart.get(one.label)}
    return {
        "reference": first.label,
        "findings": compare(summaries),
        "compared": [label for label in summaries if label != first.label],
        "left_out": {label: reason for label, reason in apart.items() if reason},
    }


def _why_not_comparable(first: Series, other: Series) -> str:
    if first.run.fingerprint != other.run.fingerprint:
        return "another probe set"
    shared_steps = set(first.steps) & set(other.steps)
    if not shared_steps or max(shared_steps) <= max(first.steps[0], other.steps[0]):
        return "no common step after the start"
    ours, theirs = other.summary.first, first.summary.first
    difference = ours.values("num_tokens") - theirs.like(ours).values("num_tokens")
    if (np.abs(difference) > 0).any():
        return "another tokenizer or length limit, so values per token do not compare"
    for one in (first, other):
        for step in (one.steps[0], max(shared_steps)):
            if not gaps.any_finite(one.summary, step):
                return f"no value of {one.label} is finite at step {step:,}"
    return ""


def _data(specs: dict[str, dict]) -> dict:
    """The charts, and once the part that all of them share."""
    own = {key: {name: part for name, part in spec.items() if name != "config"} for key, spec in specs.items()}
    return {"config": CONFIG, "charts": own}


def _keyed(prefix: str, charts: dict[str, dict]) -> dict[str, dict]:
    return {f"{prefix}-{name}": spec for name, spec in charts.items()}


def _svg_uri(renderer, spec: dict) -> str:
    svg = renderer.vegalite_to_svg(page_value(spec) | {"width": 720}, vl_version=VEGA_LITE)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
