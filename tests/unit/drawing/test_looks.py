"""Every chart of a page: tooltips that name what is pointed at, and one colour per run and response type."""

import copy

import pandas as pd
import pytest

from chart_specs import all_charts, colors, nodes, objects_read, shown_of, tooltips
from synthetic_answers import answers
from synthetic_influence import TYPES, influence, write_influence
from synthetic_runs import SQUEEZED, records, write_run
from trl_dynamics.drawing import lines
from trl_dynamics.drawing.style import Looks
from trl_dynamics.paths.page.explorer import explorer
from trl_dynamics.report.load import load_runs, split_series
from trl_dynamics.report.sections import page_looks

OWN = ["mine", "yours", "theirs"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs that differ in what they have: types of their own, a trainer's log, greedy answers, influence."""
    folder = tmp_path_factory.mktemp("runs")
    plain = records(SQUEEZED, types=["chosen", "rejected", "other_test", *OWN], num_probes=4)
    some = records(types=["chosen", "rejected", "theirs"], num_probes=4, seed=1)
    tracked = [records(types=["chosen"], num_probes=4, model=name) for name in ("small", "large")]
    seen = influence(types=(*TYPES, "zeta", "theirs"), num_probes=4)
    return [
        write_run(folder / "tracked", pd.concat(tracked), method="track"),
        write_run(folder / "plain", plain),
        write_run(folder / "some", some, answers=answers(0.5, num_probes=4), samples={}),
        write_influence(write_run(folder / "watched", some, method="sft"), seen),
    ]


@pytest.fixture(scope="module")
def specs(runs):
    pytest.importorskip("vl_convert")
    return all_charts(runs)


def test_every_tooltip_reads_all_its_fields_from_the_same_point(specs):
    """Of the nearest point the fields are in `datum.datum`; read from `datum`, a name would be "undefined"."""
    kinds = {name.rsplit("-", 1)[-1]: spec for name, spec in specs.items()}
    nearest = []
    for name, spec in kinds.items():
        for expression in tooltips(spec):
            read = objects_read(expression)
            assert len(read) == 1, (name, expression)
            nearest += [name] if read == {"datum.datum"} else []
    assert nearest == ["learning_paths"]


def test_without_a_format_the_name_would_be_read_from_the_wrong_place(specs):
    """Vega-Lite's fault is still there, so that the format is needed."""
    spec = copy.deepcopy(specs["plain-learning_paths"])
    for node in nodes(spec):
        if node.get("format") == "":
            del node["format"]
    assert any(len(objects_read(expression)) == 2 for expression in tooltips(spec))


def test_a_run_has_one_colour_in_every_chart(specs):
    found: dict[str, set[str]] = {}
    for spec in specs.values():
        for run, color in colors(spec, "run").items():
            found.setdefault(run, set()).add(color)
    assert {len(own) for own in found.values()} == {1}, found
    labels = ["tracked: small", "tracked: large", "plain", "some", "watched"]
    assert set(found) == set(labels) and len({min(own) for own in found.values()}) == len(labels)
    drawn = {name: list(colors(spec, "run")) for name, spec in specs.items()}
    assert drawn["training-loss"] == labels[2:] and drawn["some-entropy"] == ["some"], "charts draw subsets"


def test_a_run_has_one_shape_and_one_dash(specs):
    channels = [
        node[name]
        for spec in specs.values()
        for node in nodes(spec)
        for name in ("shape", "strokeDash")
        if name in node
    ]
    scales = [channel["scale"] for channel in channels if isinstance(channel, dict) and channel.get("field") == "run"]
    looks = {(run, str(look)) for scale in scales for run, look in zip(scale["domain"], scale["range"], strict=True)}
    assert len(looks) == 2 * len({run for run, _ in looks}) == 2 * 5


def test_a_response_type_has_one_colour_in_every_chart_and_in_the_explorer(specs, runs):
    explored = explorer(shown_of(runs), page_looks(split_series(load_runs(runs))))["colors"]
    found: dict[str, set[str]] = {}
    for listed in (explored, *(colors(spec, "response_type") for spec in specs.values())):
        for name, color in listed.items():
            found.setdefault(name, set()).add(color)
    assert {len(own) for own in found.values()} == {1}, found
    assert {*OWN, "zeta", *TYPES} <= set(found)
    assert len({min(found[name]) for name in (*OWN, "zeta")}) == 4
    assert list(colors(specs["some-learning_paths"], "response_type")) == ["chosen", "rejected", "theirs"]


def test_a_chart_without_a_page_takes_its_own_order():
    curves = {name: pd.Series([0.0, 1.0], index=[0, 1]) for name in ("a", "b")}
    alone = colors(lines.metric_by_run(curves, "t", ""), "run")
    page = Looks.of(["b", "a"], [])
    assert colors(lines.metric_by_run(curves, "t", "", looks=page), "run") == {"a": alone["b"], "b": alone["a"]}
