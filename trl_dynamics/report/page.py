"""Runs -> one offline HTML page: what was run, what was found, every curve, every probe."""

import base64
import json
from pathlib import Path

from trl_dynamics.drawing.axis import is_log_spaced
from trl_dynamics.drawing.section import Section
from trl_dynamics.drawing.spec import CONFIG, VEGA_LITE
from trl_dynamics.findings.chapter import Comparison
from trl_dynamics.findings.verdicts import calm_of, compare, findings_of, summary_text
from trl_dynamics.report import cards, extra
from trl_dynamics.report.glossary import terms
from trl_dynamics.report.load import Run, Series, load_runs, split_series
from trl_dynamics.report.sections import all_sections
from trl_dynamics.report.text import page_value

TEMPLATE = "report.html.j2"
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
    sections = all_sections(runs, series)
    scored = [judged.overview.scored for one in series for judged in one.judged if judged.overview.scored]
    page = template.render(
        title=", ".join(run.name for run in runs),
        runs=[_run_view(run) for run in runs],
        verdicts=[_verdict(one) for one in series],
        comparisons=_between(series),
        sections=sections,
        unfolded=len(series) <= MAX_UNFOLDED,
        log_steps=any(map(is_log_spaced, scored)),
        terms=terms(),
        picture=_picture(renderer, sections),
        data_json=inline_json(page_value(_data(sections))),
        vega=renderer.javascript_bundle(vl_version=VEGA_LITE),
        scripts=[section.widget.script.read_text(encoding="utf-8") for section in sections if section.widget],
    )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    return output


def inline_json(value: object) -> str:
    """JSON for the inside of a script element: no text in it can close the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _run_view(run: Run) -> dict:
    return {"name": run.name, "card": cards.run_card(run), "config": cards.config_text(run)}


def _verdict(series: Series) -> dict:
    """What was found of a series, and why nothing was, or could be."""
    found, lacks = findings_of(series.judged), [one.overview.lack for one in series.judged]
    silent = "" if found else summary_text([], series.label, calm_of(series.judged))
    return {"label": series.label, "findings": found, "nothing": " ".join(filter(None, lacks)) or silent}


def _between(series: list[Series]) -> list[Comparison]:
    """Per training method, how its first series and the others differ."""
    by_method: dict[str, dict[str, list]] = {}
    for one in series:
        by_method.setdefault(one.run.meta.get("method", ""), {})[one.label] = one.judged
    return [comparison for runs in by_method.values() for comparison in compare(runs)]


def _picture(renderer, sections: list[Section]) -> dict | None:
    """The page's first chart for readers without scripts: its section, whose it is, and the picture's address."""
    for section in sections:
        for panel in section.panels:
            for spec in panel.charts.values():
                svg = renderer.vegalite_to_svg(page_value(spec) | {"width": 720}, vl_version=VEGA_LITE)
                address = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
                return {"section": section, "label": panel.label, "address": address}
    return None


def _data(sections: list[Section]) -> dict:
    """The charts, once the part that all of them share, and what scripts of sections are given."""
    charts = {key: spec for section in sections for key, spec in section.charts.items()}
    own = {key: {name: part for name, part in spec.items() if name != "config"} for key, spec in charts.items()}
    widgets = {section.name: section.widget.data for section in sections if section.widget}
    return {"config": CONFIG, "charts": own, "widgets": widgets}
