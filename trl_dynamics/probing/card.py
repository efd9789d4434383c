"""The dataset card of a probe set: what it is, where it comes from and how each response was made."""

import importlib.metadata
import json
import platform

import yaml

from trl_dynamics.plain import plain_or_text
from trl_dynamics.probing.io import CARD_FILE, DATA_FILE
from trl_dynamics.probing.schema import RESPONSE_TYPES, ProbeSet, group_of

CARD_NAME = "README.md"
REJECTED_FILE = "rejected.jsonl"
_VERSIONED = ("trl-dynamics", "datasets", "transformers", "trl", "torch")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a build depends on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in _VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def dataset_card(probe_set: ProbeSet) -> str:
    """The card as Markdown with the hub's YAML header.

    Reads the metadata that [`build`] writes; a set from elsewhere gets the sections it has facts for.
    """
    about = probe_set.metadata
    header = {
        "license": about.get("license", "unknown"),
        "pretty_name": probe_set.name,
        "tags": ["trl-dynamics", "probing", "learning-dynamics"],
        "configs": [{"config_name": "default", "data_files": DATA_FILE}],
    }
    sections = [
        f"# Probe set `{probe_set.name}`",
        f"{len(probe_set)} prompts with {len(probe_set.response_types)} types of response each, to follow what "
        "fine-tuning does to answers that it does not train on.",
        _table(probe_set),
        _origin(probe_set),
        *_generated(about),
        "## Use",
        '```python\nfrom trl_dynamics import DPOConfig\n\nDPOConfig(..., probe_set="DIR")  # this folder\n```',
        f"`{DATA_FILE}` holds a row per prompt: `probe_id`, `prompt` and a column per response type. `{CARD_FILE}` "
        f"holds the facts above for programs; fingerprint of the contents: `{probe_set.fingerprint}`.",
    ]
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n" + "\n\n".join(sections) + "\n"


def _table(probe_set: ProbeSet) -> str:
    lines = ["| Response type | Group | What it is | Probes |", "|---|---|---|---|"]
    for name, count in probe_set.counts.items():
        known = RESPONSE_TYPES.get(name)
        what = known.description if known else "one of the model's sampled answers"
        if group_of(name) == "custom":
            what = "given with the data"
        lines.append(f"| `{name}` | {group_of(name).replace('_', '-')} | {what} | {count} |")
    return "\n".join(lines)


def _origin(probe_set: ProbeSet) -> str:
    about = probe_set.metadata
    facts = {
        "Source": about.get("source"),
        "Held-out source": about.get("held_out_source"),
        "Licence": about.get("license", "unknown: that of the source applies"),
        "Seed": about.get("seed"),
        "Selection": about.get("select"),
        "Rows of the source": about.get("num_rows"),
        "Rows that could not be used": about.get("unusable_rows"),
        "Held-out answers to draw from": about.get("held_out_answers"),
        "Held-out answers left out, being training answers": about.get("held_out_answers_dropped_as_train_answers"),
        "Responses that could not be built": about.get("not_built"),
        "Dropped when read": about.get("dropped"),
        "Versions": about.get("versions"),
    }
    return "## Origin\n\n" + "\n".join(f"- {what}: {_inline(fact)}" for what, fact in facts.items() if _told(fact))


def _generated(about: dict) -> list[str]:
    sections = []
    if own := about.get("own_answers"):
        sections.append(
            f"## The model's own answers\n\n`{own['model']}` wrote {_names(own['types'])}, at most "
            f"{own['max_new_tokens']} new tokens each. Cut there: {_inline(own['cut_at_max_new_tokens']) or 'none'}."
        )
    for by in about.get("rephrases", ()):
        text = f"## Rephrases\n\n`{by['by']}` wrote {_names(by['types'])}."
        for kind, prompt in by["prompts"].items():
            text += f"\n\nPrompt for {kind} rephrases:\n\n```text\n{prompt}\n```"
        sections.append(text)
    if rejected := about.get("rejected"):
        sections.append(
            f"Not kept, with reasons (texts in `{REJECTED_FILE}`; another attempt may have taken their place): "
            f"{_inline(rejected)}."
        )
    if failures := about.get("failures"):
        sections.append(f"Left out because no answer came: {_inline(failures)}.")
    return sections


def _told(fact: object) -> bool:
    return fact is not None and fact != {}


def _names(types: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in types)


def _inline(fact: object) -> str:
    if isinstance(fact, dict):
        return "; ".join(f"{key}: {_inline(value)}" for key, value in fact.items())
    return fact if isinstance(fact, str) else json.dumps(plain_or_text(fact))
