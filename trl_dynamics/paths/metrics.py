"""Squeezing metrics: where does probability go while a model learns, and which answers pay for it?

A metric is a function of two steps of one run and one model: `start`, the first recorded one, and `now`. Everything
that is called a change is paired: a probe counts only where it was scored at both. [`paths.summary`] applies them
to every step of a frame or a store.

    start, now   [`StepTable`]s; `start` has the layout of `now`
    values_TP    response types x probes, NaN where not scored
"""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

from trl_dynamics.paths.step_table import StepTable, split_frame
from trl_dynamics.probing.schema import RANDOM, REPHRASE, group_of, order_types

# Third parties are what training neither pushes up nor down by name. The model's own first answer is left out: it is
# close to what the model says anyway, and so often wins where the others lose.
NOT_THIRD_PARTY = ("chosen", "rejected", "chosen_initial")

PER_TOKEN, PER_SEQUENCE = "logp_mean", "logp_sum"
NOT_FINITE = "probe/not_finite"


def third_party_types(types: Iterable[str]) -> list[str]:
    """The response types that training does not touch by name: all but chosen, rejected and chosen_initial."""
    return [name for name in order_types(types) if name not in NOT_THIRD_PARTY]


def bystander_types(types: Iterable[str]) -> list[str]:
    """Other fluent answers: third-party types that are fluent text and that nothing pushes down by meaning.

    Shuffled words are left out, and paraphrases of rejected: they fall because training does what it is asked for.
    """
    fluent = [name for name in third_party_types(types) if group_of(name) != RANDOM]
    return [name for name in fluent if not (name.startswith("rejected_") and group_of(name) == REPHRASE)]


