"""A subject that the package does not know: one line in the registry, and page, exports and `diagnose` have it."""

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest

import trl_dynamics
from report_page import Page
from synthetic_runs import records, write_run
from trl_dynamics import chapters
from trl_dynamics.cli.main import main
from trl_dynamics.drawing.lines import metric_by_run
from trl_dynamics.drawing.section import Card, Panel, Section, Sections, Shown, Table, as_frame
from trl_dynamics.drawing.terms import Term
from trl_dynamics.findings.chapter import Chapter, Overview
from trl_dynamics.findings.finding import WARNING, Finding
from trl_dynamics.findings.rules import Run, rule
from trl_dynamics.findings.verdicts import judge
from trl_dynamics.report import export
from trl_dynamics.report.page import build_page
from trl_dynamics.store.kind import Kind
from trl_dynamics.store.store import DynamicsStore

HOT = 30.0
HEAT = Kind("heat", keys=("model", "step"), columns={"degrees": "temperature, degrees"})


def heat(store: DynamicsStore) -> dict[str, pd.Series]:
    """Model -> temperature over the steps, in degrees."""
    rows = store.read(HEAT)
    return {str(model): own.set_index("step")["degrees"] for model, own in rows.groupby("model")}


@rule(overheated=WARNING)
def overheated(degrees: pd.Series, run: Run) -> Finding | None:
    """It became hotter than it should."""
    if degrees.max() <= HOT:
        return None
    at = int(degrees.idxmax())
    return Finding("overheated", WARNING, "too hot", f"At step {at} it was hot.", {"degrees": float(degrees.max())})


def draw(shown: list[Shown], looks) -> list[Section]:
    panels = [
        Panel(
            {"heat": metric_by_run({one.label: one.subject}, "Heat", "degrees", looks=looks)},
            one.label,
            one.key,
            tables=[Table("hottest", ["model", "degrees"], [[one.model, f"{one.subject.max():.1f}"]])],
        )
        for one in shown
    ]
    return [Section("toy", "Heat of the machine", "heat", "How hot it was.", panels)]


def card(meta: Mapping, subjects: Mapping[str, pd.Series]) -> Card:
    return Card([("Thermometer", f"{len(degrees)} readings") for degrees in subjects.values()])


