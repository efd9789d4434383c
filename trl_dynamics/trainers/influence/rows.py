"""Rows of recorded influence, from what was predicted and measured per label.

N labels of a batch of observed answers
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch

from trl_dynamics.akg.steps import DECAY, MOMENTUM, UPDATE
from trl_dynamics.influence.kind import INFLUENCE
from trl_dynamics.tracking.callback import MODEL_NAME
from trl_dynamics.trainers.influence.observed import Observed

NAN = float("nan")
LOGP, PREDICTED, TRUE, ERROR = "logp", "predicted", "true", "error"
# Which column holds the sum over an answer's tokens of what.
_SUMS = {f"{name}_sum": name for name in (LOGP, PREDICTED, UPDATE, MOMENTUM, DECAY, ERROR, TRUE)}


@dataclass(frozen=True)
class Prediction:
    """One update's influence on this process' batches.

    Args:
        step (`int`): Optimiser steps done before.
        update (`str`): Its name.
        facts (`dict[str, float]`): The columns that are the update's own.
        found (`list[dict]`): Per batch, by name, (N,) nats: the whole change, its parts, the error if there is one.
    """

    step: int
    update: str
    facts: dict[str, float]
    found: list[dict[str, torch.Tensor]]


def rows_of(
    prediction: Prediction, observed: Observed, items: Sequence[list[int]], measured: Sequence[dict[str, torch.Tensor]]
) -> Iterator[tuple[int, dict]]:
    """A row per answer, each with the answer's number.

    Args:
        items (`list[list[int]]`): Which answers the rows of each batch are; those of a batch without any are left out.
        measured (`list[dict]`): Per batch, by name, (N,) nats: `logp` before the step and, if it was taken, `true`.
    """
    for part, found, more in zip(items, prediction.found, measured, strict=True):
        lengths = [len(observed.encoded.items[item].response_ids) for item in part]
        # The labels of a batch are those of its first row, then those of its second, and so on.
        values = {name: values_N.cpu().split(lengths) for name, values_N in (found | more).items()} if part else {}
        for row, item in enumerate(part):
            yield item, _row(prediction, observed, item, {name: answers[row] for name, answers in values.items()})


def table_of(rows: Sequence[dict]) -> pa.Table:
    """The rows as a table of [`influence.kind.INFLUENCE`]."""
    return INFLUENCE.table({name: [row[name] for row in rows] for name in INFLUENCE.schema.names})


def _row(prediction: Prediction, observed: Observed, item: int, tokens: dict[str, torch.Tensor]) -> dict:
    encoded = observed.encoded.items[item]
    sums = {name: float(values.sum(dtype=torch.float64)) for name, values in tokens.items()}
    return {
        "model": MODEL_NAME,
        "step": prediction.step,
        "update": prediction.update,
        "probe_id": encoded.probe_id,
        "response_type": encoded.response_type,
        "num_tokens": len(encoded.response_ids),
        **{column: sums.get(name, NAN) for column, name in _SUMS.items()},
        **prediction.facts,
        "token_ids": list(encoded.response_ids),
        "token_texts": observed.texts[item],
        PREDICTED: tokens[PREDICTED].tolist(),
        TRUE: tokens[TRUE].tolist() if TRUE in tokens else [],
    }