def mean(values: np.ndarray) -> float:
    """Mean of what is not NaN; NaN if nothing is left."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


def argmax_logp(start: StepTable, now: StepTable) -> float:
    """Log-probability of the likeliest token along the chosen response, teacher-forced.

    mean over probes of [ sum over positions of max_v log pi(v | prompt, chosen prefix) ] / num_tokens, on `chosen`.

    Unit: nats per token, at most 0. Healthy: rises together with chosen. Suspicious: rises while chosen does not.
    """
    return mean(argmax_per_token(now))


def argmax_minus_chosen(start: StepTable, now: StepTable) -> float:
    """How far the chosen token lies below the likeliest token, on average over the chosen response.

    mean over probes of (argmax_logp_sum - logp_sum) / num_tokens, on `chosen`.

    Unit: nats per token, at least 0. Healthy: constant or falling. Widening means that what gains is neither chosen.
    """
    return mean(gap_per_token(now))


def drained_mass(start: StepTable, now: StepTable) -> float:
    """Probability that the rejected response's positions lost to y-, y* and nothing else, since the start.

    mean over probes of rest(start) - rest(now), rest = mean over positions of 1 - pi(y-) - pi(y*), on `rejected`;
    y* is the likeliest label besides y- at the baseline and stays the same one ever after.

    Unit: probability per position, in [-1, 1]. Healthy: about 0. Positive: every other label pays for y*. Negative:
    the others gained, for y- (or y*) gave up more than the other one took. That is what pushing y- down does at
    positions where y- was likely; squeezing happens where it was not, so a negative mean does not rule it out.
    """
    return mean(start.row("rejected", "rest_mass_mean") - now.row("rejected", "rest_mass_mean"))


def third_party_logp(start: StepTable, now: StepTable) -> float:
    """What happened to the answers nobody trained on: mean change of their log-probability since the start.

    mean over third-party types of the mean over probes of logp_mean(now) - logp_mean(start).

    Unit: nats per token. Healthy: about 0, or rising a little with chosen. Falling: side effects on other answers.
    """
    return _mean_change(start, now, third_party_types(now.types))


def other_fluent_logp(start: StepTable, now: StepTable) -> float:
    """What happened to the other fluent answers, of which findings and comparisons speak: their mean change.

    mean over [`bystander_types`] of the mean over probes of logp_mean(now) - logp_mean(start).

    Unit: nats per token. Healthy: about 0, or rising a little with chosen. Falling: side effects on other answers.
    """
    return _mean_change(start, now, bystander_types(now.types))


def entropy(start: StepTable, now: StepTable) -> float:
    """Entropy of the next-token distribution along the chosen response.

    mean over probes of the mean over positions of - sum_v pi(v) log pi(v), on `chosen`.

    Unit: nats. Healthy: falls slowly. Halving within a run is a collapse: sampling will repeat itself.
    """
    return mean(now.row("chosen", "entropy_mean"))


def displacement(start: StepTable, now: StepTable) -> float:
    """How far chosen has moved since the start.

    mean over probes of logp_mean(now) - logp_mean(start), on `chosen`.

    Unit: nats per token. Healthy: rising. Falling is likelihood displacement (arXiv 2410.08847): benign while
    paraphrases and other answers hold, harmful when they fall too.
    """
    return mean(now.row("chosen", PER_TOKEN) - start.row("chosen", PER_TOKEN))


def residual_chosen(start: StepTable, now: StepTable) -> float:
    """Length of the prediction gap ||pi - e_y|| along chosen, the force of an SFT step on it.

    mean over probes of the root mean square over positions of ||pi - e_y||, whose square is
    1 - 2 pi(y) + sum_v pi(v)^2; on `chosen` (arXiv 2407.10490, G of the AKG decomposition).

    Unit: none, in [0, sqrt(2)]. Healthy: falls as chosen is learnt. Near 0: nothing is left to learn there.
    """
    return mean(_residual(now, "chosen"))


def residual_rejected(start: StepTable, now: StepTable) -> float:
    """Length of the prediction gap ||pi - e_y|| along rejected: the force of the negative gradient, without beta.

    As [`residual_chosen`], on `rejected`.

    Unit: none, in [0, sqrt(2)]. Healthy: not much above that of chosen. Near 1 or more with a low pi(y): the
    rejected answer lies in a valley, and pushing it further down squeezes.
    """
    return mean(_residual(now, "rejected"))


def miss_chosen(start: StepTable, now: StepTable) -> float:
    """Probability that does not go to the chosen token.

    mean over probes of the mean over positions of 1 - pi(y), on `chosen`.

    Unit: probability per position. Healthy: falls.
    """
    return mean(1.0 - now.row("chosen", "prob_mean"))


def normalizer_chosen(start: StepTable, now: StepTable) -> float:
    """Size of the softmax normalisation ||A||_F along chosen, A = I - 1 pi^T: how strongly logits move log pi.

    mean over probes of the root mean square over positions of ||A||_F, whose square is V - 2 + V sum_v pi(v)^2; on
    `chosen` (arXiv 2407.10490, A of the AKG decomposition).

    Unit: none, between sqrt(V - 1) for a uniform distribution and sqrt(2 V - 2) for a certain one. Healthy: rises
    slowly. Rising fast on chosen and rejected alike: the whole distribution becomes peaky.
    """
    return mean(_normalizer(now, "chosen"))


def normalizer_rejected(start: StepTable, now: StepTable) -> float:
    """Size of the softmax normalisation ||A||_F along rejected.

    As [`normalizer_chosen`], on `rejected`.

    Unit: none. Healthy: rises no faster than along chosen.
    """
    return mean(_normalizer(now, "rejected"))


def margin(start: StepTable, now: StepTable) -> float:
    """Growth of the preference margin since the start: DPO's reward margin over beta, if the start is pi_ref.

    mean over probes of [ logp_sum(chosen) - logp_sum(rejected) ](now) - [ same ](start).

    Unit: nats per sequence. Healthy: rises because chosen rises. Rising only because rejected falls is fragile.
    """
    before, after = (step.row("chosen", PER_SEQUENCE) - step.row("rejected", PER_SEQUENCE) for step in (start, now))
    return mean(after - before)


def eos_logp(start: StepTable, now: StepTable) -> float:
    """Log-probability of the end-of-turn token right after the chosen response; cut responses do not count.

    mean over probes of eos_logp, on `chosen`.

    Unit: nats. Healthy: constant or rising. Falling: answers get longer, or never stop.
    """
    return mean(now.row("chosen", "eos_logp"))


def argmax_per_token(step: StepTable) -> np.ndarray:
    """Per probe, the likeliest tokens' log-probability along chosen, nats per token."""
    return step.row("chosen", "argmax_logp_sum") / step.row("chosen", "num_tokens")


