"""Squeezing metrics: where does probability go while a model learns, and which answers pay for it?

A metric is a function of two steps of one run and one model: `start`, the first recorded one, and `now`. Everything
that is called a change is paired: a probe counts only where it was scored at both. [`paths.summary`] applies them
to every step of a frame or a store.

    start, now   [`StepTable`]s; `start` has the layout of `now`
    values_TP    response types x probes, NaN where not scored
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from trl_dynamics.drawing.terms import Metric, described
from trl_dynamics.paths.step_table import StepTable, split_frame
from trl_dynamics.probing.schema import RANDOM, REPHRASE, group_of, order_types

# Third parties are what training neither pushes up nor down by name. The model's own first answer is left out: it is
# close to what the model says anyway, and so often wins where the others lose.
NOT_THIRD_PARTY = ("chosen", "rejected", "chosen_initial")

PER_TOKEN, PER_SEQUENCE = "logp_mean", "logp_sum"
NOT_FINITE = "probe/not_finite"

# Every metric by its name, in the order of pages and tables.
METRICS: dict[str, Metric] = {}


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


@described(
    METRICS,
    title="gap argmax − chosen",
    meaning="How far the chosen token lies below the likeliest token, averaged along the chosen response.",
    formula="mean over probes of (Σ max_v log π(v) − Σ log π(chosen)) / tokens",
    unit="nats per token",
    healthy="constant or falling; widening means that what gains is not what you chose",
)
def argmax_minus_chosen(start: StepTable, now: StepTable) -> float:
    return mean(gap_per_token(now))


@described(
    METRICS,
    title="argmax along chosen",
    meaning="Log-probability of the likeliest token at every position of the chosen response, which is fed to the "
    "model.",
    formula="mean over probes of Σ max_v log π(v | prompt, chosen prefix) / tokens",
    unit="nats per token",
    healthy="rises together with chosen; rising alone is the squeezing effect",
)
def argmax_logp(start: StepTable, now: StepTable) -> float:
    return mean(argmax_per_token(now))


@described(
    METRICS,
    title="other fluent answers",
    meaning="Change of the fluent answers that training pushes neither up nor down: unrelated answers, paraphrases of "
    "chosen, types of your own. Findings and comparisons speak of these.",
    formula="mean over these types of the mean over probes of logp_mean(now) − logp_mean(start)",
    unit="nats per token, change since start",
    healthy="about 0; falling means that these answers pay",
)
def other_fluent_logp(start: StepTable, now: StepTable) -> float:
    return _mean_change(start, now, bystander_types(now.types))


@described(
    METRICS,
    title="all types but chosen and rejected",
    meaning="Change of every type but chosen, rejected and chosen_initial: other fluent answers, and with them "
    "shuffled words and paraphrases of rejected. Logged as squeeze/third_party_logp.",
    formula="mean over these types of the mean over probes of logp_mean(now) − logp_mean(start)",
    unit="nats per token, change since start",
    healthy="about 0; shuffled words may fall far without harm, so read other fluent answers first",
)
def third_party_logp(start: StepTable, now: StepTable) -> float:
    return _mean_change(start, now, third_party_types(now.types))


@described(
    METRICS,
    title="drained mass",
    meaning="Probability that went, along the rejected response, from all other tokens to y− (the rejected token) and "
    "y*.",
    formula="mean over probes of rest(start) − rest(now), rest = mean over positions of 1 − π(y−) − π(y*)",
    unit="probability per position; y* is the likeliest token besides y− at the start and stays frozen",
    healthy="about 0; positive: y* collects what all others lose; negative: y− was likely at many positions, and what "
    "it gave up there went to others than y*; squeezing where y− was unlikely, or along chosen, is not ruled out",
    span=0.02,
)
def drained_mass(start: StepTable, now: StepTable) -> float:
    return mean(start.row("rejected", "rest_mass_mean") - now.row("rejected", "rest_mass_mean"))


@described(
    METRICS,
    title="entropy",
    meaning="How undecided the model is about the next token, averaged along the chosen response.",
    formula="mean over probes of the mean over positions of −Σ π(v) log π(v)",
    unit="nats",
    healthy="falls slowly; losing half of it within a run is a collapse",
)
def entropy(start: StepTable, now: StepTable) -> float:
    return mean(now.row("chosen", "entropy_mean"))


@described(
    METRICS,
    title="margin growth",
    meaning="How much further chosen is ahead of rejected than at the start; times beta it is DPO's reward margin.",
    formula="mean over probes of [log π(chosen) − log π(rejected)](now) − [the same](start), summed over tokens",
    unit="nats per sequence, change since start",
    healthy="rises because chosen rises, not only because rejected falls",
)
def margin(start: StepTable, now: StepTable) -> float:
    before, after = (step.row("chosen", PER_SEQUENCE) - step.row("rejected", PER_SEQUENCE) for step in (start, now))
    return mean(after - before)


@described(
    METRICS,
    title="end of turn after chosen",
    meaning="Log-probability of stopping where the chosen response stops; responses that were cut do not count.",
    formula="mean over probes of log π(end of turn | prompt, chosen)",
    unit="nats",
    healthy="constant or rising; falling means longer, perhaps endless answers",
)
def eos_logp(start: StepTable, now: StepTable) -> float:
    return mean(now.row("chosen", "eos_logp"))


@described(
    METRICS,
    title="displacement of chosen",
    meaning="How far chosen has moved since the start. Falling is benign while paraphrases hold, harmful when they "
    "fall.",
    formula="mean over probes of logp_mean(now) − logp_mean(start)",
    unit="nats per token, change since start",
    healthy="rising; falling is common in DPO and worth a look at the paraphrases",
    source="arXiv 2410.08847",
)
def displacement(start: StepTable, now: StepTable) -> float:
    return mean(now.row("chosen", PER_TOKEN) - start.row("chosen", PER_TOKEN))


@described(
    METRICS,
    title="probability off chosen",
    meaning="What the model gives to all tokens but the chosen one, averaged along the chosen response.",
    formula="mean over probes of the mean over positions of 1 − π(chosen)",
    unit="probability per position",
    healthy="falls",
)
def miss_chosen(start: StepTable, now: StepTable) -> float:
    return mean(1.0 - now.row("chosen", "prob_mean"))


@described(
    METRICS,
    title="force on chosen ‖G‖",
    meaning="Length of the gap between the prediction and the chosen token: how hard a step on chosen pulls.",
    formula="mean over probes of the root mean square over positions of ‖π − e‖, ‖π − e‖² = 1 − 2π(chosen) + Σ π(v)²",
    unit="no unit; 0 to √2",
    healthy="falls as chosen is learnt",
    source="arXiv 2407.10490, G of the AKG decomposition",
)
def residual_chosen(start: StepTable, now: StepTable) -> float:
    return mean(_residual(now, "chosen"))


@described(
    METRICS,
    title="force on rejected ‖G‖",
    meaning="The same along rejected: how hard a negative gradient pushes, before DPO's β(1 − a).",
    formula="as on chosen, along rejected",
    unit="no unit; 0 to √2",
    healthy="not much above chosen; high where rejected is unlikely already, which is where pushing squeezes",
    source="arXiv 2407.10490, G of the AKG decomposition",
)
def residual_rejected(start: StepTable, now: StepTable) -> float:
    return mean(_residual(now, "rejected"))


@described(
    METRICS,
    title="normaliser ‖A‖ on chosen",
    meaning="How strongly a change of the logits changes log-probabilities: the more peaked the distribution, the "
    "more.",
    formula="mean over probes of the root mean square over positions of ‖I − 1πᵀ‖, ‖·‖² = V − 2 + V Σ π(v)²",
    unit="no unit; √(V − 1) for a uniform distribution, √(2V − 2) for a certain one",
    healthy="rises slowly; fast on chosen and rejected alike means that everything becomes peaked",
    source="arXiv 2407.10490, A of the AKG decomposition",
)
def normalizer_chosen(start: StepTable, now: StepTable) -> float:
    return mean(_normalizer(now, "chosen"))


@described(
    METRICS,
    title="normaliser ‖A‖ on rejected",
    meaning="The same along rejected.",
    formula="as on chosen, along rejected",
    unit="no unit",
    healthy="rises no faster than on chosen",
    source="arXiv 2407.10490, A of the AKG decomposition",
)
def normalizer_rejected(start: StepTable, now: StepTable) -> float:
    return mean(_normalizer(now, "rejected"))


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
