"""Pairs scored before any training: log-probabilities at step 0 and the risk of likelihood displacement."""

import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import add

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from trl_dynamics import stats_head
from trl_dynamics.plain import finite_or_none
from trl_dynamics.probing.encode import EncodedProbes, LengthLimits, encode_response
from trl_dynamics.probing.labelled import pad_id_of
from trl_dynamics.probing.layouts import PaddedLayout
from trl_dynamics.probing.schema import REQUIRED_TYPES, Probe, order_types
from trl_dynamics.progress import with_bar
from trl_dynamics.tokens import displacement

logger = logging.getLogger(__name__)

SCORES_FILE, KEPT_FILE, UNSCORED_FILE = "scores.parquet", "filtered.jsonl", "unscored.jsonl"
# Pairs encoded at a time; more would only cost memory.
CHUNK = 256


@dataclass(frozen=True)
class Screened:
    """A row per scored probe, and why others have none."""

    frame: pd.DataFrame
    unscored: list[dict]


def screen(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    limits: LengthLimits,
    end_ids: Iterable[int],
    probes: Sequence[Probe],
    *,
    batch_size: int = 8,
    unscored: Iterable[dict] = (),
) -> Screened:
    """Score every probe that fits the model; the others are listed with reasons.

    The frame has `row`, `probe_id`, per type `logp_sum/TYPE`, `logp_mean/TYPE` (nats), `num_tokens/TYPE` and
    `truncated/TYPE` (prompt or answer was cut), and for probes with both answers `ches`, `ches_normalized` and
    `risk`, the rank of the latter in (0, 1]. These leave the state out that predicts the end-of-turn token;
    `ches_with_eos` and `ches_normalized_with_eos` count it, as the code of CHES's authors does on rows that end with
    one.

    Args:
        model (`nn.Module`): A causal LM, the one that training would start from; it gets the stats head.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        limits ([`LengthLimits`]): Where answers are cut.
        end_ids (`Iterable[int]`): Tokens that end an answer, besides the tokenizer's own.
        probes (`Sequence[Probe]`): What is scored.
        batch_size (`int`): Responses of a forward pass.
        unscored (`Iterable[dict]`, *optional*): What was left out already: `probe_id` and `reason`.

    Raises:
        ValueError: If no probe could be scored.
    """
    unscored = [*unscored]
    stats_head.install(model)
    ends = {tokenizer.eos_token_id, *end_ids}
    pad_id = pad_id_of(tokenizer, model)
    layout, scored = PaddedLayout(batch_size, pad_id, boundaries=stats_head.length_boundaries(model)), []
    for start in range(0, len(probes), CHUNK):
        chunk, items = [], []
        for row, probe in enumerate(probes[start : start + CHUNK], start=start):
            try:
                new = [encode_response(probe, name, tokenizer, limits, ends) for name in order_types(probe.responses)]
            except ValueError as error:
                unscored.append({"probe_id": probe.probe_id, "reason": str(error)})
                continue
            chunk.append((row, probe))
            items += new
        if items and not scored:
            stats_head.settle(model, items[0].input_ids)
            layout = layout.at_most(stats_head.own_forward_tokens(model))
        scored += _score(chunk, items, model, layout)
        logger.info("screened: %d of %d", min(len(probes), start + CHUNK), len(probes))
    if not scored:
        raise ValueError(f"none of {len(unscored)} pairs could be scored, first: {unscored[0]['reason']}")
    frame = pd.DataFrame(scored)
    if "ches_normalized" in frame:
        known = frame["ches_normalized"].notna()
        values = torch.tensor(frame.loc[known, "ches_normalized"].to_numpy())
        frame.loc[known, "risk"] = displacement.risk(values).numpy()
    return Screened(frame, unscored)