SECTIONS = Sections(
    draw=draw,
    frames=lambda shown: {"heat": pd.concat(as_frame(one, one.subject.reset_index()) for one in shown)},
    card=card,
    words=[Term("degree", "A step of a thermometer.")],
)
CHAPTER: Chapter[pd.Series] = Chapter(
    name="toy",
    kinds=(HEAT,),
    open=heat,
    rules={"overheated": overheated},
    overview=lambda degrees: Overview(f"{len(degrees)} temperatures", "it stayed cool"),
    sections=f"{__name__}:SECTIONS",
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The one line that a new subject needs."""
    monkeypatch.setitem(chapters.CHAPTERS, "toy", f"{__name__}:CHAPTER")


def write_heat(run: Path, degrees: list[float]) -> str:
    with DynamicsStore(run) as store:
        for step, value in enumerate(degrees):
            store.write(step, {HEAT: HEAT.table({"model": ["policy"], "step": [step], "degrees": [value]})})
    return str(run)


@pytest.fixture
def hot(tmp_path) -> str:
    """A run that has records of a probe set, which say nothing, and temperatures."""
    run = write_run(tmp_path / "hot", records(num_probes=4, types=["chosen", "rejected"]))
    return write_heat(run, [20.0, 41.5, 30.0])


@pytest.fixture
def cool(tmp_path) -> str:
    """A run that has temperatures alone."""
    DynamicsStore(tmp_path / "cool").create({"method": "dpo", "status": "finished"}, {}, {})
    return write_heat(tmp_path / "cool", [20.0, 21.0])


def test_its_finding_is_in_json_and_in_the_exit_status(hot, cool, capsys):
    assert main(["diagnose", hot, "--fail_on", "warning"]) == 20
    capsys.readouterr()
    assert main(["diagnose", hot, cool, "--format", "json", "--fail_on", "warning"]) == 20
    runs = {one["run"]: one for one in json.loads(capsys.readouterr().out)["runs"]}
    assert [(one["name"], one["severity"]) for one in runs["hot"]["findings"]] == [("overheated", "warning")]
    assert runs["hot"]["findings"][0]["evidence"] == {"degrees": 41.5}
    assert runs["cool"]["findings"] == [] and runs["cool"]["steps"] == []
    assert main(["diagnose", cool, "--fail_on", "info"]) == 0
    assert "2 temperatures" in (said := capsys.readouterr().out) and "it stayed cool" in said


def test_it_is_on_the_page(hot, cool, tmp_path):
    page = Page(build_page([hot, cool], tmp_path / "report.html"))
    assert "toy" in [attrs.get("id") for tag, attrs in page.elements if tag == "section"]
    assert "#toy" in [attrs.get("href") for _, attrs in page.elements]
    drawn = [[row["value"] for row in page.data["charts"][f"s{index}-heat"]["data"]["values"]] for index in (0, 1)]
    assert drawn == [[20.0, 41.5, 30.0], [20.0, 21.0]]
    for text in ("too hot", "41.5", "3 readings", "2 readings", "A step of a thermometer.", "it stayed cool"):
        assert text in page.text


def test_it_is_in_tables_and_pictures(hot, cool, tmp_path):
    written = {path.name: path for path in export.export_csv([hot, cool], tmp_path / "csv")}
    assert set(written) == {"paths.csv", "metrics.csv", "heat.csv"}
    table = pd.read_csv(written["heat.csv"])
    assert list(table.columns) == ["run", "model", "step", "degrees"]
    assert table["degrees"].tolist() == [20.0, 41.5, 30.0, 20.0, 21.0]
    assert [path.name for path in export.export_png([cool], tmp_path / "png")] == ["cool-heat.png"]


def test_a_chapter_without_rows_of_its_own_says_nothing(tmp_path):
    plain = write_run(tmp_path / "plain", records(num_probes=4, types=["chosen", "rejected"]))
    assert [one.chapter.name for one in judge(DynamicsStore(plain))] == ["paths"]


def test_rules_are_computed_once_and_give_what_they_declare():
    asked = []

    @rule(one=WARNING)
    def first(subject: object, run: Run) -> Finding | None:
        asked.append(run)
        return Finding("one", WARNING, "one", "One.")

    run = Run()
    assert first("a subject", run) is first("a subject", run) and asked == [run]
    first("a subject", Run())
    assert len(asked) == 2, "another judgement asks again"
    with pytest.raises(AssertionError):
        rule(other=WARNING)(lambda subject, run: Finding("one", WARNING, "one", "One."))("a subject", run)
    for chapter in chapters.load_all():
        for name, declared in chapter.rules.items():
            assert declared.gives and declared.function.__doc__, name


ROOT = Path(trl_dynamics.__file__).parent
# What must not know a subject: rooms and files.
BLIND = ("findings", "drawing", "report", "tracking/alerts.py", "cli/diagnose.py", "cli/report.py")
# `trl-dynamics akg` leaves these files in a folder that is no run; the picture of one step is a lesson, not a report.
APART = {"report/load.py": {"influence"}, "report/squeeze_demo.py": {"squeezing"}}


def subjects_words() -> set[str]:
    """Names of subjects, of their findings, metrics and kinds of rows, and columns of the latter."""
    from trl_dynamics.paths.metrics import METRICS
    from trl_dynamics.paths.samples import SAMPLE_METRICS

    known = [chapters.load(where) for name, where in chapters.CHAPTERS.items() if name != "toy"]
    words = {name for chapter in known for rule in chapter.rules.values() for name in rule.gives}
    words |= {column for chapter in known for kind in chapter.kinds for column in kind.values}
    words |= {*METRICS, *SAMPLE_METRICS}
    # Words that are common English, or keys of the trainer's own log.
    words -= {"entropy", "margin", "length", "ended", "lr", "grad_norm"}
    return words | {"influence", "samples"}


def test_what_serves_all_subjects_names_none():
    files = [path for place in BLIND for path in ([ROOT / place] if "." in place else (ROOT / place).glob("*.py"))]
    assert len(files) > 20
    for name in ("report.html.j2", "page.js", "page.css"):
        assert not set(re.findall(r"\w+", (ROOT / "report/templates" / name).read_text())) & subjects_words(), name
    for path in files:
        place = str(path.relative_to(ROOT))
        names = {word for text in strings_and_names(path.read_text()) for word in re.findall(r"\w+", text)}
        assert names & subjects_words() <= APART.get(place, set()), place
        assert not re.search(r"from trl_dynamics\.(paths|influence)\b", path.read_text()), place


def strings_and_names(source: str) -> list[str]:
    """Identifiers and strings of a module, without its docstrings."""
    found, tree = [], ast.parse(source)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            found.append(node.value)
        elif isinstance(node, ast.Name):
            found.append(node.id)
        elif isinstance(node, ast.Attribute):
            found.append(node.attr)
    return found
