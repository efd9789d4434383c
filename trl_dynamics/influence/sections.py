"""Recorded influence on a page: its section, table, card rows and terms."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pandas as pd

from trl_dynamics.drawing.section import PAIRS, Card, Panel, Section, Sections, Shown, Widget, as_frame
from trl_dynamics.drawing.style import ALONE, Looks, type_colors
from trl_dynamics.drawing.terms import Term
from trl_dynamics.drawing.text import joined
from trl_dynamics.influence import charts, maps
from trl_dynamics.influence.kind import BATCH
from trl_dynamics.influence.rules import MAX_ROUNDING, judged_steps
from trl_dynamics.influence.strips import token_strips
from trl_dynamics.influence.summary import InfluenceSummary

HINT = (
    "At some steps it was predicted, from gradients and before the step was taken, by how much the log-probability of "
    "every probe's answers would change, and measured afterwards. All values are nats per token of an answer, means "
    "over probes unless a dot is an answer. A step's number counts the steps done before it."
)
# Chart -> how to read it.
READINGS: dict[str, str] = {
    "force_map": "A column is one step of the optimiser, a row a type of answer: blue answers would rise, red ones "
    "fall, the number says by how much on average; “batch” is the step that training took, any other column one that "
    "would learn (SFT) the probes' own answers of that type, so DPO's push on rejected is minus its column. Momentum "
    "and weight decay are in “batch” alone.",
    "force_change": "The last map minus the first: in strong cells influence at the end is not what it was at the "
    "start.",
    "predicted_and_true": "A dot is an answer. On the dashed line the step did exactly what its gradient foretold; "
    "a cloud flatter than the line means that steps do less, one without direction that nothing is explained.",
    "first_order_error": "How much of what a step did its prediction misses (grey: all answers together): from the "
    "dashed line (30 %) on only large cells of the force map can be relied on, from 50 % on measured changes alone; "
    "along the dotted line it is rounding.",
    "step_parts": "Where momentum lies above this batch's gradient, what you see at a step was mostly pushed by "
    "earlier batches; parts may cancel, so their curves do not add up to that of the whole step.",
    "accumulated": "Where dashed (predicted) follows solid (measured), single steps explain the learning path of a "
    "type; click names in the legend to keep them.",
    "rank_matrix": "A cell says how alike two steps rank who moves whom (Spearman's correlation; 1: the same order); "
    "pale cells away from the diagonal mean that an explanation holds for its own phase of training only.",
    "rank_line": "Below the dashed line (0.9) the order of who moves whom has changed since the recorded step before; "
    "the bar is the 95 % interval over probes.",
}

WORDS = (
    Term(
        "influence",
        "How much one step of the optimiser moves the log-probability of an answer, of the same prompt or of another.",
        "Δ log π(answer) = −η A K G to first order",
        "nats; per token here",
    ),
    Term(
        "first order",
        "The prediction from gradients alone, taken before the step; it is exact for small steps only.",
        "error: ‖predicted − measured‖ / ‖measured‖ over all observed answers",
    ),
    Term(
        "fixed update",
        "A step that was not taken: what the optimiser, as it stands, would do on the probes' answers of one type. "
        "The same at every recorded step, so that its influence can be compared over time.",
    ),
    Term(
        "momentum",
        "The part of a step that the optimiser remembers from earlier batches; AdamW moves by it even where a batch "
        "has no gradient.",
    ),
)


def draw(shown: list[Shown], looks: Looks) -> list[Section]:
    """One section: the charts of every series, and the tokens of a few answers."""
    section = Section(
        "influence",
        "Influence of single steps",
        "influence",
        HINT,
        [panel for one in shown if (panel := _panel(one, looks)).charts],
        widget=_strips(shown, looks),
    )
    return [section] if section.panels else []


def _panel(one: Shown, looks: Looks) -> Panel:
    drawn, note = influence_charts(one.subject, looks), influence_note(one.subject)
    return Panel(drawn, one.label, one.key, layout=PAIRS, readings=READINGS, hints=[note])


def _strips(shown: list[Shown], looks: Looks) -> Widget | None:
    strips = token_strips(shown)
    if not strips:
        return None
    colors = looks.types or type_colors(name for one in shown for name in one.subject.types)
    return Widget(
        {"colors": colors, "series": strips},
        Path(__file__).with_name("strips.js"),
        "The token strips need scripts.",
        "Token by token",
        "What one step of training did to every answer of a probe. The colour behind a token is the predicted change "
        "of its log-probability, the line under it the measured one: blue rises, red falls. Point at a token for its "
        "numbers.",
    )


def influence_charts(influence: InfluenceSummary, looks: Looks = ALONE) -> dict[str, dict]:
    """What single steps did to the answers, and how far that was foreseen."""
    drawn = {
        "force_map": maps.force_map,
        "force_change": maps.force_change,
        "predicted_and_true": partial(charts.predicted_and_true, looks=looks),
        "first_order_error": partial(charts.first_order_error, looks=looks),
        "step_parts": charts.step_parts,
        "accumulated": partial(charts.accumulated, looks=looks),
        "rank_matrix": maps.rank_matrix,
        "rank_line": charts.rank_line,
    }
    specs = {name: draw(influence) for name, draw in drawn.items()}
    return {name: spec for name, spec in specs.items() if spec}


def influence_note(influence: InfluenceSummary) -> str:
    """Where influence was recorded, of what, and how much of it cannot be judged."""
    steps, fixed = influence.steps, [name for name in influence.updates if name != BATCH]
    known = influence.errors["step"].nunique() if len(influence.errors) else 0
    lost = known - len(judged_steps(influence))
    recorded = f"{len(steps):,} steps" + (f", {steps[0]:,} to {steps[-1]:,}" if len(steps) > 1 else f" ({steps[0]:,})")
    hidden = f" In {lost:,} of them rounding ({influence.dtype}) may be {MAX_ROUNDING:.0%} of the change or more."
    return (
        f"Recorded at {recorded}; {influence.num_probes:,} probes observed. Fixed updates beside the batch: "
        f"{', '.join(fixed) or 'none (akg_updates), so that nothing can be said about rankings'}."
    ) + (hidden if lost else "")


def frames(shown: list[Shown]) -> dict[str, pd.DataFrame]:
    """`influence`: means over answers, nats per token.

    Columns: run, model, step, update, response_type, predicted, true (empty for updates that were not taken), logp
    before the step, num_answers.
    """
    return {"influence": pd.concat(as_frame(one, one.subject.means) for one in shown)}


def run_card(meta: Mapping, influences: Mapping[str, InfluenceSummary]) -> Card:
    """Where influence was recorded: at how many steps, of how many probes, for how long."""
    seconds = sum(part.get("akg_seconds", 0.0) for part in meta.get("parts", []))
    took = seconds and f"{seconds:.0f} s"
    return Card(
        [
            ("Influence", joined(f"{len(one.steps):,} steps", f"{one.num_probes:,} probes", took))
            for one in influences.values()
        ]
    )


SECTIONS = Sections(draw=draw, types=lambda influence: influence.types, frames=frames, card=run_card, words=WORDS)
