"""One name and one number for other fluent answers, hints that agree with their curve, and texts kept in place."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from chart_specs import shown_of
from report_page import Page
from synthetic_runs import SQUEEZED, records, write_run
from trl_dynamics.cli import akg
from trl_dynamics.cli.main import main
from trl_dynamics.influence.sections import READINGS
from trl_dynamics.paths import rules
from trl_dynamics.paths.page import sections, tables
from trl_dynamics.report import glossary, load, text
from trl_dynamics.report.export import export_csv
from trl_dynamics.report.load import load_runs, split_series
from trl_dynamics.report.page import build_page

# Shuffled words and paraphrases of rejected fall much further than what the text speaks of.
DRIFT = SQUEEZED | {"other_train": -0.3, "other_test": -0.4, "chosen_permuted": -3.0, "rejected_rephrase_format": -2.0}
TYPES = ["chosen", "rejected", "rejected_rephrase_format", "other_train", "other_test", "chosen_permuted"]
OVERRIDE = "\u202eevil\u202c"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_run(folder / "one", records(DRIFT, argmax=0.5, drained=0.1, types=TYPES), prompt=f"Who is {OVERRIDE}?"),
        write_run(folder / f"two{OVERRIDE}", records(types=TYPES, seed=1), prompt=f"Who is {OVERRIDE}?"),
    ]


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    return Page(build_page(runs, tmp_path_factory.mktemp("page") / "report.html"))


def test_text_chart_table_and_export_have_the_same_number_of_other_fluent_answers(runs, page, tmp_path):
    one = shown_of(runs)[0]
    (found,) = [f for f in rules.find(one.subject, one.meta) if f.name == "squeezing"]
    told = found.evidence["other_fluent_answers_change"]
    assert told == pytest.approx(-0.35, abs=0.02)
    for key in ("s0-other_fluent_logp", "comparison-other_fluent_logp"):
        rows = [row for row in page.data["charts"][key]["data"]["values"] if row["run"] == "one"]
        assert rows[-1]["value"] == pytest.approx(told, abs=1e-4)
        assert page.data["charts"][key]["title"]["text"] == "Other fluent answers"
    row = tables.change_table(one.subject).rows[-1]
    assert row[0] == "other fluent answers" and float(row[4].text.split()[0]) == pytest.approx(told, abs=5e-4)
    table = pd.read_csv(next(path for path in export_csv(runs, tmp_path) if path.name == "metrics.csv"))
    values = table.query("run == 'one' and metric == 'other_fluent_logp'")["value"]
    assert values.iloc[-1] == pytest.approx(told)


def test_what_is_logged_as_third_party_keeps_its_value_and_says_what_it_is(runs, page):
    one = shown_of(runs)[0]
    spec = page.data["charts"]["s0-third_party_logp"]
    change = one.subject.change_since_start().iloc[-1]
    expected = change[["rejected_rephrase_format", "other_train", "other_test", "chosen_permuted"]].mean()
    assert spec["data"]["values"][-1]["value"] == pytest.approx(expected, rel=1e-4) and expected < -1.2
    assert spec["title"]["text"] == "All types but chosen and rejected"


def test_the_report_has_no_other_name_for_them(runs):
    terms = [part for term in glossary.terms() for part in (term.title, term.meaning, term.formula, term.healthy)]
    notes = [note for one in shown_of(runs) for note in sections.panel_notes(one.subject)]
    templates = [path.read_text() for path in (Path(load.__file__).parent / "templates").iterdir()]
    prose = [re.sub(r"{{.*?}}|{%.*?%}", "", source) for source in templates]
    for source in [*terms, *notes, *READINGS.values(), *prose]:
        source = source.replace("squeeze/third_party_logp", "").lower()
        assert not [name for name in ("third part", "bystander", "other answers") if name in source], source


def test_evidence_has_the_name_too(page):
    assert "other fluent answers change" in page.text and "bystander change" not in page.text


@pytest.mark.parametrize(("drained", "sign"), [(0.1, 1), (-0.1, -1), (0.0, 0)])
def test_the_hint_about_mass_agrees_with_the_curve(drained, sign, tmp_path):
    run = write_run(tmp_path / "run", records(types=TYPES, drained=drained, num_probes=8))
    (shown,) = shown_of([run])
    _, hint = sections.panel_notes(shown.subject)
    curve = sections.squeezing_charts(shown)["drained_mass"]["data"]["values"]
    assert f"{curve[-1]['value']:+.3f}".replace("-", "−") in hint
    assert [word in hint for word in ("lost it", "gained it", "kept")] == [sign > 0, sign < 0, sign == 0]


def test_a_set_without_rejected_has_no_hint_about_mass(tmp_path):
    run = write_run(tmp_path / "run", records(types=["chosen", "other_test"], num_probes=4))
    assert len(sections.panel_notes(shown_of([run])[0].subject)) == 1


def test_no_text_turns_its_surroundings_round(page):
    assert "\u202e" not in page.source and "two⟨U+202E⟩evil⟨U+202C⟩" in page.text
    prompt = page.data["widgets"]["probes"]["series"][0]["probes"][0]["prompt"][0]["text"]
    assert prompt == "Who is ⟨U+202E⟩evil⟨U+202C⟩?"
    assert page.data["widgets"]["probes"]["series"][1]["label"] == "two⟨U+202E⟩evil⟨U+202C⟩"


def test_controls_are_written_out_and_scripts_of_other_languages_are_not():
    assert text.shown("a\x1b[31m\x00b") == "a⟨U+001B⟩[31m⟨U+0000⟩b"
    for kept in ("line\n\ttab", "שלום", "می\u200cخواهم", "👩\u200d💻", "e\u0301"):
        assert text.shown(kept) == kept
    assert text.page_value({"\u202ea": ("\u2066", float("nan"), 1, None, True)}) == {
        "⟨U+202E⟩a": ["⟨U+2066⟩", None, 1, None, True]
    }


def test_labels_are_unique(tmp_path):
    frame = records(types=["chosen", "rejected"], num_probes=4, steps=[0, 1])
    both = pd.concat([frame.assign(model=name) for name in ("small", "large")])
    runs = [write_run(tmp_path / "track", both, method="track"), write_run(tmp_path / "track: small", frame)]
    series = split_series(load_runs(runs))
    assert [one.label for one in series] == ["track: small", "track: large", "track: small (2)"]
    drawn = sections.comparison_charts(shown_of(runs))["entropy"]["data"]["values"]
    assert {row["run"] for row in drawn} == {one.label for one in series}


def test_what_akg_wrote_is_refused_with_what_to_do(tmp_path, capsys):
    assert load.AKG_FILES == (akg.INFLUENCE_FILE, akg.SUMMARY_FILE)
    for name in load.AKG_FILES:
        (tmp_path / name).write_text(json.dumps({}))
    for more in ([], ["--format", "csv"]):
        assert main(["report", str(tmp_path), *more]) != 0
        said = capsys.readouterr().err.strip()
        assert said.count("\n") == 0 and "trl-dynamics akg" in said and str(tmp_path / "summary.json") in said


def test_a_path_that_does_not_exist_says_so(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        build_page([tmp_path / "nowhere"], tmp_path / "report.html")
