"""What the probe explorer shows: texts of probes with the path of every response, small enough to be inlined."""

import pandas as pd

from trl_dynamics.probing.schema import Probe, Prompt, order_types
from trl_dynamics.report.load import Series
from trl_dynamics.report.steps import thin
from trl_dynamics.report.style import type_colors
from trl_dynamics.tracking import metrics

# Over all series together; texts and paths of one probe are about 10 kB.
MAX_PROBES = 100
MAX_TEXT = 4000
MAX_STEPS = 40


def explorer(series: list[Series]) -> dict:
    """The explorer's data: one entry per series with its probes, in the order of the probe set.

    Every probe has `id`, `prompt` (list of role and text) and `responses`: type, text, number of tokens, whether the
    response was cut, and `path` (logp_mean in nats per token at `steps`, null where not scored).
    """
    share = max(MAX_PROBES // len(series), 5)
    types = order_types(name for one in series for name in one.frame["response_type"])
    return {"colors": type_colors(types), "series": [_one(one, share) for one in series]}


def _one(series: Series, limit: int) -> dict:
    texts = {probe.probe_id: probe for probe in series.run.probe_set or ()}
    scored = set(series.frame["probe_id"])
    ids = [probe_id for probe_id in texts if probe_id in scored] or sorted(scored)
    kept = ids[:limit]
    steps = thin(series.steps, MAX_STEPS)
    frame = series.frame[series.frame["probe_id"].isin(kept) & series.frame["step"].isin(steps)]
    table = metrics.wide(frame)
    last = frame.drop_duplicates(["probe_id", "response_type"], keep="last").set_index(["probe_id", "response_type"])
    return {
        "label": series.label,
        "steps": steps,
        "total": len(ids),
        "probes": [_probe(probe_id, texts.get(probe_id), table, last) for probe_id in kept],
    }


def _probe(probe_id: str, probe: Probe | None, table: pd.DataFrame, last: pd.DataFrame) -> dict:
    scored = order_types(name for name, other in table.columns if other == probe_id)
    return {
        "id": probe_id,
        "prompt": _messages(probe.prompt) if probe else [{"role": "", "text": "(the text was not recorded)"}],
        "responses": [
            {
                "type": name,
                "text": _cut(probe.responses.get(name, "")) if probe else "",
                "tokens": int(last.at[(probe_id, name), "num_tokens"]),
                "cut": bool(last.at[(probe_id, name), "truncated"]),
                "path": [None if pd.isna(value) else round(float(value), 3) for value in table[name, probe_id]],
            }
            for name in scored
        ],
    }


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    messages = [{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": str(m["role"]), "text": _cut(_content(m["content"]))} for m in messages]


def _content(content) -> str:
    """Text of a message; a message made of parts shows its text parts."""
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in content)
    return str(content)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " … [shortened in this report]"
