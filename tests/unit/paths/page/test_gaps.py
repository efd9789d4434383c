"""Runs with values that are not finite: a page without error, gaps instead of zeros, null in JSON, and a note."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from chart_specs import all_charts, colors, nodes, shown_of
from report_page import Page
from synthetic_runs import SQUEEZED, STEPS, records, write_run
from trl_dynamics.drawing import lines, text
from trl_dynamics.paths import rules
from trl_dynamics.paths.card import model_card_section
from trl_dynamics.paths.page import charts, gaps, tables
from trl_dynamics.paths.page.explorer import explorer
from trl_dynamics.paths.summary import summarise
from trl_dynamics.report import sections
from trl_dynamics.report.export import export_csv, export_png
from trl_dynamics.report.page import build_page
from trl_dynamics.store.store import DynamicsStore

TYPES = ["chosen", "rejected", "other_test", "chosen_permuted"]
# Named in the metadata of every synthetic probe set.
DROPPED = {"chosen_self_rephrase": 0}
MEASURED = ["logp_sum", "logp_mean", "prob_mean", "argmax_logp_sum", "entropy_mean", "sum_sq_mean", "rest_mass_mean"]
# What is lost of a run: at which steps, and of which probes (all without a number).
LOST = {
    "from the start": (STEPS, 99),
    "at the start": (STEPS[:1], 99),
    "from the middle": (STEPS[3:], 99),
    "in the middle": (STEPS[2:3], 99),
    "of some from the middle": (STEPS[3:], 4),
    "of some from the start": (STEPS, 4),
}


def broken(steps, num_probes, value=math.nan, **options) -> pd.DataFrame:
    """Records in which the first probes have no finite value at these steps."""
    frame = records(SQUEEZED, types=TYPES, num_probes=8, **options)
    lost = frame["step"].isin(steps) & (frame["probe_id"] < f"p{num_probes:03d}")
    frame.loc[lost, [*MEASURED, "eos_logp"]] = value
    return frame


def frame_of(case: str) -> pd.DataFrame:
    """Records of a case of [`LOST`], or of one whose values are infinite from the middle on."""
    return broken(*LOST["from the middle"], -math.inf) if case == "infinite" else broken(*LOST[case])


@pytest.fixture(scope="module", params=[*LOST, "infinite"])
def case(request):
    return request.param


@pytest.fixture(scope="module")
def run(case, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / case, frame_of(case))


def strict(source: str):
    """JSON as every other program reads it: a bare NaN is an error."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(source, parse_constant=refuse)


@pytest.mark.parametrize("name", ["from the start", "from the middle", "of some from the start", "infinite"])
def test_the_page_is_made_and_says_so(name, tmp_path):
    run = write_run(tmp_path / name, frame_of(name))
    page = Page(build_page([run], tmp_path / "report.html"))
    (shown,) = shown_of([run])
    assert page.text.count(gaps.note(shown.subject)) == 1 and "log-probabilities are NaN or infinite" in page.text
    assert "not_finite" in [found.name for found in rules.find(shown.subject, shown.meta)]
    assert not {"nan", "+nan", "inf", "-inf"} & set(page.text.split())
    for spec in strict(page.scripts[0])["charts"].values():
        for node in nodes(spec):
            assert None not in (node.get("domain") or [])


def test_the_note_says_where_and_how_many(run, case):
    (shown,) = shown_of([run])
    steps, num_probes = LOST.get(case, LOST["from the middle"])
    lost = 4 * min(num_probes, 8)
    assert gaps.lost_answers(shown.subject) == dict.fromkeys(steps, lost)
    where = {STEPS: "from step 0 on", STEPS[3:]: "from step 40 on"}.get(tuple(steps), f"at step {steps[0]}")
    assert gaps.note(shown.subject).startswith(f"Not finite: {where}, {lost} of 32 answers ")
    assert ("no change since" in gaps.note(shown.subject)) == (steps[0] == 0)
    assert {row[0]: row[2] for row in tables.type_table(shown.meta, {"policy": shown.subject}).rows} == dict.fromkeys(
        TYPES, 8
    ) | DROPPED


def test_tables_have_empty_fields(run, tmp_path):
    for path in export_csv([run], tmp_path):
        assert not np.isinf(pd.read_csv(path).select_dtypes("number")).any(axis=None)


@pytest.mark.parametrize("name", ["from the start", "infinite"])
def test_pictures_are_made(name, tmp_path):
    pytest.importorskip("vl_convert")
    written = export_png([write_run(tmp_path / "run", frame_of(name))], tmp_path / "png")
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_paths_have_a_gap_and_no_zero(run, case):
    spec = all_charts([run]).get(f"{case}-learning_paths")
    steps, num_probes = LOST.get(case, LOST["from the middle"])
    if case == "from the start":
        assert spec is None
        return
    assert "values not all finite" in spec["title"]["text"]
    rows = [row for row in spec["data"]["values"] if row["response_type"] == "chosen"]
    assert [row["step"] for row in rows] == list(STEPS)
    gone = [row["step"] for row in rows if row["token"] is None]
    assert gone == (list(steps) if num_probes > 8 else [])
    unpaired = list(STEPS) if case == "at the start" else gone
    assert [row["step"] for row in rows if row["change_token"] is None] == unpaired


