"""Greedy answers on the page: charts, texts at three steps, and nothing where none were asked for."""

import json

import pandas as pd
import pytest

from chart_specs import shown_of
from report_page import EVIL, Page
from synthetic_answers import answers
from synthetic_runs import SQUEEZED, STEPS, records, write_run
from trl_dynamics.paths.page.explorer import MAX_PROBES, explorer
from trl_dynamics.paths.page.sections import sample_charts
from trl_dynamics.paths.samples import SAMPLE_METRICS, Samples
from trl_dynamics.report import export
from trl_dynamics.report.page import build_page

ASKED = {"num_probes": 8, "max_new_tokens": 32, "prompts_cut": 0, "fingerprint": "ab" * 32}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    frame = records(SQUEEZED, types=["chosen", "rejected", "other_test"], num_probes=12)
    evil = EVIL.replace("{i}", "{step}")
    return {
        "looping": write_run(folder / "looping", frame, answers=answers(0.9, text=evil), samples=ASKED),
        "plain": write_run(folder / "plain", frame),
    }


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    return Page(build_page(list(runs.values()), tmp_path_factory.mktemp("page") / "report.html"))


def test_the_page_shows_the_answers_of_the_run_that_has_some(page):
    found = [attrs["id"] for tag, attrs in page.elements if tag == "section"]
    assert found[3:6] == ["squeezing", "answers", "training"]
    assert "8 prompts, at most 32 tokens" in page.text and "degeneration: the model" in page.text
    drawn = [key for key in page.data["charts"] if "-answers_" in key and key.startswith("s")]
    assert drawn == [f"s0-answers_{name}" for name in SAMPLE_METRICS]
    for term in SAMPLE_METRICS.values():
        assert term.meaning in page.text


def test_a_page_without_answers_has_no_place_for_them(runs, tmp_path):
    plain = Page(build_page([runs["plain"]], tmp_path / "report.html"))
    assert "answers" not in [attrs.get("id") for tag, attrs in plain.elements if tag == "section"]
    assert not [key for key in plain.data["charts"] if "answers" in key]
    assert all(probe["answers"] == [] for probe in plain.data["widgets"]["probes"]["series"][0]["probes"])


def test_charts_draw_the_metrics(page):
    curve = Samples(answers(0.9)).metric("distinct_2")
    for key in ("s0-answers_distinct_2", "comparison-answers_distinct_2"):
        rows = page.data["charts"][key]["data"]["values"]
        assert {row["step"]: row["value"] for row in rows} == pytest.approx(curve.to_dict(), rel=1e-4)


def test_answers_of_three_steps_are_read_as_text_only(runs, page):
    assert len([tag for tag, _ in page.elements if tag == "script"]) == 3
    assert EVIL.format(i=0) not in page.source
    probes = page.data["widgets"]["probes"]["series"][0]["probes"]
    assert [bool(probe["answers"]) for probe in probes] == [True] * 8 + [False] * 4
    given = probes[1]["answers"]
    written = answers(0.9, text=EVIL.replace("{i}", "{step}")).query("probe_id == 'p001'").set_index("step")
    assert [answer["step"] for answer in given] == [STEPS[0], STEPS[3], STEPS[-1]]
    for answer in given:
        row = written.loc[answer["step"]]
        assert answer["text"] == row["text"] and answer["tokens"] == row["num_tokens"]
        assert (answer["ended"], answer["repeat"]) == (row["ended"], row["longest_repeat"])
        assert answer["logp"] == pytest.approx(row["logp_mean"], abs=6e-4)


def test_probes_with_answers_are_kept_where_the_page_leaves_some_out(tmp_path):
    frame = records(types=["chosen", "rejected"], num_probes=MAX_PROBES + 7, steps=[0, 1])
    late = answers(steps=[0, 1], num_probes=2, start=0, end=0)
    late["probe_id"] = late["probe_id"].map({"p000": "p104", "p001": "p100"})
    one = explorer(shown_of([write_run(tmp_path / "run", frame, answers=late)]))["series"][0]
    ids = [probe["id"] for probe in one["probes"]]
    assert len(ids) == MAX_PROBES and ids == sorted(ids) and {"p100", "p104"} <= set(ids) and "p099" not in ids
    kept = next(probe for probe in one["probes"] if probe["id"] == "p104")
    assert [(answer["step"], answer["logp"]) for answer in kept["answers"]] == [(0, None), (1, None)]
    json.dumps(one, allow_nan=False)


def test_one_step_has_texts_and_no_curves(tmp_path):
    frame = records(types=["chosen", "rejected"], num_probes=4, steps=[0])
    run = write_run(tmp_path / "run", frame, answers=answers(steps=[0], num_probes=4))
    (shown,) = shown_of([run])
    assert sample_charts(shown) == {}
    assert len(explorer([shown])["series"][0]["probes"][0]["answers"]) == 1


def test_tables_hold_the_metrics(runs, tmp_path):
    export.export_csv(list(runs.values()), tmp_path)
    table = pd.read_csv(tmp_path / "metrics.csv")
    rows = table[table["metric"] == "samples/distinct_2"]
    assert set(rows["run"]) == {"looping"}
    assert rows.set_index("step")["value"].to_dict() == pytest.approx(
        Samples(answers(0.9)).metric("distinct_2").to_dict()
    )
