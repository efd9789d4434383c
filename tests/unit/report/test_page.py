"""The page: complete, offline, and deaf to what probe texts try."""

import json
import re
import subprocess
import sys

import pandas as pd
import pytest

from chart_specs import shown_of
from report_page import EVIL, Page
from synthetic_runs import ALL_TYPES, SFT, SQUEEZED, probe_set, records, write_run
from trl_dynamics.paths.metrics import METRICS
from trl_dynamics.paths.page import charts
from trl_dynamics.paths.page.explorer import MAX_PROBES, MAX_STEPS, explorer
from trl_dynamics.paths.records import read_records
from trl_dynamics.report import cards, extra, load
from trl_dynamics.report.page import build_page, inline_json
from trl_dynamics.store.store import DynamicsStore


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    missing = ("chosen_self_rephrase",)
    strong = records(SQUEEZED, argmax=0.5, drained=0.1, missing=missing)
    mild = records({name: value / 2 for name, value in SQUEEZED.items()}, argmax=0.2, seed=1, missing=missing)
    return {
        "strong": write_run(folder / "strong", strong, prompt=EVIL),
        "mild": write_run(folder / "mild", mild, prompt=EVIL),
        "sft": write_run(folder / "sft", records(SFT), method="sft"),
    }


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    return Page(build_page([runs["strong"], runs["mild"]], tmp_path_factory.mktemp("page") / "deep" / "report.html"))


def test_page_says_what_was_found(page):
    assert "squeezing: probability moves" in page.text and "the gap between them +0.65" in page.text
    assert "harmful displacement" in page.text
    assert "What to do." in page.text and "widens by at least 0.05, and chosen or other fluent answers" in page.text


def test_page_has_its_sections_in_order(page):
    found = [attrs["id"] for tag, attrs in page.elements if tag == "section"]
    assert found == ["findings", "runs", "paths", "squeezing", "training", "probes", "comparison", "glossary"]


def test_page_has_the_run_card(page):
    for text in ("float32, sdpa", "1,234,567 parameters", "beta = 0.1", "4.2% of 300 s", "trl 1.16.0", "42"):
        assert text in page.text


def test_page_compares_two_runs(page):
    assert "Compared with strong" in page.text
    assert re.search(r"mild: other fluent answers 0\.40 nats per token higher than in strong", page.text)
    compared = page.data["charts"]["comparison-third_party_logp"]
    assert {row["run"] for row in compared["data"]["values"]} == {"strong", "mild"}