def gap_per_token(step: StepTable) -> np.ndarray:
    """Per probe, the likeliest token minus the chosen one along chosen, nats per token."""
    gap = step.row("chosen", "argmax_logp_sum") - step.row("chosen", "logp_sum")
    return gap / step.row("chosen", "num_tokens")


def _mean_change(start: StepTable, now: StepTable, types: Iterable[str]) -> float:
    """Mean over types of the mean over probes of the change since the start, nats per token."""
    return mean(np.array([mean(now.row(name, PER_TOKEN) - start.row(name, PER_TOKEN)) for name in types]))


def _residual(step: StepTable, response_type: str) -> np.ndarray:
    """Per probe, the root mean square of ||pi - e_y||; rounding may take a zero below 0."""
    prob, sum_sq = (step.row(response_type, column) for column in ("prob_mean", "sum_sq_mean"))
    return np.sqrt(np.maximum(1.0 - 2.0 * prob + sum_sq, 0.0))


def _normalizer(step: StepTable, response_type: str) -> np.ndarray:
    """Per probe, the root mean square of ||A||_F; NaN where the vocabulary's size is not known."""
    size = np.nan if step.vocab_size is None else float(step.vocab_size)
    return np.sqrt(size - 2.0 + size * step.row(response_type, "sum_sq_mean"))


def scalars(frame: pd.DataFrame, vocab_size: int | None = None) -> dict[str, float]:
    """The last step's values for trackers: `probe/<type>/logp_mean` (nats per token) and `squeeze/<metric>`.

    A metric whose response types are missing is left out. Means are over finite answers; where none is finite the
    key stays, with NaN. `probe/not_finite` is the share of scored answers that are not finite.

    Args:
        frame (`pandas.DataFrame`): Records of one run and one model; only the first and the last step matter.
        vocab_size (`int`, *optional*): Of the model; without it the normaliser's size is left out.
    """
    steps = frame["step"]
    ends = [steps.min(), steps.max()]
    tables = split_frame(frame[steps.isin(ends)] if steps.nunique() > 2 else frame, vocab_size)
    return step_scalars(tables[0], tables[-1])


def step_scalars(start: StepTable, now: StepTable) -> dict[str, float]:
    """[`scalars`] of two steps that are tables already."""
    start = start.like(now)
    values, (lost, scored) = _values(start, now), now.not_finite
    applies = values
    if lost or start.not_finite[0]:
        applies = _values(start.presence(), now.presence())
    known = {key: value for key, value in values.items() if not np.isnan(applies[key])}
    return known | {NOT_FINITE: lost / scored}


def _values(start: StepTable, now: StepTable) -> dict[str, float]:
    """Every scalar by its key; NaN where types are lacking, or nothing is finite."""
    means = {f"probe/{name.lower()}/logp_mean": mean(now.row(name, PER_TOKEN)) for name in now.types}
    return means | {f"squeeze/{name}": metric(start, now) for name, metric in METRICS.items()}


METRICS: dict[str, Callable[[StepTable, StepTable], float]] = {
    "argmax_minus_chosen": argmax_minus_chosen,
    "argmax_logp": argmax_logp,
    "third_party_logp": third_party_logp,
    "other_fluent_logp": other_fluent_logp,
    "drained_mass": drained_mass,
    "entropy": entropy,
    "margin": margin,
    "eos_logp": eos_logp,
    "displacement": displacement,
    "miss_chosen": miss_chosen,
    "residual_chosen": residual_chosen,
    "residual_rejected": residual_rejected,
    "normalizer_chosen": normalizer_chosen,
    "normalizer_rejected": normalizer_rejected,
}
