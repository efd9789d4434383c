"""Influence on the page: right numbers in every chart, bounded, each with its reading; no trace where it is off."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from chart_specs import shown_of
from report_page import EVIL, Page
from synthetic_influence import STEPS, TYPES, influence, set_value, summary_of, write_alone, write_influence
from synthetic_runs import records, write_run
from trl_dynamics.drawing.spec import VEGA_LITE
from trl_dynamics.influence import charts, maps, strips
from trl_dynamics.influence.sections import READINGS, influence_charts, influence_note
from trl_dynamics.report import export
from trl_dynamics.report.page import build_page

CHARTS = [
    "force_map",
    "force_change",
    "predicted_and_true",
    "first_order_error",
    "step_parts",
    "accumulated",
    "rank_matrix",
    "rank_line",
]


@pytest.fixture(scope="module")
def frame():
    return influence(error=0.6, drift=0.3)


@pytest.fixture(scope="module")
def runs(frame, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    plain = records(types=TYPES, num_probes=12)
    return {
        "watched": write_influence(write_run(folder / "watched", plain, prompt=EVIL), frame),
        "plain": write_run(folder / "plain", plain, prompt=EVIL),
    }


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    return Page(build_page(list(runs.values()), tmp_path_factory.mktemp("page") / "report.html"))


def shown_from(run):
    return shown_of([run], "influence")[0]


def cells(spec):
    return {(row["update"], row["observed"], row["step"]): row for row in spec["data"]["values"]}


def test_the_page_has_a_place_for_influence_with_its_findings_and_readings(page):
    found = [attrs["id"] for tag, attrs in page.elements if tag == "section"]
    assert found[3:6] == ["squeezing", "influence", "training"]
    drawn = [key for key in page.data["charts"] if key.removeprefix("s0-") in CHARTS]
    assert drawn == [f"s0-{name}" for name in CHARTS] and list(READINGS) == CHARTS
    for sentence in READINGS.values():
        assert page.text.count(sentence) == 1
    assert (
        "Recorded at 4 steps, 0 to 30; 12 probes observed. Fixed updates beside the batch: chosen, rejected."
        in page.text
    )
    assert "training steps are too large for their first-order explanation" in page.text


def test_a_page_without_influence_has_no_place_for_it(runs, tmp_path):
    plain = Page(build_page([runs["plain"]], tmp_path / "report.html"))
    assert "influence" not in [attrs.get("id") for _, attrs in plain.elements]
    assert not [attrs for _, attrs in plain.elements if attrs.get("href") == "#influence"]
    assert "influence" not in plain.data["widgets"] and not [key for key in plain.data["charts"] if "force_map" in key]


def test_the_force_map_is_the_mean_over_answers_per_token(frame):
    shown = cells(maps.force_map(summary_of(frame)))
    assert len(shown) == 3 * 3 * 4
    for (update, observed, step), cell in shown.items():
        values = [
            row["predicted_sum"] / row["num_tokens"]
            for row in frame.to_dict("records")
            if (row["update"], row["response_type"], row["step"]) == (update, observed, step)
        ]
        assert cell["value"] == pytest.approx(np.mean(values), rel=1e-4)
    spec, errors = (
        maps.force_map(summary_of(frame)),
        summary_of(frame).errors.set_index(["response_type", "step"]),
    )
    for step in STEPS:
        assert f'"{step}": ": batch off by {errors.at[("", step), "error"]:.0%}"' in spec["title"]["text"]["expr"]
        own = {key: cell for key, cell in shown.items() if key[2] == step}
        largest = max(own.values(), key=lambda cell: abs(cell["value"]))
        assert largest["strength"] == 1 and all(0 <= cell["strength"] <= 1 for cell in own.values())


def test_cells_say_their_numbers_in_the_unit_of_the_axis(frame):
    spec = maps.force_map(summary_of(frame))
    (power,) = re.findall(r"cells in 10([⁻⁰-⁹¹²³]+) nats per token", spec["encoding"]["x"]["axis"]["title"])
    unit = 10.0 ** int(power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")))
    for cell in cells(spec).values():
        told = float(cell["text"].replace("−", "-")) * unit
        assert told == pytest.approx(cell["value"], rel=0.01, abs=0.51 * unit)
    assert maps.signed(-0.04, 1) == "0" and maps.signed(-0.06, 1) == "−0.1"
    assert maps.unit_text(0) == "nats per token" and maps.unit_text(-12).startswith("10⁻¹² nats")


def test_what_changed_is_the_last_map_minus_the_first(frame):
    summary = summary_of(frame)
    drawn, change = cells(maps.force_map(summary)), cells(maps.force_change(summary))
    for (update, observed, _), cell in change.items():
        expected = drawn[update, observed, 30]["value"] - drawn[update, observed, 0]["value"]
        assert cell["value"] == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert maps.force_change(summary_of(influence(steps=(0,)))) is None


def test_dots_are_answers_and_their_axes_are_the_same(frame):
    spec = charts.predicted_and_true(summary_of(frame))
    identity, dots = spec["layer"]
    rows = pd.DataFrame(dots["data"]["values"])
    batch = frame[frame["update"] == "batch"]
    merged = rows.merge(batch, on=["step", "probe_id", "response_type"], suffixes=("", "_list"))
    assert len(merged) == len(rows) == len(batch)
    for column in ("predicted", "true"):
        expected = merged[f"{column}_sum"] / merged["num_tokens"]
        np.testing.assert_allclose(merged[column], expected, rtol=1e-4)
    for step in STEPS:
        low, high = (row["end"] for row in identity["data"]["values"] if row["step"] == step)
        own = rows.loc[rows["step"] == step, ["predicted", "true"]]
        assert low < own.min().min() and high > own.max().max()
    assert dots["encoding"]["x"]["scale"] == dots["encoding"]["y"]["scale"]


def test_curves_are_those_of_the_summary(frame):
    summary = summary_of(frame)
    together = charts.first_order_error(summary)["layer"][1]["data"]["values"]
    expected = summary.errors.query("response_type == ''").set_index("step")["error"]
    assert {row["step"]: row["value"] for row in together} == pytest.approx(expected.to_dict(), rel=1e-4)
    rows = charts.step_parts(summary)["data"]["values"]
    momentum = {row["step"]: row["value"] for row in rows if row["part"] == "momentum of earlier batches"}
    assert momentum == pytest.approx(dict(zip(STEPS, summary.parts["momentum"], strict=True)), rel=1e-4)
    assert "weight decay" not in {row["part"] for row in rows}, "it is zero"
    ranks = {(row["row"], row["column"]): row["value"] for row in maps.rank_matrix(summary)["data"]["values"]}
    assert ranks[0, 30] == ranks[30, 0] == pytest.approx(summary.matrix.at[0, 30], rel=1e-4)
    assert len(charts.rank_line(summary)["data"]["values"]) == 3


def test_accumulated_changes_are_sums_of_means(frame):
    spec = charts.accumulated(summary_of(frame))
    assert "sampled" in spec["title"]["text"]
    curves = {(r["response_type"], r["curve"], r["step"]): r["value"] for r in spec["data"]["values"]}
    for name in TYPES:
        own = frame[(frame["update"] == "batch") & (frame["response_type"] == name)]
        for curve, column in (("predicted", "predicted_sum"), ("observed", "true_sum")):
            total = 0.0
            for step in STEPS:
                total += (own.loc[own["step"] == step, column] / 6).mean()
                assert curves[name, curve, step + 1] == pytest.approx(total, rel=1e-4)
    every_step = charts.accumulated(summary_of(influence(steps=range(5))))
    assert "sampled" not in every_step["title"]["text"]


def test_charts_are_bounded_and_say_so():
    long = summary_of(influence(steps=range(30), num_probes=200, num_tokens=2, updates=("batch", "chosen")))
    cloud = charts.predicted_and_true(long)
    dots = pd.DataFrame(cloud["layer"][1]["data"]["values"])
    assert dots["step"].nunique() == charts.MAX_CLOUDS
    assert dots.groupby("step").size().max() <= charts.MAX_DOTS
    assert "(133 of 200 probes drawn)" in cloud["title"]["text"]["expr"]
    force_map = maps.force_map(long)
    assert len({row["step"] for row in force_map["data"]["values"]}) == maps.MAX_MAPS
    assert "(10 of 30 steps drawn)" in force_map["title"]["text"]["expr"]


@pytest.mark.parametrize(
    "frame, missing",
    [
        (influence(updates=("batch",)), {"rank_matrix", "rank_line"}),
        (influence(updates=("chosen", "rejected")), set(CHARTS[2:6])),
        (influence(momentum=np.nan), {"step_parts"}),
        (influence(steps=(3,)), set(CHARTS) - {"force_map", "predicted_and_true"}),
    ],
    ids=["batch alone", "fixed alone", "no momentum", "one step"],
)  # fmt: skip
def test_what_was_not_recorded_is_not_drawn_and_the_rest_is(frame, missing, tmp_path):
    vl_convert = pytest.importorskip("vl_convert")
    run = write_influence(write_run(tmp_path / "run", records(types=TYPES, num_probes=12)), frame)
    specs = influence_charts(shown_from(run).subject)
    assert list(specs) == [name for name in CHARTS if name not in missing]
    for spec in specs.values():
        json.dumps(spec, allow_nan=False)
        assert vl_convert.vegalite_to_svg(spec | {"width": 400}, vl_version=VEGA_LITE).startswith("<svg")
    assert influence_note(shown_from(run).subject).startswith("Recorded at ")


def test_every_token_has_its_predicted_and_measured_change(page, frame):
    (entry,) = page.data["widgets"]["influence"]["series"]
    assert (entry["label"], entry["steps"], entry["total"]) == ("watched", [0, 30], 12)
    assert len(entry["probes"]) == 12 and EVIL.format(i=0) not in page.source
    batch = frame[(frame["update"] == "batch")].set_index(["step", "probe_id", "response_type"])
    last = batch.loc[30]
    moved = (last["true_sum"] / last["num_tokens"]).abs().groupby("probe_id").mean()
    assert [probe["id"] for probe in entry["probes"]] == list(moved.sort_values(ascending=False).index)
    for probe in entry["probes"]:
        assert [answer["type"] for answer in probe["answers"]] == list(TYPES)
        assert probe["prompt"] == "", "the answers recorded are not those of the tracked set"
        for answer in probe["answers"]:
            assert answer["tokens"] == [f" t{i}" for i in range(6)] and answer["left_out"] == 0
            for step, values in zip((0, 30), answer["steps"], strict=True):
                row = batch.loc[(step, probe["id"], answer["type"])]
                for index, column in enumerate(("predicted", "true")):
                    np.testing.assert_allclose(values[column], row[column], rtol=6e-3)
                    assert values["means"][index] == pytest.approx(row[f"{column}_sum"] / 6, rel=6e-3)


def test_strips_are_bounded_and_a_token_without_text_shows_its_id(tmp_path, monkeypatch):
    monkeypatch.setattr(strips, "MAX_TOKENS", 4)
    monkeypatch.setattr(strips, "MAX_PROBES", 3)
    frame = influence(num_probes=5)
    run = write_influence(write_run(tmp_path / "run", records(types=TYPES, num_probes=5)), frame)
    series = shown_from(run)
    (entry,) = strips.token_strips([series])
    answer = entry["probes"][0]["answers"][0]
    assert len(entry["probes"]) == 3 and entry["total"] == 5 and answer["left_out"] == 2
    assert len(answer["tokens"]) == len(answer["steps"][0]["true"]) == 4
    read = series.subject.read
    series.subject.read = lambda *args: read(*args).assign(
        **({"token_texts": [[""] * 6] * len(read(*args))} if len(args) > 1 else {})
    )
    assert strips.token_strips([series])[0]["probes"][0]["answers"][0]["tokens"][3] == "⟨3⟩"


def test_prompts_stand_by_the_answers_of_the_tracked_set(runs, tmp_path):
    frame = influence(num_probes=3)
    plain = records(types=TYPES, num_probes=3)
    answers = [f"{row.response_type} answer to {row.probe_id}" for row in frame.itertuples()]
    texts = [[answer[:4], *answer[4:8], answer[8:]] for answer in answers]
    run = write_influence(write_run(tmp_path / "run", plain, prompt="Question {i}?"), frame, texts)
    (entry,) = strips.token_strips([shown_from(run)])
    assert {probe["id"]: probe["prompt"] for probe in entry["probes"]} == {
        f"p00{i}": f"Question {i}?" for i in range(3)
    }


def test_prompts_stand_by_answers_whose_characters_are_split_over_tokens(tmp_path):
    frame = influence(num_probes=3, num_tokens=4)
    texts = [[f"{row.response_type} ans", "\ufffd", "\ufffd", "wer to nobody"] for row in frame.itertuples()]
    plain = records(types=TYPES, num_probes=3)
    run = write_influence(write_run(tmp_path / "run", plain, prompt="Q{i}?"), frame, texts)
    (entry,) = strips.token_strips([shown_from(run)])
    assert sorted(probe["prompt"] for probe in entry["probes"]) == ["Q0?", "Q1?", "Q2?"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", ["predicted", "true"])
@pytest.mark.parametrize("what", ["one", "last", "all"])
def test_what_is_not_finite_is_left_out_of_the_page(what, column, value, tmp_path):
    frame = influence(error=0.6, drift=0.3)
    hit = frame["step"] >= {"one": 30, "last": 30, "all": 0}[what]
    hit &= (frame["update"] == "batch") if column == "true" else True
    hit &= (frame["probe_id"] == "p000") & (frame["response_type"] == "chosen") if what == "one" else True
    plain = records(types=TYPES, num_probes=12)
    run = write_influence(write_run(tmp_path / "run", plain), set_value(frame, hit, column, value))
    page = Page(build_page([run], tmp_path / "report.html"))
    assert "steps have changes that are not finite" in page.text
    drawn = {key.removeprefix("s0-") for key in page.data["charts"]} & set(CHARTS)
    if what != "all":
        assert drawn == set(CHARTS)
    else:
        lost = {"predicted_and_true", "first_order_error", "accumulated"}
        assert drawn == (set(CHARTS) - lost if column == "true" else {"step_parts"}), "the parts are finite here"
    entries = strips.token_strips([shown_from(run)])
    assert [entry["steps"] for entry in entries] == {"one": [[0, 30]], "last": [[0, 20]], "all": []}[what]
    if what == "one":
        (probe,) = [probe for probe in entries[0]["probes"] if probe["id"] == "p000"]
        assert [answer["type"] for answer in probe["answers"]] == list(TYPES[1:])
        assert entries[0]["total"] == 12


def test_strips_of_answers_that_are_finite_at_one_step_only(tmp_path, monkeypatch):
    monkeypatch.setattr(strips, "MAX_PROBES", 2)
    frame = influence(num_probes=5)
    plain = records(types=TYPES, num_probes=5)
    whole = write_influence(write_run(tmp_path / "whole", plain), frame)
    shown = {probe["id"] for probe in strips.token_strips([shown_from(whole)])[0]["probes"]}
    hit = (frame["step"] == 0) & frame["probe_id"].isin(shown) & (frame["update"] == "batch")
    run = write_influence(write_run(tmp_path / "run", plain), set_value(frame, hit, "true", np.nan))
    (entry,) = strips.token_strips([shown_from(run)])
    assert {probe["id"] for probe in entry["probes"]} == shown and entry["limits"][0] == 1.0
    assert all(answer["steps"][0] is None for probe in entry["probes"] for answer in probe["answers"])


def test_a_run_that_recorded_influence_alone_has_a_page_of_it(runs, tmp_path):
    alone = write_alone(tmp_path / "alone", influence(error=0.6))
    single = Page(build_page([alone], tmp_path / "alone.html"))
    found = [attrs["id"] for tag, attrs in single.elements if tag == "section"]
    assert found == ["findings", "runs", "influence", "glossary"]
    assert "training steps are too large" in single.text and "4 steps, 12 probes" in single.text
    assert not [attrs for _, attrs in single.elements if attrs.get("href") in ("#paths", "#squeezing", "#probes")]
    both = Page(build_page([alone, runs["plain"]], tmp_path / "both.html"))
    assert [attrs["id"] for tag, attrs in both.elements if tag == "section"][2:5] == [
        "paths",
        "squeezing",
        "influence",
    ]
    assert "main chart of plain" in both.source and "s0-force_map" in both.data["charts"]
    assert [path.name for path in export.export_csv([alone], tmp_path)] == ["influence.csv"]
    assert {path.name for path in export.export_png([alone], tmp_path)} == {f"alone-{name}.png" for name in CHARTS}


def test_exports_have_influence(runs, tmp_path):
    pytest.importorskip("vl_convert")
    names = {path.name for path in export.export_png([runs["watched"]], tmp_path / "png")}
    assert {f"watched-{name}.png" for name in CHARTS} <= names
    written = export.export_csv(list(runs.values()), tmp_path / "csv")
    table = pd.read_csv(next(path for path in written if path.name == "influence.csv"))
    assert set(table["run"]) == {"watched"} and len(table) == 4 * 3 * 3
    assert "influence.csv" not in {path.name for path in export.export_csv([runs["plain"]], tmp_path / "none")}


def test_curves_have_a_gap_where_changes_are_not_finite():
    frame, steps = influence(steps=(0, 10, 20, 30, 40)), (0, 10, 20, 30, 40)
    for column, batch_only in (("true", True), ("predicted", False)):
        hit = (frame["step"] == 20) & ((frame["update"] == "batch") | (not batch_only))
        summary = summary_of(set_value(frame, hit, column, np.nan))
        together = charts.first_order_error(summary)["layer"][1]["data"]["values"]
        assert [(row["step"], row["value"] is None) for row in together] == [(step, step == 20) for step in steps]
        rows = charts.accumulated(summary)["data"]["values"]
        assert {row["step"] for row in rows if row["value"] is None} == {21}
    ranks = charts.rank_line(summary)["data"]["values"]
    assert [row["step"] for row in ranks] == list(steps[1:])
    assert [row["step"] for row in ranks if row["value"] is None] == [20, 30], "the stretches to and from step 20"
