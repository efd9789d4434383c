"""What the probe explorer shows: texts of probes with the path of every response, small enough to be inlined."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trl_dynamics.drawing.axis import thin
from trl_dynamics.drawing.section import Shown
from trl_dynamics.drawing.style import ALONE, Looks, type_colors
from trl_dynamics.drawing.text import cut, messages
from trl_dynamics.paths.metrics import PER_TOKEN
from trl_dynamics.probing.schema import Probe

# Over all series together; texts and paths of one probe are about 10 kB.
MAX_PROBES = 100
MAX_STEPS = 40


def explorer(shown: list[Shown], looks: Looks = ALONE) -> dict:
    """The explorer's data: one entry per series with its probes, in the order of the probe set, and `colors` of types.

    Every probe has `id`, `prompt` (list of role and text) and `responses`: type, text, number of tokens, whether the
    response was cut, and `path` (logp_mean in nats per token at `steps`, null where not scored or not finite). Its
    `answers` are the greedy ones of the first, the middle and the last step that have any: step, text, tokens, whether
    it ended by itself, log-probability per token (null for an empty one) and the longest repeat. Probes with answers
    are the first to be kept.
    """
    share = max(MAX_PROBES // max(len(shown), 1), 5)
    colors = looks.types or type_colors(name for one in shown for name in one.subject.types)
    return {"colors": colors, "series": [_one(one, share) for one in shown]}


def _one(series: Shown, limit: int) -> dict:
    texts = {probe.probe_id: probe for probe in series.probe_set or ()}
    scored = pc.unique(pa.concat_arrays([series.subject.first.probe_ids, series.subject.last.probe_ids])).to_pylist()
    known = set(scored)
    ids = [probe_id for probe_id in texts if probe_id in known] or sorted(scored)
    answers = _answers(series)
    first = {*[*(one for one in ids if one in answers), *(one for one in ids if one not in answers)][:limit]}
    shown = [probe_id for probe_id in ids if probe_id in first]
    kept, steps = pa.array(shown, pa.string()), thin(series.subject.steps, MAX_STEPS)
    # steps x types x probes; one step is read after the other and only its kept probes stay.
    columns = {name: [] for name in (PER_TOKEN, "num_tokens", "truncated")}
    for step in steps:
        table = series.subject.table(step).select(series.subject.types, kept)
        for name, values in columns.items():
            values.append(table.values(name))
    stacked = {name: np.stack(values) for name, values in columns.items()}
    return {
        "label": series.label,
        "steps": steps,
        "recorded": len(series.subject.steps),
        "total": len(ids),
        "probes": [
            _probe(probe_id, texts.get(probe_id), series.subject.types, {n: v[:, :, i] for n, v in stacked.items()})
            | {"answers": answers.get(probe_id, [])}
            for i, probe_id in enumerate(shown)
        ],
    }


def _answers(series: Shown) -> dict[str, list[dict]]:
    """Greedy answers by probe at the first, the middle and the last step that have any."""
    samples = series.subject.samples
    if samples is None or samples.read is None:
        return {}
    steps, found = samples.steps, {}
    for row in samples.read({steps[0], steps[len(steps) // 2], steps[-1]}).to_dict("records"):
        answer = {
            "step": int(row["step"]),
            "text": cut(row["text"]),
            "tokens": int(row["num_tokens"]),
            "ended": bool(row["ended"]),
            "logp": _short(row["logp_mean"]),
            "repeat": int(row["longest_repeat"]),
        }
        found.setdefault(row["probe_id"], []).append(answer)
    return {probe_id: sorted(own, key=lambda answer: answer["step"]) for probe_id, own in found.items()}


def _probe(probe_id: str, probe: Probe | None, types: list[str], columns: dict[str, np.ndarray]) -> dict:
    """One probe; `columns` are steps x types, NaN where a type was not scored."""
    scored = [(name, index) for index, name in enumerate(types) if not np.isnan(columns["num_tokens"][:, index]).all()]
    return {
        "id": probe_id,
        "prompt": messages(probe.prompt) if probe else [{"role": "", "text": "(the text was not recorded)"}],
        "responses": [
            {
                "type": name,
                "text": cut(probe.responses.get(name, "")) if probe else "",
                "tokens": int(_last(columns["num_tokens"][:, index])),
                "cut": bool(_last(columns["truncated"][:, index])),
                "path": [_short(value) for value in columns[PER_TOKEN][:, index]],
            }
            for name, index in scored
        ],
    }


def _short(value: float) -> float | None:
    return round(float(value), 3) if np.isfinite(value) else None


def _last(values: np.ndarray) -> float:
    return values[~np.isnan(values)][-1]
