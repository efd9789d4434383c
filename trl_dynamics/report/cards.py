"""The run card: what produced the numbers, as rows of text; what a store does not say is "not recorded"."""

import json

import pandas as pd

from trl_dynamics.paths.changes import Changes
from trl_dynamics.paths.metrics import PER_SEQUENCE, bystander_types
from trl_dynamics.paths.summary import Summary
from trl_dynamics.probing.schema import group_of, order_types
from trl_dynamics.report import gaps
from trl_dynamics.report.glossary import METRIC_TERMS
from trl_dynamics.report.load import Run, Series
from trl_dynamics.report.text import number, with_error

NOT_RECORDED = "not recorded"
# Arguments worth reading before the rest; the card shows those that config.yaml holds.
HIGHLIGHTS = (
    "dataset_name",
    "loss_type",
    "loss_weights",
    "beta",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "use_peft",
)


def run_card(run: Run) -> list[tuple[str, str]]:
    """Label and value, in reading order."""
    meta = run.meta
    model, plan, probes = (meta.get(name, {}) for name in ("model", "batch_plan", "probe_set"))
    steps = run.steps
    scored = f"{len(steps)}: {steps[0]}" + (f" to {steps[-1]}" if len(steps) > 1 else "") if steps else "none"
    tracked = [("Models", ", ".join(run.summaries))] if len(run.summaries) > 1 else []
    return [
        ("Model", _join(model.get("name_or_path"), _count(model.get("num_parameters"), "parameters"))),
        *tracked,
        ("Method", _text(meta.get("method"))),
        ("Status", _status(meta)),
        ("Started", _text(meta.get("created"))),
        ("Numerics", _join(model.get("dtype"), model.get("attn_implementation"), _named("mixed precision", meta))),
        ("Seed", _text(meta.get("seed"))),
        ("Processes", _text(meta.get("num_processes"))),
        ("Settings", _highlights(run.config)),
        ("Probe set", _join(probes.get("name"), _count(probes.get("num_probes"), "probes"), _short(run.fingerprint))),
        ("Probe batches", _join(meta.get("layout") or plan.get("layout"), _count(plan.get("num_batches"), "batches"))),
        ("Steps scored", scored),
        *_influence(run),
        ("Cost of probing", _cost(meta)),
        (
            "Versions",
            ", ".join(f"{name} {version}" for name, version in meta.get("versions", {}).items()) or NOT_RECORDED,
        ),
    ]


def type_rows(run: Run) -> list[dict]:
    """Per response type: group, number of probes, prompts and responses that were cut, responses that were dropped."""
    probes = run.meta.get("probe_set", {})
    counts, cuts = probes.get("counts", {}), run.meta.get("cuts", {})
    dropped = (probes.get("metadata") or {}).get("dropped", {})
    scored: dict[str, int] = {}
    for summary in run.summaries.values():
        known = dict.fromkeys(summary.types, 0) | gaps.scored_answers(summary)
        known |= {name: max(known[name], count) for name, count in _most_probes(summary).items()}
        scored |= {name: max(scored.get(name, 0), count) for name, count in known.items()}
    names = order_types([*scored, *(name for name in dropped if " " not in name)])
    return [
        {
            "name": name,
            "group": group_of(name).replace("_", " "),
            "probes": counts.get(name, scored.get(name, 0)),
            "prompts_cut": cuts.get(name, {}).get("prompt", NOT_RECORDED),
            "responses_cut": cuts.get(name, {}).get("response", NOT_RECORDED),
            "dropped": dropped.get(name, 0),
        }
        for name in names
    ]


def _most_probes(summary: Summary) -> dict[str, int]:
    return summary.bands().groupby("response_type")["num_probes"].max().to_dict()


def dropped_rows(run: Run) -> list[str]:
    """Whole rows that the import of the probe set left out, e.g. `rows with a blank chosen: 2`."""
    dropped = (run.meta.get("probe_set", {}).get("metadata") or {}).get("dropped", {})
    return [f"{name}: {count}" for name, count in dropped.items() if " " in name]


def change_rows(series: Series) -> list[dict]:
    """Per response type, and of other fluent answers: start, end and paired change, formatted; nats."""
    types, fluent = series.summary.types, bystander_types(series.summary.types)
    ends, changes = series.summary.path().iloc[[0, -1]], series.summary.changes()
    named = [(name, group_of(name).replace("_", " "), [name]) for name in types]
    if fluent:
        named.append((METRIC_TERMS["other_fluent_logp"].title, f"mean of {len(fluent)} types", fluent))
    return [{"name": name, "group": group} | _change(ends, changes, own) for name, group, own in named]


def _change(ends: pd.DataFrame, changes: Changes, types: list[str]) -> dict:
    """Start, end and paired change of the mean over `types`; a single step has no change."""
    levels, several = ends[types].mean(axis=1), changes.start != changes.end
    token, sequence = changes.of_types(types), changes.of_types(types, PER_SEQUENCE)
    return {
        "start": number(levels.iloc[0], ".3f"),
        "end": number(levels.iloc[-1], ".3f"),
        "change": with_error(token.mean, token.se, "+.3f") if several else "–",
        "sequence": with_error(sequence.mean, sequence.se, "+.1f") if several else "–",
        "direction": ("up" if token.up() else "down" if token.down() else "") if several else "",
        "probes": token.num_probes,
    }


def config_text(run: Run) -> str:
    """All recorded arguments, one per line."""
    return "\n".join(f"{name}: {json.dumps(value, default=str)}" for name, value in sorted(run.config.items()))


def _status(meta: dict) -> str:
    status = meta.get("status")
    return "running: the numbers below are what was written so far" if status == "running" else _text(status)


def _cost(meta: dict) -> str:
    probing, training = meta.get("probe_seconds"), meta.get("train_seconds")
    if probing is None:
        return NOT_RECORDED
    share = f", {probing / training:.1%} of {training:.0f} s of training" if training else ""
    return f"{probing:.1f} s{share}"


def _influence(run: Run) -> list[tuple[str, str]]:
    """Where it was recorded: at how many steps, of how many probes, for how long."""
    seconds = sum(part.get("akg_seconds", 0.0) for part in run.meta.get("parts", []))
    return [
        ("Influence", _join(f"{len(one.steps):,} steps", f"{one.num_probes:,} probes", seconds and f"{seconds:.0f} s"))
        for one in run.influences.values()
    ]


def _highlights(config: dict) -> str:
    return ", ".join(f"{name} = {config[name]}" for name in HIGHLIGHTS if name in config) or NOT_RECORDED


def _named(label: str, meta: dict) -> str | None:
    value = meta.get(label.replace(" ", "_"))
    return f"{label} {value}" if value and value != "no" else None


def _count(value: int | None, noun: str) -> str | None:
    return None if value is None else f"{value:,} {noun}"


def _short(fingerprint: str | None) -> str | None:
    return f"fingerprint {fingerprint[:12]}" if fingerprint else None


def _join(*parts) -> str:
    return ", ".join(str(part) for part in parts if part) or NOT_RECORDED


def _text(value) -> str:
    return NOT_RECORDED if value is None or value == "" else str(value)
