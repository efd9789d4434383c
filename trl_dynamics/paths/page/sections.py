"""Learning paths on a page: their sections, tables, card rows and terms."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd

from trl_dynamics.drawing import section
from trl_dynamics.drawing.section import Control, Panel, Place, Section, Sections, Shown, Widget, as_frame
from trl_dynamics.drawing.style import ALONE, Looks
from trl_dynamics.drawing.terms import Term, glossary
from trl_dynamics.paths.metrics import METRICS, bystander_types, third_party_types
from trl_dynamics.paths.page import charts, gaps, levels
from trl_dynamics.paths.page.explorer import explorer
from trl_dynamics.paths.page.tables import change_table, run_card
from trl_dynamics.paths.samples import SAMPLE_METRICS
from trl_dynamics.paths.summary import MEASURES, Summary

# A and G of the force analysis, along the two answers that DPO trains on.
_FORCES = ("residual_chosen", "residual_rejected", "normalizer_chosen", "normalizer_rejected", "miss_chosen")
# argmax along chosen is drawn with chosen, and displacement is chosen's own learning path.
_PANEL_METRICS = tuple(name for name in METRICS if name not in ("argmax_logp", "displacement", *_FORCES))
# From here on the drained mass counts as a rise or a fall, probability per position.
_DRAINS = 0.005
_COMPARED_TYPES = ("chosen", "rejected", "other_train")

WORDS = (
    Term("learning path", "The log-probability of a response, or of a response type, over the steps of a run."),
    Term(
        "per token",
        "Log-probability of a response divided by its number of tokens; the end-of-turn token is not counted.",
        "logp_mean = log π(response | prompt) / tokens",
        "nats per token",
    ),
    Term("per sequence", "Log-probability of the whole response.", "logp_sum = Σ log π(token)", "nats per sequence"),
    Term(
        "displacement",
        "Chosen loses probability in training. Benign while paraphrases hold, harmful when they fall too.",
    ),
    Term(
        "squeezing",
        "Pushing an unlikely response down lifts the token that is likeliest already and lowers everything else.",
    ),
    Term("greedy answer", "What the model says to a probe's prompt, the likeliest token at every step."),
)


def draw(shown: list[Shown], looks: Looks) -> list[Section]:
    """Learning paths, the squeezing panel, greedy answers where there are any, the explorer, and a comparison."""
    shown = [replace(one, subject=one.subject.own) for one in shown]
    paths = Section(
        "paths",
        "Learning paths",
        "learning paths",
        "A line is the mean over probes of one response type. Point at a line for its 10–90 % band over probes; click "
        "names in the legend to keep them (shift-click for several).",
        [_paths_panel(one, looks) for one in shown],
        Control("measure", "Show", {name: label for name, (label, _, _) in charts.MEASURES.items()}),
    )
    squeezing = Section(
        "squeezing",
        "Squeezing panel",
        "squeezing",
        "Squeezing shows as argmax rising away from chosen while other fluent answers fall.",
        [_squeezing_panel(one, looks) for one in shown],
    )
    answers = Section(
        "answers",
        "Greedy answers",
        "answers",
        "What the model says itself to some of the prompts, the likeliest token at every step. The texts are in the "
        "probe explorer.",
        [panel for one in shown if (panel := _answers_panel(one, looks)).charts],
    )
    probes = Section("probes", "Probe explorer", "probes", widget=_explorer(shown, looks), place=Place.LOOK_UP)
    compared = Section(
        "comparison",
        "Comparison",
        "comparison",
        "The same metric for every run. Levels compare only where the probe set and the tokenizer are the same.",
        [Panel(comparison_charts(shown, looks), spanning=["levels_at_end"])],
        place=Place.COMPARISON,
    )
    return [paths, squeezing, *([answers] if answers.panels else []), probes, *([compared] if compared.charts else [])]


def _panel(one: Shown, drawn: dict[str, dict], **parts) -> Panel:
    return Panel(drawn, one.label, one.key, **parts)


def _paths_panel(one: Shown, looks: Looks) -> Panel:
    summary = one.subject
    remark = f"one step scored ({summary.steps[-1]})" if len(summary.steps) < 2 else ""
    return _panel(
        one,
        path_charts(summary, looks),
        remark=remark,
        layout=section.WIDE,
        notices=[note] if (note := gaps.note(summary)) else [],
        notes=[note] if (note := thinned_note(summary)) else [],
        tables=[change_table(summary)],
    )


def _squeezing_panel(one: Shown, looks: Looks) -> Panel:
    summary = one.subject
    drawn, forces = squeezing_charts(one, looks), force_charts(one, looks)
    if not drawn:
        lacking = "The probe set has none of the response types these metrics need."
        lost = "None of these metrics is finite at any step." if gaps.note(summary) else lacking
        return _panel(one, {}, nothing="One step was scored: no curves to draw." if len(summary.steps) < 2 else lost)
    label = "forces: how hard a step pulls (G), and how peaked the distribution is (A)"
    return _panel(one, drawn, notes=panel_notes(summary), folded=[Panel(forces, label)] if forces else [])


def _answers_panel(one: Shown, looks: Looks) -> Panel:
    asked = one.meta.get("samples")
    remark = f"{asked['num_probes']} prompts, at most {asked['max_new_tokens']} tokens" if asked else ""
    return _panel(one, sample_charts(one, looks), remark=remark)


def _explorer(shown: list[Shown], looks: Looks) -> Widget:
    return Widget(explorer(shown, looks), Path(__file__).with_name("explorer.js"), "The explorer needs scripts.")


def path_charts(summary: Summary, looks: Looks = ALONE) -> dict[str, dict]:
    """Learning paths and the start and end of every type; a single step has levels only."""
    drawn = {"learning_paths": charts.learning_paths(summary, looks)} if len(summary.steps) > 1 else {}
    return _known(drawn | {"levels": levels.levels(summary, looks)})


def squeezing_charts(one: Shown, looks: Looks = ALONE) -> dict[str, dict]:
    """The squeezing panel; charts whose response types are missing are left out, a single step has none."""
    if len(one.subject.steps) < 2:
        return {}
    summaries = {one.label: one.subject}
    drawn = {
        "argmax_and_chosen": charts.argmax_and_chosen(one.subject),
        "rejected": charts.rejected_path(one.subject),
    }
    return _known(drawn | {name: charts.metric(summaries, name, looks) for name in _PANEL_METRICS})


def force_charts(one: Shown, looks: Looks = ALONE) -> dict[str, dict]:
    """Sizes of the residual and of the softmax normalisation; a single step has none."""
    if len(one.subject.steps) < 2:
        return {}
    return _known({name: charts.metric({one.label: one.subject}, name, looks) for name in _FORCES})


def sample_charts(one: Shown, looks: Looks = ALONE) -> dict[str, dict]:
    """What the greedy answers are like; none without any, or with those of a single step."""
    samples = one.subject.samples
    if samples is None or len(samples.steps) < 2:
        return {}
    own = {one.label: one.subject}
    return _known({f"answers_{name}": charts.sample_metric(own, name, looks) for name in SAMPLE_METRICS})


def comparison_charts(shown: list[Shown], looks: Looks = ALONE) -> dict[str, dict]:
    """Every metric and the main response types with a line per run; nothing for a single series."""
    if len(shown) < 2:
        return {}
    summaries = {one.label: one.subject for one in shown}
    drawn: dict[str, dict | None] = {"levels_at_end": levels.levels_by_run(summaries, looks)}
    if any(len(summary.steps) > 1 for summary in summaries.values()):
        drawn |= {f"change_{name}": charts.type_change(summaries, name, looks) for name in _COMPARED_TYPES}
        drawn |= {name: charts.metric(summaries, name, looks) for name in METRICS}
        drawn |= {f"answers_{name}": charts.sample_metric(summaries, name, looks) for name in SAMPLE_METRICS}
    return _known(drawn)


def _known(drawn: Mapping[str, dict | None]) -> dict[str, dict]:
    return {name: spec for name, spec in drawn.items() if spec}


def thinned_note(summary: Summary) -> str:
    """How many of the recorded steps the learning paths draw; empty if all."""
    drawn, recorded = len(charts.drawn_steps(summary)), len(summary.steps)
    if drawn == recorded:
        return ""
    return (
        f"The learning paths draw {drawn:,} of the {recorded:,} recorded steps: the first, the last, early ones and "
        "the rest evenly spaced. Every step is in paths.csv (--format csv)."
    )


def panel_notes(summary: Summary) -> list[str]:
    """What the squeezing panel shows of this series: which types are meant, and whether mass drained."""
    return [text for text in (_other_answers_note(summary), _drained_note(summary)) if text]


def _other_answers_note(summary: Summary) -> str:
    fluent, every = bystander_types(summary.types), third_party_types(summary.types)
    left_out = [name for name in every if name not in fluent]
    text = f"Other fluent answers here: {', '.join(fluent) or 'none in this probe set'}."
    if not left_out:
        return text
    return (
        f"{text} Left out are shuffled words, and paraphrases of rejected, which training means to push down: "
        f"{', '.join(left_out)}."
    )


def _drained_note(summary: Summary) -> str:
    """In words, which way the curve of the drained mass went by the last step that has one."""
    curve = gaps.curve(summary, "drained_mass").dropna()
    if len(curve) < 2:
        return ""
    step, value = int(curve.index[-1]), float(curve.iloc[-1])
    found = f"Drained mass at step {step:,}: {value:+.3f}".replace("-", "−") + " of probability per position. "
    if value >= _DRAINS:
        return found + "Along rejected, all tokens but y− and y* lost it."
    if value <= -_DRAINS:
        return found + (
            "Along rejected, the other tokens gained it: y− was likely at many positions and gave it up. Squeezing "
            "along chosen is not ruled out."
        )
    return found + "Along rejected, the other tokens kept what they had."


def frames(shown: list[Shown]) -> dict[str, pd.DataFrame]:
    """`paths` (mean and quantiles over probes) and `metrics`.

    Columns of paths: run, model, measure, response_type, step, mean, num_probes, q10, q50, q90; `measure` is
    logp_mean, logp_sum, or one of them with `_change` for the paired change since the start. Columns of metrics: run,
    model, metric, step, value; metrics of greedy answers are called `samples/...`. All values are in nats.
    """
    bands, values = [], []
    for one in shown:
        summary = one.subject.own
        for measure, (column, since_start) in MEASURES.items():
            found = gaps.bands(summary, column, since_start=since_start).reset_index()
            bands.append(as_frame(one, found.assign(measure=measure), "measure"))
        values.append(as_frame(one, gaps.metric_table(summary)))
        if summary.samples is not None:
            values.append(as_frame(one, summary.samples.metric_table()))
    return {"paths": pd.concat(bands), "metrics": pd.concat(values)}


SECTIONS = Sections(
    draw=draw,
    types=lambda summary: summary.own.types,
    frames=frames,
    card=run_card,
    words=WORDS,
    metrics=glossary(METRICS, SAMPLE_METRICS),
)
