"""Learning paths in tables: what changed per response type, and what a run's card says of the probes."""

from collections.abc import Mapping

import pandas as pd

from trl_dynamics.drawing.section import Card, Cell, Table
from trl_dynamics.drawing.text import NOT_RECORDED, counted, joined, number, with_error
from trl_dynamics.paths.changes import Changes
from trl_dynamics.paths.metrics import METRICS, PER_SEQUENCE, bystander_types
from trl_dynamics.paths.page import gaps
from trl_dynamics.paths.summary import Summary
from trl_dynamics.probing.schema import group_of, order_types


def change_table(summary: Summary) -> Table:
    """Per response type, and of other fluent answers: start, end and paired change, formatted; nats."""
    start, end = summary.steps[0], summary.steps[-1]
    types, fluent = summary.types, bystander_types(summary.types)
    ends, changes = summary.path().iloc[[0, -1]], summary.changes()
    named = [(name, group_of(name).replace("_", " "), [name]) for name in types]
    if fluent:
        named.append((METRICS["other_fluent_logp"].title, f"mean of {len(fluent)} types", fluent))
    where = f"step {end}" if start == end else f"step {start} to {end}"
    return Table(
        f"table of all response types, {where}",
        ["response type", "group", "start", "end", "change per token", "change per sequence", "probes"],
        [[name, group, *_change(ends, changes, own)] for name, group, own in named],
        num_names=2,
        hint="Start and end: mean log-probability per token (nats). Changes are paired by probe, ± one standard error "
        "over probes; coloured where they count as up or down.",
    )


def _change(ends: pd.DataFrame, changes: Changes, types: list[str]) -> list:
    """Start, end and paired change of the mean over `types`; a single step has no change."""
    levels, several = ends[types].mean(axis=1), changes.start != changes.end
    token, sequence = changes.of_types(types), changes.of_types(types, PER_SEQUENCE)
    direction = ("up" if token.up() else "down" if token.down() else "") if several else ""
    return [
        number(levels.iloc[0], ".3f"),
        number(levels.iloc[-1], ".3f"),
        Cell(with_error(token.mean, token.se, "+.3f") if several else "–", direction),
        with_error(sequence.mean, sequence.se, "+.1f") if several else "–",
        token.num_probes,
    ]


def run_card(meta: Mapping, summaries: Mapping[str, Summary]) -> Card:
    """The probe set, its batches and the steps scored; what was cut and dropped per response type."""
    own = {model: summary.own for model, summary in summaries.items()}
    plan, probes = meta.get("batch_plan", {}), meta.get("probe_set", {})
    layout, batches = meta.get("layout") or plan.get("layout"), counted(plan.get("num_batches"), "batches")
    steps = sorted({step for summary in own.values() for step in summary.steps})
    scored = f"{len(steps)}: {steps[0]}" + (f" to {steps[-1]}" if len(steps) > 1 else "") if steps else "none"
    fingerprint = probes.get("fingerprint")
    short = fingerprint and f"fingerprint {fingerprint[:12]}"
    rows = [
        ("Probe set", joined(probes.get("name"), counted(probes.get("num_probes"), "probes"), short)),
        ("Probe batches", joined(layout, batches)),
        ("Steps scored", scored),
    ]
    return Card(rows, [type_table(meta, own)])


def type_table(meta: Mapping, summaries: Mapping[str, Summary]) -> Table:
    """Per response type: group, number of probes, prompts and responses that were cut, responses that were dropped."""
    probes = meta.get("probe_set", {})
    counts, cuts = probes.get("counts", {}), meta.get("cuts", {})
    dropped = (probes.get("metadata") or {}).get("dropped", {})
    scored: dict[str, int] = {}
    for summary in summaries.values():
        known = dict.fromkeys(summary.types, 0) | gaps.scored_answers(summary)
        known |= {name: max(known[name], count) for name, count in _most_probes(summary).items()}
        scored |= {name: max(scored.get(name, 0), count) for name, count in known.items()}
    names = order_types([*scored, *(name for name in dropped if " " not in name)])
    rows = [
        [
            name,
            group_of(name).replace("_", " "),
            counts.get(name, scored.get(name, 0)),
            cuts.get(name, {}).get("prompt", NOT_RECORDED),
            cuts.get(name, {}).get("response", NOT_RECORDED),
            dropped.get(name, 0),
        ]
        for name in names
    ]
    return Table(
        f"what was scored: {len(names)} response types, cut and dropped",
        ["response type", "group", "probes", "prompts cut", "responses cut", "dropped when blank"],
        rows,
        num_names=2,
        # Whole rows that the import of the probe set left out, e.g. `rows with a blank chosen: 2`.
        notes=[f"{name}: {count}" for name, count in dropped.items() if " " in name],
    )


def _most_probes(summary: Summary) -> dict[str, int]:
    return summary.bands().groupby("response_type")["num_probes"].max().to_dict()
