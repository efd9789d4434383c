"""The one judge: every finding that the records of a store support, over all chapters.

The end of training, `trl-dynamics diagnose`, the report and the quickstart all ask here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from trl_dynamics import chapters
from trl_dynamics.findings.chapter import Chapter, Comparison, Overview
from trl_dynamics.findings.finding import Finding, by_severity
from trl_dynamics.findings.rules import Run, found_by
from trl_dynamics.store.store import DynamicsStore


@dataclass(frozen=True)
class Judged:
    """What one chapter says of one model; findings are computed when they are asked for.

    Args:
        model (`str`): As in the records.
        chapter ([`Chapter`]): Whose rules judge.
        subject: What the chapter made of the model's rows.
        run ([`Run`]): What the rules know of the run.
    """

    model: str
    chapter: Chapter
    subject: object
    run: Run

    @cached_property
    def findings(self) -> list[Finding]:
        """The most severe first."""
        return found_by(self.chapter.rules.values(), self.subject, self.run)

    @cached_property
    def overview(self) -> Overview:
        return self.chapter.overview(self.subject)


def judge(store: DynamicsStore) -> list[Judged]:
    """Every chapter that has something to say of a store, model by model; empty where nothing was recorded.

    Args:
        store ([`DynamicsStore`]): Of one run, finished or not.

    Raises:
        ValueError: If records are damaged, or of a newer version.
        OSError: If they cannot be read.
    """
    meta = store.read_meta()
    return [
        Judged(model, chapter, subject, Run.of(meta, model))
        for chapter in chapters.load_all()
        for model, subject in chapter.open(store).items()
    ]


def by_model(judged: Iterable[Judged]) -> dict[str, list[Judged]]:
    """What all chapters say of each model, in their order."""
    models: dict[str, list[Judged]] = {}
    for one in judged:
        models.setdefault(one.model, []).append(one)
    return models


def findings_of(judged: Iterable[Judged]) -> list[Finding]:
    """The findings of several chapters as one list, the most severe first."""
    return by_severity(finding for one in judged for finding in one.findings)


def calm_of(judged: Iterable[Judged]) -> str:
    """What it means that no rule of any chapter fired: what the first says that could judge changes."""
    overviews = [one.overview for one in judged]
    return next((one for one in overviews if not one.lack), overviews[0]).calm


def summary_text(findings: list[Finding], run_name: str, calm: str) -> str:
    """One console line per finding, or one sentence that there is none; `calm` says what that means."""
    lines = [f"{run_name}: {f.severity}: {f.title}. {f.text}" for f in findings]
    return "\n".join(lines) or f"{run_name}: no finding: {calm}."


def compare(runs: Mapping[str, Iterable[Judged]]) -> list[Comparison]:
    """Where runs differ from the first one, by every chapter that compares and that several of them have.

    Args:
        runs (`Mapping[str, Iterable[Judged]]`): Label -> what was judged of one model; the first one is the reference.
    """
    found = []
    for chapter in chapters.load_all():
        subjects = {
            label: one.subject for label, judged in runs.items() for one in judged if one.chapter.name == chapter.name
        }
        if chapter.compare is not None and len(subjects) > 1:
            found.append(chapter.compare(subjects))
    return found
