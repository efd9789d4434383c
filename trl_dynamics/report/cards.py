"""The run card: what produced the numbers, as rows of text; what a store does not say is "not recorded"."""

import json

from trl_dynamics import chapters
from trl_dynamics.drawing.section import Card
from trl_dynamics.drawing.text import NOT_RECORDED, counted, joined
from trl_dynamics.findings.verdicts import by_model
from trl_dynamics.report.load import Run
from trl_dynamics.report.sections import sections_of

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


def run_card(run: Run) -> Card:
    """Rows of label and value in reading order, those of chapters among them, and the chapters' tables."""
    meta, models = run.meta, by_model(run.judged)
    model = meta.get("model", {})
    parts = [sections_of(one).card(meta, run.subjects(one.name)) for one in chapters.load_all()]
    tracked = [("Models", ", ".join(models))] if len(models) > 1 else []
    rows = [
        ("Model", joined(model.get("name_or_path"), counted(model.get("num_parameters"), "parameters"))),
        *tracked,
        ("Method", _text(meta.get("method"))),
        ("Status", _status(meta)),
        ("Started", _text(meta.get("created"))),
        ("Numerics", joined(model.get("dtype"), model.get("attn_implementation"), _named("mixed precision", meta))),
        ("Seed", _text(meta.get("seed"))),
        ("Processes", _text(meta.get("num_processes"))),
        ("Settings", _highlights(run.config)),
        *(row for part in parts for row in part.rows),
        ("Cost of probing", _cost(meta)),
        (
            "Versions",
            ", ".join(f"{name} {version}" for name, version in meta.get("versions", {}).items()) or NOT_RECORDED,
        ),
    ]
    return Card(rows, [table for part in parts for table in part.tables])


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


def _highlights(config: dict) -> str:
    return ", ".join(f"{name} = {config[name]}" for name in HIGHLIGHTS if name in config) or NOT_RECORDED


def _named(label: str, meta: dict) -> str | None:
    value = meta.get(label.replace(" ", "_"))
    return f"{label} {value}" if value and value != "no" else None


def _text(value) -> str:
    return NOT_RECORDED if value is None or value == "" else str(value)
