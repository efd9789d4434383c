"""The finding about the model's own greedy answers: loops, stubs, or one phrase for many prompts."""

from trl_dynamics.tracking.aggregate import Summary
from trl_dynamics.tracking.effects import COUNTS, MIN_PROBES, Changes
from trl_dynamics.tracking.finding import ALERT, REMEDIES, WARNING, Finding
from trl_dynamics.tracking.samples import Samples

# Greedy answers: shares of distinct pairs of tokens, and tokens of the longest run said twice. Longer answers repeat
# a little more by themselves.
MIN_DISTINCT_FALL, ALERT_DISTINCT_FALL, MIN_REPEAT_GROWTH = 0.1, 0.3, 3.0
# An answer of which this share stands in immediate repetitions is a loop, as short as it may be ("Gladly! The...."). A
# healthy model has none, so that a few more are enough: so many, and so large a share of the answers.
LOOP, MIN_LOOPS, MIN_LOOP_SHARE = 0.5, 2, 0.1
# Share of their length that greedy answers lose when they become stubs; how much likelier two prompts get one answer.
MIN_SHORTENING, MIN_SAMENESS = 0.5, 0.1


def degeneration(summary: Summary, changes: Changes, method: str) -> Finding | None:
    """The model's own greedy answers become loops, stubs of what they were, or one phrase for many prompts."""
    samples = summary.samples
    if samples is None or len(samples.steps) < 2:
        return None
    distinct, repeat = samples.change("distinct_2"), samples.change("longest_repeat")
    shares, lengths, ends = (samples.value(name) for name in ("repeat_share", "length", "ended"))
    repeats = distinct.down(MIN_DISTINCT_FALL) and repeat.up(MIN_REPEAT_GROWTH)
    may_shrink = method == "sft" or ends[0] < 0.5
    same, alike, loops = samples.change("same_share"), samples.value("same_share"), loops_of(samples)
    signs = {
        "repeat themselves": repeats or more_loops(samples),
        "are the same for different prompts": same.up(MIN_SAMENESS),
        "shrink to stubs": not may_shrink and samples.change("num_tokens").down(MIN_SHORTENING * lengths[0]),
    }
    if not any(signs.values()):
        return None
    return Finding(
        "degeneration",
        ALERT if repeats and -distinct.mean >= ALERT_DISTINCT_FALL else WARNING,
        f"degeneration: the model's own answers {' and '.join(sign for sign, holds in signs.items() if holds)}",
        f"From step {samples.steps[0]} to {samples.steps[-1]} the share of distinct token pairs in greedy answers "
        f"moved {distinct}, the longest run that an answer says twice {repeat} tokens. Of their tokens "
        f"{shares[0]:.0%} stood in immediate repetitions at the start and {shares[1]:.0%} do now, and {loops[1]} of "
        f"{distinct.num_probes} answers are loops (before {loops[0]}); answers have {lengths[1]:.0f} tokens "
        f"(before {lengths[0]:.0f}), and {ends[1]:.0%} end by themselves (before {ends[0]:.0%}). Two different "
        f"prompts get the same answer in {alike[1]:.0%} of cases (before {alike[0]:.0%}).",
        {
            "distinct_2_change": distinct.mean,
            "longest_repeat_change": repeat.mean,
            "repeat_share_start": shares[0],
            "repeat_share_end": shares[1],
            "loops_start": float(loops[0]),
            "loops_end": float(loops[1]),
            "same_share_change": same.mean,
            "length_start": lengths[0],
            "length_end": lengths[1],
            "num_answers": float(distinct.num_probes),
        },
        f"greedy answers, first to last step: distinct-2 falls by at least {MIN_DISTINCT_FALL} and the longest repeat "
        f"grows by at least {MIN_REPEAT_GROWTH:g} tokens; or at least {MIN_LOOPS} more answers, and "
        f"{MIN_LOOP_SHARE:.0%} more of them, have {LOOP:.0%} of their tokens in immediate repetitions; or two prompts "
        f"get the same answer in {MIN_SAMENESS:.0%} more of cases; or their length falls by {MIN_SHORTENING:.0%}, but "
        "not for SFT, which teaches lengths, nor where less than half ended by themselves at the start; "
        f"{COUNTS}. Alert from {ALERT_DISTINCT_FALL} of distinct-2.",
        "Read the answers in the probe explorer, and use a checkpoint from before. "
        f"{REMEDIES.get(method, REMEDIES['track'])} Decoding options (a repetition penalty, sampling) hide it without "
        "mending it.",
    )


def loops_of(samples: Samples) -> tuple[int, int]:
    """How many answers are loops at the first and at the last step."""
    looping = samples.rows["repeat_share"] >= LOOP
    start, end = (int(looping[samples.rows["step"] == step].sum()) for step in (samples.steps[0], samples.steps[-1]))
    return start, end


def more_loops(samples: Samples, at_least: float = MIN_LOOPS) -> bool:
    """Whether answers became loops, by their number: a mean over few answers would not stand out of its noise."""
    (start, end), num_answers = loops_of(samples), samples.change("num_tokens").num_probes
    return num_answers >= MIN_PROBES and end - start >= max(at_least, MIN_LOOP_SHARE * num_answers)
