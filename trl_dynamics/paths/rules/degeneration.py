"""The finding about the model's own greedy answers: loops, stubs, or one phrase for many prompts.

Loops count as such, and so does one answer for all prompts; everything else counts as a change, since short answers
may be what is wanted.
"""

import math

from trl_dynamics.findings.effects import COUNTS, MIN_PROBES
from trl_dynamics.findings.finding import ALERT, WARNING, Finding
from trl_dynamics.findings.rules import Run, rule
from trl_dynamics.paths.rules.remedies import remedy_of
from trl_dynamics.paths.samples import Samples
from trl_dynamics.paths.summary import Summary

# Greedy answers: shares of distinct pairs of tokens, and tokens of the longest run said twice. Longer answers repeat
# a little more by themselves.
MIN_DISTINCT_FALL, ALERT_DISTINCT_FALL, MIN_REPEAT_GROWTH = 0.1, 0.3, 3.0
# An answer of which this share stands in immediate repetitions is a loop, as short as it may be ("Gladly! The...."). A
# healthy model has none, so that a few more are enough: so many, and so large a share of the answers.
LOOP, MIN_LOOPS, MIN_LOOP_SHARE = 0.5, 2, 0.1
# Shares of the answers that are loops at the end, whatever they were at the start. Fixed on development runs: where
# half of 8 answers were, a third and more of 144 held-out answers were, too; where a quarter was, a fifth and more.
LOOPING_SHARE, ALERT_LOOP_SHARE = 0.25, 0.5
# How often two prompts get the same answer at the end, from which on it is one answer for all, an empty one included.
ONE_FOR_ALL = 0.9
# Share of their length that greedy answers lose when they become stubs; how much likelier two prompts get one answer.
MIN_SHORTENING, MIN_SAMENESS = 0.5, 0.1


def since_when(summary: Summary, run: Run) -> str:
    """Which answers a finding is about: those of the start, which did not get worse, or those that did."""
    return "" if got_worse(summary, run.method) else " from the start"


@rule(phase=since_when, degeneration=(ALERT, WARNING))
def degeneration(summary: Summary, run: Run) -> Finding | None:
    """The model's own greedy answers are loops, or become loops, stubs of what they were, or one phrase for many."""
    method = run.method
    samples = summary.samples
    if samples is None:
        return None
    worse = worse_signs(samples, method)
    signs = worse | {"are loops": are_loops(samples), "are one for all": are_one(samples)}
    signs["are loops"] &= not signs["repeat themselves"]
    signs["are one for all"] &= not signs["are the same for different prompts"]
    if not any(signs.values()):
        return None
    numbers = _numbers(samples)
    alert = loop_share(samples) >= ALERT_LOOP_SHARE
    alert = alert or (signs["repeat themselves"] and -numbers["distinct_2_change"] >= ALERT_DISTINCT_FALL)
    always = numbers["loops_start"] >= LOOPING_SHARE * numbers["num_answers"] or signs["are one for all"]
    always = always and not any(worse.values())
    remedy = "Read the answers in the probe explorer, and use a checkpoint from before. "
    if always:
        remedy = "They were like that at the start already: look at that model, its chat template and end of turn. "
    return Finding(
        "degeneration",
        ALERT if alert else WARNING,
        f"degeneration: the model's own answers {' and '.join(sign for sign, holds in signs.items() if holds)}",
        _text(samples, numbers),
        numbers,
        f"greedy answers, first to last step: distinct-2 falls by at least {MIN_DISTINCT_FALL} and the longest repeat "
        f"grows by at least {MIN_REPEAT_GROWTH:g} tokens; or at least {MIN_LOOPS} more answers, and "
        f"{MIN_LOOP_SHARE:.0%} more of them, have {LOOP:.0%} of their tokens in immediate repetitions; or two prompts "
        f"get the same answer in {MIN_SAMENESS:.0%} more of cases; or their length falls by {MIN_SHORTENING:.0%}, but "
        "not for SFT, which teaches lengths, nor where less than half ended by themselves at the start; "
        f"{COUNTS}. Or, whatever was at the start, {LOOPING_SHARE:.0%} of the answers are loops at the last step, or "
        f"two prompts get the same answer in {ONE_FOR_ALL:.0%} of cases. "
        f"Alert from {ALERT_DISTINCT_FALL} of distinct-2, or where {ALERT_LOOP_SHARE:.0%} of the answers are loops.",
        f"{remedy}{remedy_of(method)} Decoding options (a repetition penalty, sampling) hide it without mending it.",
    )


