"""Which charts a report shows, by name and in order; the page and the PNG export draw the same ones."""

import math
from functools import partial

import pandas as pd

from trl_dynamics.influence.kind import BATCH
from trl_dynamics.influence.rules import MAX_ROUNDING, judged_steps
from trl_dynamics.paths.metrics import bystander_types, third_party_types
from trl_dynamics.paths.samples import SAMPLE_METRICS
from trl_dynamics.paths.summary import Summary
from trl_dynamics.report import charts, gaps, influence_charts, influence_maps, levels
from trl_dynamics.report.glossary import METRIC_TERMS
from trl_dynamics.report.load import Run, Series
from trl_dynamics.report.spec import finite
from trl_dynamics.report.style import ALONE, Looks

# Keys of the trainer's log that are drawn first, in this order; then whatever else it logged.
SCALARS = (
    "loss",
    "eval_loss",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "reward",
    "mean_token_accuracy",
    "entropy",
    "kl",
    "grad_norm",
    "learning_rate",
)
MAX_SCALARS = 12
_NOT_SCALARS = ("step", "epoch")
# A and G of the force analysis, along the two answers that DPO trains on.
_FORCES = (
    "residual_chosen",
    "residual_rejected",
    "normalizer_chosen",
    "normalizer_rejected",
    "miss_chosen",
)
# In the glossary's order. argmax along chosen is drawn with chosen, and displacement is chosen's own learning path.
_PANEL_METRICS = tuple(name for name in METRIC_TERMS if name not in ("argmax_logp", "displacement", *_FORCES))
# From here on the drained mass counts as a rise or a fall, probability per position.
_DRAINS = 0.005
_COMPARED_TYPES = ("chosen", "rejected", "other_train")


def page_looks(series: list[Series]) -> Looks:
    """One look per run and per response type, for all charts of these series, of their runs and of their influence."""
    labels = dict.fromkeys([*(one.label for one in series), *(one.run.name for one in series)])
    summaries = [part for one in series for part in (one.summary, one.influence) if part is not None]
    return Looks.of(labels, {name for summary in summaries for name in summary.types})


def path_charts(series: Series, looks: Looks = ALONE) -> dict[str, dict]:
    """Learning paths and the start and end of every type; a single step has levels only."""
    drawn = {"learning_paths": charts.learning_paths(series.summary, looks)} if len(series.steps) > 1 else {}
    drawn |= {"levels": levels.levels(series.summary, looks)}
    return {name: spec for name, spec in drawn.items() if spec}


def squeezing_charts(series: Series, looks: Looks = ALONE) -> dict[str, dict]:
    """The squeezing panel; charts whose response types are missing are left out, a single step has none."""
    if len(series.steps) < 2:
        return {}
    summaries = {series.label: series.summary}
    drawn = {
        "argmax_and_chosen": charts.argmax_and_chosen(series.summary),
        "rejected": charts.rejected_path(series.summary),
    }
    drawn |= {name: charts.metric(summaries, name, looks) for name in _PANEL_METRICS}
    return {name: spec for name, spec in drawn.items() if spec}


def force_charts(series: Series, looks: Looks = ALONE) -> dict[str, dict]:
    """Sizes of the residual and of the softmax normalisation; a single step has none."""
    if len(series.steps) < 2:
        return {}
    drawn = {name: charts.metric({series.label: series.summary}, name, looks) for name in _FORCES}
    return {name: spec for name, spec in drawn.items() if spec}


def sample_charts(series: Series, looks: Looks = ALONE) -> dict[str, dict]:
    """What the greedy answers are like; none without any, or with those of a single step."""
    samples = series.summary.samples
    if samples is None or len(samples.steps) < 2:
        return {}
    own = {series.label: series.summary}
    drawn = {f"answers_{name}": charts.sample_metric(own, name, looks) for name in SAMPLE_METRICS}
    return {name: spec for name, spec in drawn.items() if spec}


def influence_charts_of(series: Series, looks: Looks = ALONE) -> dict[str, dict]:
    """What single steps did to the answers, and how far that was foreseen; none without `akg_every`."""
    if series.influence is None:
        return {}
    drawn = {
        "force_map": influence_maps.force_map,
        "force_change": influence_maps.force_change,
        "predicted_and_true": partial(influence_charts.predicted_and_true, looks=looks),
        "first_order_error": partial(influence_charts.first_order_error, looks=looks),
        "step_parts": influence_charts.step_parts,
        "accumulated": partial(influence_charts.accumulated, looks=looks),
        "rank_matrix": influence_maps.rank_matrix,
        "rank_line": influence_charts.rank_line,
    }
    specs = {name: draw(series.influence) for name, draw in drawn.items()}
    return {name: spec for name, spec in specs.items() if spec}


