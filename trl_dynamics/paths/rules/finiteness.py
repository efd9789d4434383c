"""Log-probabilities that are NaN or infinite: the finding about them, and what other findings say of them."""

import functools
from collections.abc import Callable
from dataclasses import replace

from trl_dynamics.findings.finding import ALERT, Finding
from trl_dynamics.findings.rules import Run, rule
from trl_dynamics.paths.summary import Summary

Counts = dict[str, tuple[int, int]]
Judge = Callable[[Summary, Run], Finding | None]


def over_finite_probes(judge: Judge) -> Judge:
    """For findings about changes: a sentence says over how many probes, where answers of any step are not finite."""

    @functools.wraps(judge)
    def judge_and_say(summary: Summary, run: Run) -> Finding | None:
        finding = judge(summary, run)
        if finding is None or not any(part.not_finite[0] for part in summary.parts):
            return finding
        finite, number = summary.changes().num_finite
        note = f" Changes are over the {finite} of {number} probes that are finite at both ends."
        return replace(finding, text=finding.text + note)

    return judge_and_say


@rule(at_once=True, not_finite=ALERT)
def not_finite(summary: Summary, run: Run) -> Finding | None:
    """What the model gives to answers, or to its own, is NaN or infinite at some step; one scoring is enough."""
    greedy = summary.samples.not_finite if summary.samples is not None else {}
    counts = {part.step: {"scored": part.not_finite} for part in summary.parts}
    counts |= {step: counts.get(step, {}) | {"greedy": found} for step, found in greedy.items()}
    bad = sorted(step for step, found in counts.items() if any(lost for lost, _ in found.values()))
    if not bad:
        return None
    first, last = bad[0], summary.steps[-1]
    lost, scored = counts[last]["scored"]
    when = f"from step {first} to {bad[-1]}" if first < bad[-1] < last else f"at step {first}"
    when = f"from step {first} on" if bad[-1] == last else when
    late = "" if first == last else f" At step {last}, the last one: {_in_words(counts[last])}."
    left = "No mean and no chart counts these." if lost < scored else "Nothing else can be said of the end of the run."
    return Finding(
        "not_finite",
        ALERT,
        f"log-probabilities are NaN or infinite {when}",
        f"Answers with a log-probability that is NaN or infinite at step {first}: {_in_words(counts[first])}.{late} "
        f"{left}",
        {
            "first_step": float(first),
            "steps_not_finite": float(len(bad)),
            "steps": float(len(counts)),
            "not_finite": float(lost),
            "scored": float(scored),
        }
        | ({"greedy_not_finite": float(counts[last]["greedy"][0])} if "greedy" in counts[last] else {}),
        "At any scoring, the log-probability of an answer, or another number measured of it, is NaN or infinite.",
        f"Look at loss and grad_norm up to step {first}. Go on from a checkpoint before it with a smaller learning "
        "rate, with max_grad_norm set, or with bf16 instead of fp16. If the first step is affected, look for NaN in "
        "the weights that were loaded.",
    )


def _in_words(counts: Counts) -> str:
    return " and ".join(f"{lost:,} of {number:,} {kind}" for kind, (lost, number) in counts.items())