def _numbers(samples: Samples) -> dict[str, float]:
    """What the finding is about, as evidence."""
    shares, lengths, loops = samples.value("repeat_share"), samples.value("length"), loops_of(samples)
    return {
        "distinct_2_change": samples.change("distinct_2").mean,
        "longest_repeat_change": samples.change("longest_repeat").mean,
        "repeat_share_start": shares[0],
        "repeat_share_end": shares[1],
        "loops_start": float(loops[0]),
        "loops_end": float(loops[1]),
        "same_share_change": samples.change("same_share").mean,
        "length_start": lengths[0],
        "length_end": lengths[1],
        "num_answers": float(num_finite(samples)),
    }


def _text(samples: Samples, numbers: dict[str, float]) -> str:
    ends, alike, number = samples.value("ended"), samples.value("same_share"), f"{numbers['num_answers']:.0f}"
    shares, loops, lengths = (
        [numbers[f"{name}_{end}"] for end in ("start", "end")] for name in ("repeat_share", "loops", "length")
    )
    if len(samples.steps) == 1 or math.isnan(shares[0]):
        return (
            f"At step {samples.steps[-1]} {shares[1]:.0%} of the tokens of greedy answers stand in immediate "
            f"repetitions, and {loops[1]:.0f} of {number} answers are loops; answers have {lengths[1]:.0f} tokens, "
            f"and {ends[1]:.0%} end by themselves."
        )
    return (
        f"From step {samples.steps[0]} to {samples.steps[-1]} the share of distinct token pairs in greedy answers "
        f"moved {samples.change('distinct_2')}, the longest run that an answer says twice "
        f"{samples.change('longest_repeat')} tokens. Of their tokens {shares[0]:.0%} stood in immediate repetitions "
        f"at the start and {shares[1]:.0%} do now, and {loops[1]:.0f} of {number} answers are loops (before "
        f"{loops[0]:.0f}); answers have {lengths[1]:.0f} tokens (before {lengths[0]:.0f}), and {ends[1]:.0%} end by "
        f"themselves (before {ends[0]:.0%}). Two different prompts get the same answer in {alike[1]:.0%} of cases "
        f"(before {alike[0]:.0%})."
    )


def worse_signs(samples: Samples, method: str) -> dict[str, bool]:
    """In which ways greedy answers got worse from the first to the last step."""
    lengths, ends = samples.value("length"), samples.value("ended")
    repeats = samples.change("distinct_2").down(MIN_DISTINCT_FALL)
    repeats = repeats and samples.change("longest_repeat").up(MIN_REPEAT_GROWTH)
    may_shrink = method == "sft" or ends[0] < 0.5
    return {
        "repeat themselves": repeats or more_loops(samples),
        "are the same for different prompts": samples.change("same_share").up(MIN_SAMENESS),
        "shrink to stubs": not may_shrink and samples.change("num_tokens").down(MIN_SHORTENING * lengths[0]),
    }


def got_worse(summary: Summary, method: str) -> bool:
    """Whether greedy answers were taken and got worse since the start."""
    return summary.samples is not None and any(worse_signs(summary.samples, method).values())


def are_loops(samples: Samples, least: float = LOOPING_SHARE) -> bool:
    """Whether so large a share of the answers at the last step are loops, whatever they were at the start."""
    return loop_share(samples) >= least


def are_one(samples: Samples) -> bool:
    """Whether nearly all prompts get the same answer at the last step, whatever it was at the start."""
    return num_finite(samples) >= MIN_PROBES and samples.value("same_share")[1] >= ONE_FOR_ALL


def loop_share(samples: Samples) -> float:
    """Share of the finite answers at the last step that are loops; 0 of too few to judge."""
    num_answers = num_finite(samples)
    return loops_of(samples)[1] / num_answers if num_answers >= MIN_PROBES else 0.0


def loops_of(samples: Samples) -> tuple[int, int]:
    """How many answers are loops at the first and at the last step."""
    looping = samples.finite["repeat_share"] >= LOOP
    start, end = (int(looping[samples.rows["step"] == step].sum()) for step in (samples.steps[0], samples.steps[-1]))
    return start, end


def num_finite(samples: Samples) -> int:
    """How many finite answers the last step has."""
    lost, number = samples.not_finite[samples.steps[-1]]
    return number - lost


def more_loops(samples: Samples, at_least: float = MIN_LOOPS) -> bool:
    """Whether answers became loops, by their number: a mean over few answers would not stand out of its noise."""
    (start, end), num_answers = loops_of(samples), samples.change("num_tokens").num_probes
    return num_answers >= MIN_PROBES and end - start >= max(at_least, MIN_LOOP_SHARE * num_answers)