def influence_note(series: Series) -> str:
    """Where influence was recorded, of what, and how much of it cannot be judged; empty without any."""
    influence = series.influence
    if influence is None:
        return ""
    steps, fixed = influence.steps, [name for name in influence.updates if name != BATCH]
    known = influence.errors["step"].nunique() if len(influence.errors) else 0
    lost = known - len(judged_steps(influence))
    recorded = f"{len(steps):,} steps" + (f", {steps[0]:,} to {steps[-1]:,}" if len(steps) > 1 else f" ({steps[0]:,})")
    hidden = f" In {lost:,} of them rounding ({influence.dtype}) may be {MAX_ROUNDING:.0%} of the change or more."
    return (
        f"Recorded at {recorded}; {influence.num_probes:,} probes observed. Fixed updates beside the batch: "
        f"{', '.join(fixed) or 'none (akg_updates), so that nothing can be said about rankings'}."
    ) + (hidden if lost else "")


def scalar_charts(runs: list[Run], looks: Looks = ALONE) -> dict[str, dict]:
    """What the trainer logged, a line per run, at most [`MAX_SCALARS`] charts."""
    logs = {run.name: scalar_curves(run.trainer_log) for run in runs if run.trainer_log}
    keys = list(dict.fromkeys(key for curves in logs.values() for key in curves))
    ordered = [key for key in SCALARS if key in keys] + sorted(key for key in keys if key not in SCALARS)
    found = {}
    for key in ordered[:MAX_SCALARS]:
        curves = {name: curves[key] for name, curves in logs.items() if key in curves}
        spec = charts.metric_by_run(curves, key, "", looks=looks)
        if spec:
            found[key] = spec
    return found


def scalar_curves(trainer_log: list[dict]) -> dict[str, pd.Series]:
    """Numbers of a trainer's log by key, indexed by step, NaN for what is not finite.

    A key without any finite number is left out, and so is the summary line of the end.
    """
    values: dict[str, dict[int, float]] = {}
    for line in trainer_log:
        if "step" not in line or "train_runtime" in line:
            continue
        for key, value in line.items():
            if key not in _NOT_SCALARS and (value is None or isinstance(value, int | float)):
                values.setdefault(key, {})[int(line["step"])] = math.nan if value is None else float(value)
    curves = {key: finite(pd.Series(by_step, dtype=float).sort_index()) for key, by_step in values.items()}
    return {key: curve for key, curve in curves.items() if curve.notna().any()}


def comparison_charts(series: list[Series], looks: Looks = ALONE) -> dict[str, dict]:
    """Every metric and the main response types with a line per run; nothing for a single series that was scored."""
    series = [one for one in series if one.summary is not None]
    if len(series) < 2:
        return {}
    summaries = {one.label: one.summary for one in series}
    drawn: dict[str, dict | None] = {"levels_at_end": levels.levels_by_run(summaries, looks)}
    if any(len(one.steps) > 1 for one in series):
        drawn |= {f"change_{name}": charts.type_change(summaries, name, looks) for name in _COMPARED_TYPES}
        drawn |= {name: charts.metric(summaries, name, looks) for name in METRIC_TERMS}
        drawn |= {f"answers_{name}": charts.sample_metric(summaries, name, looks) for name in SAMPLE_METRICS}
    return {name: spec for name, spec in drawn.items() if spec}


def thinned_note(series: Series) -> str:
    """How many of the recorded steps the learning paths draw; empty if all."""
    drawn, recorded = len(charts.drawn_steps(series.summary)), len(series.steps)
    if drawn == recorded:
        return ""
    return (
        f"The learning paths draw {drawn:,} of the {recorded:,} recorded steps: the first, the last, early ones and "
        "the rest evenly spaced. Every step is in paths.csv (--format csv)."
    )


def panel_notes(series: Series) -> list[str]:
    """What the squeezing panel shows of this series: which types are meant, and whether mass drained."""
    return [text for text in (_other_answers_note(series.summary), _drained_note(series.summary)) if text]


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