def test_curves_end_where_values_do_and_reach_to_the_end_of_the_run():
    summary = summarise(broken(*LOST["from the middle"]))
    entropy = charts.metric({"run": summary}, "entropy")
    for spec in (entropy, charts.rejected_path(summary), charts.argmax_and_chosen(summary)):
        rows = spec["data"]["values"]
        assert [row["step"] for row in rows] == list(STEPS)
        for row in rows:
            values = {row[name] for name in ("value", "argmax", "chosen", "q10", "q90") if name in row}
            assert (values == {None}) == (row["step"] in STEPS[3:]) and (None in values) == (values == {None})


def test_a_finite_run_says_nothing(tmp_path):
    run = write_run(tmp_path / "run", records(types=TYPES, num_probes=4))
    (shown,) = shown_of([run])
    assert gaps.lost_answers(shown.subject) == {} and gaps.note(shown.subject) == gaps.remark(shown.subject) == ""
    assert not [row for row in all_charts([run])["run-learning_paths"]["data"]["values"] if None in row.values()]


def test_a_run_without_values_is_left_out_of_the_comparison_and_the_other_is_drawn(tmp_path):
    lost = write_run(tmp_path / "lost", broken(*LOST["from the start"]))
    runs = [lost, write_run(tmp_path / "kept", records(types=TYPES, num_probes=8))]
    found = {name: spec for name, spec in all_charts(runs).items() if name.startswith("comparison-")}
    assert {row["run"] for row in found["comparison-entropy"]["data"]["values"]} == {"kept"}
    assert list(colors(found["comparison-levels_at_end"], "run")) == ["kept"]
    page = Page(build_page(runs, tmp_path / "report.html"))
    assert "kept was not compared probe by probe: no value of lost is finite at step 0" in page.text
    assert "No difference between" not in page.text


def test_tables_and_model_card_have_words(tmp_path):
    frame = broken(*LOST["from the middle"])
    (shown,) = shown_of([write_run(tmp_path / "run", frame)])
    row = dict(
        zip(
            ["name", "group", "start", "end", "change", "sequence", "probes"],
            tables.change_table(shown.subject).rows[0],
            strict=True,
        )
    )
    assert (row["end"], row["change"].text, row["probes"]) == ("not finite", "not finite", 0) and float(
        row["start"]
    ) < 0
    path = explorer([shown])["series"][0]["probes"][0]["responses"][0]["path"]
    assert [value is None for value in path] == [step in STEPS[3:] for step in STEPS]
    card = model_card_section(frame)
    assert card.count("| not finite | not finite |") == len(TYPES) and "nan" not in card
    lost = model_card_section(broken(*LOST["at the start"]))
    assert lost.count("not finite") == 2 * len(TYPES)


def test_scalars_of_a_training_that_diverged_have_a_gap(tmp_path):
    log = [{"step": step, "loss": loss, "grad_norm": None} for step, loss in enumerate([1.0, math.nan, 2.0, math.inf])]
    store = DynamicsStore(write_run(tmp_path / "run", records(types=TYPES, num_probes=1)))
    store.write_trainer_log(log)
    assert [line["loss"] for line in strict((store.root / "trainer_log.json").read_text())] == [1.0, None, 2.0, None]
    curves = sections.scalar_curves(store.read_trainer_log())
    spec = lines.metric_by_run(curves, "loss", "")
    assert list(curves) == ["loss"]
    assert [row["value"] for row in spec["data"]["values"]] == [1.0, None, 2.0, None]


@pytest.mark.parametrize(
    ("value", "form", "expected"),
    [
        (math.nan, "+.3f", "not finite"),
        (-math.inf, ".3f", "not finite"),
        (None, ".3f", "–"),
        (1e300, "+.3f", "+1e+300"),
        (-1e7, ".3f", "-1e+07"),
        (-0.5, "+.3f", "-0.500"),
        (0, ".4g", "0"),
    ],
)
def test_numbers_on_the_page(value, form, expected):
    assert text.number(value, form) == expected


def test_a_mean_over_one_probe_has_no_error(tmp_path):
    run = write_run(tmp_path / "run", records(types=TYPES, num_probes=1))
    (shown,) = shown_of([run])
    assert {row[4].text.split(" ", 1)[1] for row in tables.change_table(shown.subject).rows} == {"(one probe)"}
    assert "nan" not in Page(build_page([run], tmp_path / "report.html")).text.split()


def test_shares_far_above_the_whole_have_no_digits():
    assert text.percent(0.314) == "31%" and text.percent(6.6e8) == "more than 1000%"