def _score(chunk: list[tuple[int, Probe]], items: list, model, layout: PaddedLayout) -> Iterator[dict]:
    if not items:
        return
    batches = layout.batches(EncodedProbes(tuple(items)))
    watched = with_bar(batches, len(batches), "screening")
    sums = functools.reduce(add, (displacement.score_responses(model, batch, len(items)) for batch in watched))
    index = {(item.probe_id, item.response_type): i for i, item in enumerate(items)}
    for row, probe in chunk:
        line = {"row": row, "probe_id": probe.probe_id}
        for name in order_types(probe.responses):
            i = index[probe.probe_id, name]
            num_tokens = int(sums.num_tokens_I[i])
            line |= {
                f"logp_sum/{name}": float(sums.logp_sum_I[i]),
                f"logp_mean/{name}": float(sums.logp_sum_I[i]) / num_tokens,
                f"num_tokens/{name}": num_tokens,
                f"truncated/{name}": items[i].prompt_cut or items[i].response_cut,
            }
        if set(REQUIRED_TYPES) <= set(probe.responses):
            both = [index[probe.probe_id, name] for name in REQUIRED_TYPES]
            for suffix, with_end in (("", False), ("_with_eos", True)):
                hidden_ID, num_I = sums.states(with_end=with_end)
                chosen_PD, rejected_PD = hidden_ID[both][:, None]
                normalized_P = displacement.ches_normalized(chosen_PD, rejected_PD, *num_I[both][:, None])
                line[f"ches{suffix}"] = float(displacement.ches(chosen_PD, rejected_PD))
                line[f"ches_normalized{suffix}"] = float(normalized_P)
        yield line


def not_finite(frame: pd.DataFrame) -> tuple[int, int]:
    """How many of all scored answers have a log-probability that is not finite, and how many there are."""
    names = [name.removeprefix("num_tokens/") for name in frame if name.startswith("num_tokens/")]
    scored = [frame.loc[frame[f"num_tokens/{name}"].notna(), f"logp_sum/{name}"] for name in names]
    return sum(int((~np.isfinite(column)).sum()) for column in scored), sum(map(len, scored))


def summary(screened: Screened, kept: Sequence[str]) -> dict:
    """What was found, for programs; None where a number is not finite."""
    frame = screened.frame
    columns = [name for name in frame if name.startswith("logp_mean/")]
    means = {name.split("/", 1)[1]: finite_or_none(frame[name].mean()) for name in columns}
    return {
        "num_scored": len(frame),
        "num_unscored": len(screened.unscored),
        "num_not_finite": not_finite(frame)[0],
        "num_kept": len(kept),
        "num_truncated": int(frame.filter(like="truncated/").eq(True).to_numpy().sum()),
        "logp_mean": means,
    }


def lowest_risk(frame: pd.DataFrame, fraction: float) -> list[str]:
    """Ids of this part of the pairs, those with the lowest risk, in the order of the data.

    Raises:
        ValueError: If there are no pairs.
    """
    if "risk" not in frame:
        raise ValueError("no probe has both a chosen and a rejected answer, so that there are no pairs to rank")
    ranked = frame[frame["risk"].notna()].sort_values(["ches_normalized", "row"])
    return list(ranked.head(max(1, round(fraction * len(ranked)))).sort_values("row")["probe_id"])


def lines(screened: Screened, kept: Sequence[str], what: str) -> list[str]:
    """For the console: the distribution and the riskiest pairs; `what` is one of the data's rows or probes."""
    frame = screened.frame
    found = [f"{'step 0, nats':<28} {'per token':>10} {'per response':>13} {'probes':>7}"]
    for name in order_types(column.split("/", 1)[1] for column in frame if column.startswith("logp_mean/")):
        mean, total = frame[f"logp_mean/{name}"], frame[f"logp_sum/{name}"]
        found.append(f"{name:<28} {mean.mean():>10.3f} {total.mean():>13.2f} {mean.notna().sum():>7}")
    values = frame["ches_normalized"].dropna()
    parts = ", ".join(f"{q:.0%} {values.quantile(q):.3g}" for q in (0, 0.1, 0.5, 0.9, 1))
    found += ["", f"length-normalised CHES of {len(values)} pairs, quantiles: {parts}", "riskiest pairs:"]
    for _, row in frame.sort_values("ches_normalized", ascending=False).head(5).iterrows():
        found.append(f"  {what} {row['probe_id']}: CHES {row['ches']:.4g}, normalised {row['ches_normalized']:.4g}")
    found.append(f"kept in {KEPT_FILE}: {len(kept)} of {len(values)} pairs, those of the lowest risk")
    if screened.unscored:
        found.append(
            f"not scored, see {UNSCORED_FILE}: {len(screened.unscored)}; first: {screened.unscored[0]['reason']}"
        )
    return found