def test_page_fetches_nothing(page):
    fetching = [(tag, attrs) for tag, attrs in page.elements for name in ("src", "href", "action") if name in attrs]
    for tag, attrs in fetching:
        assert (attrs.get("src") or attrs.get("href", "")).startswith(("data:", "#")), (tag, attrs)
    policy = next(attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv"))
    assert "default-src 'none'" in policy and "http" not in policy
    library = max(page.scripts, key=len)
    ours = page.source.replace(library, "")
    assert set(re.findall(r"https?://[^\s\"'<]+", ours)) == {
        "https://vega.github.io/schema/vega-lite/v6.json",
        "http://www.w3.org/2000/svg",
    }


def test_probe_text_is_inert(page):
    scripts = [attrs for tag, attrs in page.elements if tag == "script"]
    assert len(scripts) == 3 and len(page.scripts) == 3
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert EVIL.format(i=0) not in page.source
    prompt = page.data["widgets"]["probes"]["series"][0]["probes"][0]["prompt"]
    assert prompt == [{"role": "", "text": EVIL.format(i=0)}]


def test_type_and_run_names_are_inert_too(tmp_path):
    evil_type = "x</noscript></script><script>alert(1)</script>"
    run = write_run(tmp_path / "<b>run", records({evil_type: 0.5}, types=["chosen", "rejected", evil_type]))
    page = Page(build_page([run], tmp_path / "report.html"))
    assert len([tag for tag, _ in page.elements if tag == "script"]) == 3
    assert "<b>run" not in page.source and evil_type not in page.source
    assert evil_type in page.text and "<b>run" in page.text


def test_inlined_json_cannot_end_its_element():
    value = {"a": "</script><!--&", "b": [1, None, "\u2028é"]}
    assert not set("<>&") & set(inline_json(value)) and json.loads(inline_json(value)) == value
    with pytest.raises(ValueError):
        inline_json({"a": float("nan")})


def test_explorer_holds_texts_and_paths(runs):
    series = shown_of([runs["sft"]])
    one = explorer(series)["series"][0]
    assert one["total"] == len(one["probes"]) == 24
    probe = one["probes"][1]
    assert probe["prompt"] == [{"role": "user", "text": "What did question 1 ask?"}]
    chosen = probe["responses"][0]
    frame = read_records(DynamicsStore(runs["sft"]))
    rows = frame[(frame["probe_id"] == "p001") & (frame["response_type"] == "chosen")].sort_values("step")
    assert chosen["type"] == "chosen" and chosen["text"] == "chosen answer to p001"
    assert chosen["tokens"] == rows["num_tokens"].iloc[0]
    assert chosen["path"] == pytest.approx(rows["logp_mean"].tolist(), abs=6e-4)
    assert one["probes"][3]["responses"][0]["cut"]


def test_explorer_is_capped_and_says_so(tmp_path):
    frame = records(types=["chosen", "rejected"], num_probes=MAX_PROBES + 7, steps=[0, 1])
    one = explorer(shown_of([write_run(tmp_path / "run", frame)]))["series"][0]
    assert len(one["probes"]) == MAX_PROBES and one["total"] == MAX_PROBES + 7


def test_a_page_that_leaves_out_steps_says_so(page, tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "MAX_POINTS", 60)
    frame = records(types=["chosen", "rejected"], num_probes=5, steps=range(100))
    long = Page(build_page([write_run(tmp_path / "long", frame)], tmp_path / "report.html"))
    assert "The learning paths draw 30 of the 100 recorded steps" in long.text
    assert len({row["step"] for row in long.data["charts"]["s0-learning_paths"]["data"]["values"]}) == 30
    one = long.data["widgets"]["probes"]["series"][0]
    assert len(one["steps"]) == len(one["probes"][0]["responses"][0]["path"]) == MAX_STEPS and one["recorded"] == 100
    assert "The learning paths draw" not in page.text


def test_types_that_probes_lack_are_absent_in_the_explorer(runs):
    probes = explorer(shown_of([runs["strong"]]))["series"][0]["probes"]
    have = [any(r["type"] == "chosen_self_rephrase" for r in probe["responses"]) for probe in probes]
    assert have == [index % 2 == 0 for index in range(len(probes))]


def test_single_step_of_several_models(tmp_path):
    frames = [records(steps=[0], model=name, seed=seed, num_probes=4) for seed, name in enumerate(["small", "large"])]
    run = write_run(tmp_path / "track", pd.concat(frames), method="track")
    page = Page(build_page([run], tmp_path / "report.html"))
    assert "track: small" in page.text and "track: large" in page.text
    assert "One step was scored" in page.text and "no common step after the start" in page.text
    assert set(page.data["charts"]) == {"s0-levels", "s1-levels", "comparison-levels_at_end"}


def test_custom_types_only(tmp_path):
    run = write_run(tmp_path / "custom", records({"good": 0.5}, types=["good", "bad"], num_probes=5))
    page = Page(build_page([run], tmp_path / "report.html"))
    assert "no finding" in page.text
    assert [key for key in page.data["charts"] if key.startswith("s0")] == [
        "s0-learning_paths",
        "s0-levels",
        "s0-other_fluent_logp",
        "s0-third_party_logp",
    ]


def test_an_old_store_with_little_meta_still_gives_a_page(tmp_path):
    frame = records(num_probes=4)
    run = write_run(tmp_path / "old", frame)
    probes = probe_set(frame)
    DynamicsStore(run).write_meta({"probe_set": {"fingerprint": probes.fingerprint}})
    for name in ("config.yaml", "trainer_log.json"):
        (run / "dynamics" / name).unlink()
    page = Page(build_page([run], tmp_path / "report.html"))
    assert page.text.count("not recorded") > 8 and "training" not in [a.get("id") for _, a in page.elements]


def test_run_card_says_what_was_cut_and_dropped(runs):
    run = load.load_runs([runs["strong"]])[0]
    (table,) = cards.run_card(run).tables
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert list(rows) == list(ALL_TYPES)
    assert rows["chosen_self_rephrase"]["dropped when blank"] == 3 and rows["chosen_self_rephrase"]["probes"] == 12
    assert rows["chosen"]["responses cut"] == 1 and rows["chosen"]["group"] == "in distribution"


def test_a_running_run_says_so(tmp_path):
    run = write_run(tmp_path / "run", records(num_probes=4), status="running")
    assert "written so far" in dict(cards.run_card(load.load_runs([run])[0]).rows)["Status"]


def test_runs_of_other_probe_sets_are_not_compared_by_probe(runs, tmp_path):
    other = write_run(tmp_path / "other", records(SFT))
    page = Page(build_page([runs["strong"], other], tmp_path / "report.html"))
    assert "other was not compared probe by probe: another probe set" in page.text


def test_runs_are_compared_with_the_first_of_their_method(runs, tmp_path):
    page = Page(build_page([runs["sft"], runs["strong"], runs["mild"]], tmp_path / "report.html"))
    assert "Compared with strong" in page.text and "Compared with sft" not in page.text


def test_runs_of_other_tokenizers_are_not_compared_by_probe(tmp_path):
    frame = records(num_probes=5)
    longer = frame.assign(num_tokens=frame["num_tokens"] + 1)
    page = Page(
        build_page([write_run(tmp_path / "a", frame), write_run(tmp_path / "b", longer)], tmp_path / "report.html")
    )
    assert "b was not compared probe by probe: another tokenizer" in page.text


def test_every_metric_is_in_the_glossary(page):
    for term in METRICS.values():
        assert term.formula and term.unit and term.healthy and term.meaning in page.text


def test_scripts_off_leaves_a_picture(page):
    picture = next(attrs["src"] for tag, attrs in page.elements if tag == "img")
    assert picture.startswith("data:image/svg+xml;base64,") and "<noscript>" in page.source


def test_missing_extra_is_one_clear_line():
    code = (
        "import sys; sys.modules['vl_convert'] = None\n"
        "from trl_dynamics.report.page import build_page\n"
        "try:\n    build_page(['nowhere'], 'x.html')\n"
        "except ImportError as error:\n    print(type(error).__name__, error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("ReportExtraMissing") and said.rstrip().endswith("pip install 'trl-dynamics[report]'")
    assert said.count("\n") == 1 and issubclass(extra.ReportExtraMissing, ImportError)


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no dynamics/ folder"):
        build_page([tmp_path], tmp_path / "report.html")
