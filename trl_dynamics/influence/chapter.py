"""The chapter of recorded influence: what single steps were predicted to do, and did."""

from trl_dynamics.findings.chapter import Chapter, Overview
from trl_dynamics.influence.kind import INFLUENCE
from trl_dynamics.influence.rules import RULES, calm_text
from trl_dynamics.influence.summary import InfluenceSummary, summarise_influence


def overview(influence: InfluenceSummary) -> Overview:
    """At which steps influence was recorded of a model."""
    steps = influence.steps
    where = f"{len(steps)} steps, {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"one step ({steps[0]})"
    return Overview(f"influence of {where}", calm_text(influence))


CHAPTER: Chapter[InfluenceSummary] = Chapter(
    name="influence",
    kinds=(INFLUENCE,),
    open=summarise_influence,
    rules=RULES,
    overview=overview,
    sections="trl_dynamics.influence.sections:SECTIONS",
)
