"""What the token strips show: for a few probes, what one step was foretold to do to every token, and what it did."""

import numpy as np
import pandas as pd

from trl_dynamics.drawing.section import Shown
from trl_dynamics.drawing.text import messages
from trl_dynamics.influence.kind import BATCH
from trl_dynamics.probing.schema import Probe, order_types

# Over all series together; a probe with ten answers of 60 tokens is about 30 kB.
MAX_PROBES = 16
MAX_TOKENS = 120
# What stands for a token that holds a part of a character.
REPLACEMENT = "\ufffd"
# Share of the tokens whose colour is not the strongest one: a single token must not make all others pale.
UNCLIPPED = 0.98
COLUMNS = ("num_tokens", "predicted_sum", "true_sum", "token_ids", "token_texts", "predicted", "true")


def token_strips(shown: list[Shown]) -> list[dict]:
    """One entry per series whose actual steps were recorded, empty if none.

    An entry has `steps` (the first and the last one recorded), `limits` (nats of the strongest colour, per step), and
    the `probes` that the last step moved most, each with its answers: type, texts of tokens, how many were left out,
    and per step the means and, token by token, `predicted` and `true` (nats).
    """
    share = max(MAX_PROBES // max(len(shown), 1), 2)
    return [entry for one in shown if (entry := _one(one, share))]


def _one(series: Shown, limit: int) -> dict | None:
    influence = series.subject
    known = [int(step) for step in influence.errors["step"].unique()] if len(influence.errors) else []
    if not known:
        return None
    steps = sorted({known[0], known[-1]})
    rows = {step: _of_batch(influence.read(step, COLUMNS)) for step in steps}
    last = rows[steps[-1]]
    moved = (last["true_sum"] / last["num_tokens"]).abs().groupby(last["probe_id"]).mean()
    kept = list(moved.sort_values(ascending=False, kind="stable").index[:limit])
    shown = {step: found[found["probe_id"].isin(kept)] for step, found in rows.items()}
    probes = {probe.probe_id: probe for probe in series.probe_set or ()}
    return {
        "label": series.label,
        "steps": steps,
        "total": len(moved),
        "limits": [_limit(found) for found in shown.values()],
        "probes": [_probe(name, probes.get(name), shown) for name in kept],
    }


def _of_batch(rows: pd.DataFrame) -> pd.DataFrame:
    """The answers of the batch's step whose predicted and measured changes are finite."""
    finite = np.isfinite(rows[["predicted_sum", "true_sum"]]).all(axis=1)
    return rows[(rows["update"] == BATCH) & (rows["num_tokens"] > 0) & finite]


def _limit(rows: pd.DataFrame) -> float:
    if rows.empty:  # none of the answers shown is finite at this step
        return 1.0
    sizes = np.abs(np.concatenate([*rows["predicted"], *rows["true"]]))
    return _short(float(np.quantile(sizes, UNCLIPPED)) or float(sizes.max()) or 1.0)


def _probe(probe_id: str, probe: Probe | None, shown: dict[int, pd.DataFrame]) -> dict:
    own = [rows[rows["probe_id"] == probe_id].set_index("response_type") for rows in shown.values()]
    return {
        "id": probe_id,
        "prompt": messages(probe.prompt)[-1]["text"] if probe and _is_of(probe, own[-1]) else "",
        "answers": [_answer(name, own) for name in order_types(own[-1].index)],
    }


def _is_of(probe: Probe, answers: pd.DataFrame) -> bool:
    """Whether these are the probe's answers: `akg_observe` may name another set, whose probes have the same names.

    They are compared up to the first character that is split over tokens.
    """
    texts = {name: "".join(row).strip().split(REPLACEMENT)[0] for name, row in answers["token_texts"].items()}
    return all(probe.responses.get(name, "").strip().startswith(text) for name, text in texts.items())


def _answer(name: str, own: list[pd.DataFrame]) -> dict:
    last = own[-1].loc[name]
    texts = [text or f"⟨{token}⟩" for text, token in zip(last["token_texts"], last["token_ids"], strict=True)]
    return {
        "type": name,
        "tokens": texts[:MAX_TOKENS],
        "left_out": max(len(texts) - MAX_TOKENS, 0),
        "steps": [_step(rows.loc[name]) if name in rows.index else None for rows in own],
    }


def _step(row: pd.Series) -> dict:
    return {
        "means": [_short(float(np.mean(row[column]))) for column in ("predicted", "true")],
        **{column: [_short(float(value)) for value in row[column][:MAX_TOKENS]] for column in ("predicted", "true")},
    }


def _short(value: float) -> float:
    return float(f"{value:.3g}")
