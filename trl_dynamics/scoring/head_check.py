"""The start-up check of what is scored: log-probabilities are those of the model's own logits."""

import logging

import torch
from torch import nn

from trl_dynamics import stats_head
from trl_dynamics.probing.encode import EncodedProbes
from trl_dynamics.probing.layouts import PaddedLayout
from trl_dynamics.scoring.engine import ProbeEngine
from trl_dynamics.stats_head.check import Precision

logger = logging.getLogger(__name__)


def settle_head(engine: ProbeEngine, model: nn.Module, fallback: PaddedLayout, *, required: bool) -> None:
    """Compare one short row with the model's own logits; a model that needs its own forward gets smaller batches.

    All processes call this together, before the first scoring of a run and before the layouts are compared.

    Args:
        engine ([`ProbeEngine`]): Whose batches shrink where the model's own forward is used.
        model (`nn.Module`): As for [`ProbeEngine.score`].
        fallback ([`PaddedLayout`]): The layout that is right for every model.
        required (`bool`): Whether the engine's layout was asked for by name.

    Raises:
        ValueError: If no way of scoring gives the model's own log-probabilities, or the layout that was asked for
            does not fit the one that does.
    """
    with engine.scoring(model) as device:

        def by_all(holds: bool) -> bool:
            return int(engine.all_sum(torch.tensor(int(not holds)), device)) == 0

        stats_head.settle(model, checked_row(engine.encoded), _precision(engine, model), by_all)
    most = stats_head.own_forward_tokens(model)
    if most is None:
        return
    if required:
        raise ValueError(
            f"probe_layout={engine.layout.name!r} does not fit a model that is scored by its own forward; use "
            "probe_layout='auto' or 'padded'"
        )
    engine.use(fallback.at_most(most))


def confirm_head(engine: ProbeEngine, model: nn.Module) -> float | None:
    """Compare once more, at the last scoring; all processes call this together.

    Returns:
        `float` or `None`: How far log-probabilities are apart, in nats; None where they agree.
    """
    with engine.scoring(model):
        return stats_head.confirm(model, checked_row(engine.encoded), _precision(engine, model))


def checked_row(encoded: EncodedProbes) -> tuple[int, ...]:
    """A row of middle length, the same in every process."""
    ranked = sorted(encoded.items, key=lambda item: (len(item.input_ids), item.probe_id, item.response_type))
    return ranked[len(ranked) // 2].input_ids


def _precision(engine: ProbeEngine, model: nn.Module) -> Precision:
    return Precision(engine.computes_in_half(model), engine.float32)
