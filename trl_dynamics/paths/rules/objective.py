"""Findings about DPO's own objective: a training loss above that of the reference, reward accuracy below one half.

They read what the trainer logged while it trained ([`paths.training`]), so that models which were scored afterwards
are not judged by it.
"""

import math

import numpy as np

from trl_dynamics.findings.effects import MIN_PROBES, STANDARD_ERRORS, Effect
from trl_dynamics.findings.finding import ALERT, WARNING, Finding
from trl_dynamics.findings.rules import Run, rule
from trl_dynamics.paths.changes import Changes
from trl_dynamics.paths.metrics import PER_SEQUENCE
from trl_dynamics.paths.summary import Summary

# Nats above ln 2, and share below one half, that count, and by how many standard errors over lines. Fixed on
# development runs on random preferences, where no margin can be learnt: at learning rates that did no harm the loss
# ended within 0.02 of ln 2, while accuracy is a coin's, and so needs more.
MIN_LOSS_EXCESS, MIN_ACCURACY_LACK = 0.02, 0.02
LOSS_ERRORS, ACCURACY_ERRORS = 1.0, STANDARD_ERRORS
ALERT_LOSS = 2 * math.log(2)
ACCURACY = "rewards/accuracies"

_NOISE = f"and, from {MIN_PROBES} lines on, more than {{:g}} standard errors over lines"
_COINS = "; of fewer lines, as many of coins tossed for each of their pairs"
_LOOK = (
    "Lower the learning rate first, or warm it up, or set max_grad_norm. Then check that chosen and rejected are not "
    "swapped, and that beta is as meant."
)


@rule(loss_above_reference=(ALERT, WARNING))
def loss_above_reference(summary: Summary, run: Run) -> Finding | None:
    """At the end DPO's loss is above ln 2, which the reference has on any pairs."""
    method = run.method
    if not loss_is_above(summary, method):
        return None
    loss, accuracy = summary.training.late("loss"), summary.training.late(ACCURACY)
    known = f", with a reward accuracy of {accuracy.mean():.2f}" if len(accuracy) else ""
    return Finding(
        "loss_above_reference",
        ALERT if loss.mean() >= ALERT_LOSS else WARNING,
        "the training loss ended above that of the reference model",
        f"Over the last quarter of the log ({len(loss)} lines) the mean training loss is {loss.mean():.2f}{known}. A "
        "policy equal to the reference has ln 2 = 0.69 on any pairs: training made its own loss worse than none.",
        {"loss": float(loss.mean()), "lines": float(len(loss))}
        | ({"reward_accuracy": float(accuracy.mean())} if len(accuracy) else {}),
        f"DPO with the sigmoid loss alone: the mean of the logged training loss over the last quarter of its lines is "
        f"at least {MIN_LOSS_EXCESS} above ln 2, {_NOISE.format(LOSS_ERRORS)}. Alert from 2 ln 2. Not for models "
        "that were scored after training.",
        _LOOK,
    )


@rule(accuracy_below_half=WARNING)
def accuracy_below_half(summary: Summary, run: Run) -> Finding | None:
    """At the end, pairs that a DPO loss got wrong outnumber those it got right."""
    changes, method = summary.changes(), run.method
    if not accuracy_is_below(summary, changes, method):
        return None
    strict, ties = summary.training.late(ACCURACY), share_of_ties(changes)
    accuracy = strict + ties / 2
    counted = f", with {ties:.0%} of ties, as among the probes, counted half" if ties else ""
    return Finding(
        "accuracy_below_half",
        WARNING,
        "reward accuracy ended below one half",
        f"Over the last quarter of the log ({len(strict)} lines) the mean reward accuracy is {accuracy.mean():.2f}"
        f"{counted}: in more training pairs rejected gained on chosen than the other way round.",
        {"reward_accuracy": float(accuracy.mean()), "ties": ties, "lines": float(len(strict))},
        f"DPO with another loss than the sigmoid alone: the mean of the logged reward accuracy over the last quarter "
        f"of its lines is at least {MIN_ACCURACY_LACK} below one half, {_NOISE.format(ACCURACY_ERRORS)}{_COINS}. TRL "
        "counts ties as misses; the share of probes whose margin has not moved at all is taken for that of ties. Not "
        "for models that were scored after training.",
        _LOOK,
    )


def loss_is_above(summary: Summary, method: str, excess: float = MIN_LOSS_EXCESS) -> bool:
    """Whether a run with the plain sigmoid loss ended so far above ln 2."""
    training = summary.training
    if method != "dpo" or training is None or not training.is_plain_sigmoid:
        return False
    return _is_above(training.late("loss"), math.log(2), excess, LOSS_ERRORS)


def accuracy_is_below(summary: Summary, changes: Changes, method: str, lack: float = MIN_ACCURACY_LACK) -> bool:
    """Whether a run with another loss of DPO's ended with an accuracy so far below one half, ties counted half."""
    training = summary.training
    if method != "dpo" or training is None or training.is_plain_sigmoid:
        return False
    coins = 0.5 / math.sqrt(max(1, training.late_pairs(ACCURACY)))
    return _is_above(-training.late(ACCURACY) - share_of_ties(changes) / 2, -0.5, lack, ACCURACY_ERRORS, coins)


def share_of_ties(changes: Changes) -> float:
    """Share of the probes whose margin is to the bit what it was at the start; 0 where it is not known."""
    margin = changes.delta(["chosen"], PER_SEQUENCE)["chosen"] - changes.delta(["rejected"], PER_SEQUENCE)["rejected"]
    margin = margin.dropna()
    return float((margin == 0).mean()) if len(margin) else 0.0


def _is_above(
    values: np.ndarray, level: float, least: float, standard_errors: float, error_of_few: float = 0.0
) -> bool:
    """Whether a mean over lines exceeds a level by so much; few lines do not show their noise, which is given."""
    if not len(values) or values.mean() - level < least:
        return False
    if len(values) < MIN_PROBES:
        return bool(values.mean() - level > standard_errors * error_of_few)
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return Effect(float(values.mean()) - level, error, len(values)).up(least, standard_errors)
