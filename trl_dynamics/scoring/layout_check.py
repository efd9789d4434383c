"""The start-up check: prompts are shared only where a model's own numbers say that it may be done."""

import logging
import math

import torch
from torch import nn

from trl_dynamics.probing.encode import EncodedProbes
from trl_dynamics.probing.layouts import Layout
from trl_dynamics.scoring.engine import ProbeEngine

logger = logging.getLogger(__name__)

# Mean over responses of |difference of logp_mean|, nats per token. Rounding gives about 1e-6 and 1e-2; a wrong mask or
# wrong positions give tenths to several nats.
TOLERANCE, HALF_TOLERANCE = 1e-3, 1e-1


def settle_layout(engine: ProbeEngine, model: nn.Module, fallback: Layout, *, required: bool) -> None:
    """Score two probes in the engine's layout and in `fallback`; where they disagree, go on with `fallback`.

    All processes call this together, before the first scoring of a run.

    Args:
        engine ([`ProbeEngine`]): Whose layout is checked; it is the one that changes.
        model (`nn.Module`): As for [`ProbeEngine.score`].
        fallback ([`Layout`]): The layout that is right for every model.
        required (`bool`): Whether the layout was asked for by name, so that it may not be given up.

    Raises:
        ValueError: If the layouts disagree, or the engine's does not run, and `required` is set.
    """
    if engine.layout.name == fallback.name:
        return
    sample = two_probes(engine.encoded)
    padded = _logp_mean(engine, model, sample, fallback)
    tolerance = HALF_TOLERANCE if engine.computes_in_half(model) else TOLERANCE
    try:
        shared = _logp_mean(engine, model, sample, engine.layout)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # What a model does with a cache that it does not expect is its own.
        reason = (str(error).splitlines() or [""])[0]
        what = f"the layout {engine.layout.name!r} does not run on this model ({type(error).__name__}: {reason:.100})"
    else:
        # Every process sees the same sums, so all of them come to the same verdict.
        apart = _apart(shared, padded)
        if apart <= tolerance:
            return
        what = (
            f"the layouts {engine.layout.name!r} and {fallback.name!r} differ by {apart:.2g} nats per token on this "
            f"model (allowed: {tolerance:g})"
        )
    if required:
        raise ValueError(f"{what}; use probe_layout='auto' or 'padded'")
    logger.warning(f"{what}: probes are scored as {fallback.name!r}, which is slower")
    engine.use(fallback)


def two_probes(encoded: EncodedProbes) -> EncodedProbes:
    """All responses of two probes whose prompts differ in length where any do, neither the longest of the set."""
    tokens: dict[str, int] = {}
    for item in encoded.items:
        tokens[item.probe_id] = tokens.get(item.probe_id, 0) + len(item.input_ids)
    ranked = sorted(tokens, key=lambda probe_id: (tokens[probe_id], probe_id))
    wanted = {ranked[len(ranked) // 4], ranked[len(ranked) // 2]}
    return EncodedProbes(tuple(item for item in encoded.items if item.probe_id in wanted))


def _apart(shared: list[float], padded: list[float]) -> float:
    """Mean |difference| over responses that `padded` can tell.

    Weights that are not finite say nothing about a layout, and spread from padding to the rows that it fills.
    """
    known = [(a, b) for a, b in zip(shared, padded, strict=True) if math.isfinite(b)]
    return sum(abs(a - b) for a, b in known) / len(known) if known else 0.0


def _logp_mean(engine: ProbeEngine, model: nn.Module, sample: EncodedProbes, layout: Layout) -> list[float]:
    probe = ProbeEngine(sample, layout, accelerator=engine.accelerator, float32=engine.float32)
    values = probe.score(model).columns["logp_mean"]
    return [value if math.isfinite(value) else math.inf for value in values]
