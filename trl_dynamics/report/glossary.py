"""What the words on the page mean: one entry per term, for every metric the report draws."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """A word with its meaning; `formula` and `healthy` are empty where there is nothing to say."""

    title: str
    meaning: str
    formula: str = ""
    unit: str = ""
    healthy: str = ""


# Keys are the names of paths.metrics.METRICS.
METRIC_TERMS: dict[str, Term] = {
    "argmax_minus_chosen": Term(
        "gap argmax − chosen",
        "How far the chosen token lies below the likeliest token, averaged along the chosen response.",
        "mean over probes of (Σ max_v log π(v) − Σ log π(chosen)) / tokens",
        "nats per token",
        "constant or falling; widening means that what gains is not what you chose",
    ),
    "argmax_logp": Term(
        "argmax along chosen",
        "Log-probability of the likeliest token at every position of the chosen response, which is fed to the model.",
        "mean over probes of Σ max_v log π(v | prompt, chosen prefix) / tokens",
        "nats per token",
        "rises together with chosen; rising alone is the squeezing effect",
    ),
    "other_fluent_logp": Term(
        "other fluent answers",
        "Change of the fluent answers that training pushes neither up nor down: unrelated answers, paraphrases of "
        "chosen, types of your own. Findings and comparisons speak of these.",
        "mean over these types of the mean over probes of logp_mean(now) − logp_mean(start)",
        "nats per token, change since start",
        "about 0; falling means that these answers pay",
    ),
    "third_party_logp": Term(
        "all types but chosen and rejected",
        "Change of every type but chosen, rejected and chosen_initial: other fluent answers, and with them shuffled "
        "words and paraphrases of rejected. Logged as squeeze/third_party_logp.",
        "mean over these types of the mean over probes of logp_mean(now) − logp_mean(start)",
        "nats per token, change since start",
        "about 0; shuffled words may fall far without harm, so read other fluent answers first",
    ),
    "drained_mass": Term(
        "drained mass",
        "Probability that went, along the rejected response, from all other tokens to y− (the rejected token) and y*.",
        "mean over probes of rest(start) − rest(now), rest = mean over positions of 1 − π(y−) − π(y*)",
        "probability per position; y* is the likeliest token besides y− at the start and stays frozen",
        "about 0; positive: y* collects what all others lose; negative: y− was likely at many positions, and what it "
        "gave up there went to others than y*; squeezing where y− was unlikely, or along chosen, is not ruled out",
    ),
    "entropy": Term(
        "entropy",
        "How undecided the model is about the next token, averaged along the chosen response.",
        "mean over probes of the mean over positions of −Σ π(v) log π(v)",
        "nats",
        "falls slowly; losing half of it within a run is a collapse",
    ),
    "margin": Term(
        "margin growth",
        "How much further chosen is ahead of rejected than at the start; times beta it is DPO's reward margin.",
        "mean over probes of [log π(chosen) − log π(rejected)](now) − [the same](start), summed over tokens",
        "nats per sequence, change since start",
        "rises because chosen rises, not only because rejected falls",
    ),
    "eos_logp": Term(
        "end of turn after chosen",
        "Log-probability of stopping where the chosen response stops; responses that were cut do not count.",
        "mean over probes of log π(end of turn | prompt, chosen)",
        "nats",
        "constant or rising; falling means longer, perhaps endless answers",
    ),
    "displacement": Term(
        "displacement of chosen",
        "How far chosen has moved since the start. Falling is benign while paraphrases hold, harmful when they fall.",
        "mean over probes of logp_mean(now) − logp_mean(start)",
        "nats per token, change since start",
        "rising; falling is common in DPO and worth a look at the paraphrases",
    ),
    "miss_chosen": Term(
        "probability off chosen",
        "What the model gives to all tokens but the chosen one, averaged along the chosen response.",
        "mean over probes of the mean over positions of 1 − π(chosen)",
        "probability per position",
        "falls",
    ),
    "residual_chosen": Term(
        "force on chosen ‖G‖",
        "Length of the gap between the prediction and the chosen token: how hard a step on chosen pulls.",
        "mean over probes of the root mean square over positions of ‖π − e‖, ‖π − e‖² = 1 − 2π(chosen) + Σ π(v)²",
        "no unit; 0 to √2",
        "falls as chosen is learnt",
    ),
    "residual_rejected": Term(
        "force on rejected ‖G‖",
        "The same along rejected: how hard a negative gradient pushes, before DPO's β(1 − a).",
        "as on chosen, along rejected",
        "no unit; 0 to √2",
        "not much above chosen; high where rejected is unlikely already, which is where pushing squeezes",
    ),
    "normalizer_chosen": Term(
        "normaliser ‖A‖ on chosen",
        "How strongly a change of the logits changes log-probabilities: the more peaked the distribution, the more.",
        "mean over probes of the root mean square over positions of ‖I − 1πᵀ‖, ‖·‖² = V − 2 + V Σ π(v)²",
        "no unit; √(V − 1) for a uniform distribution, √(2V − 2) for a certain one",
        "rises slowly; fast on chosen and rejected alike means that everything becomes peaked",
    ),
    "normalizer_rejected": Term(
        "normaliser ‖A‖ on rejected",
        "The same along rejected.",
        "as on chosen, along rejected",
        "no unit",
        "rises no faster than on chosen",
    ),
}

# Keys are the names of paths.samples.SAMPLE_METRICS.
SAMPLE_TERMS: dict[str, Term] = {
    "distinct_2": Term(
        "distinct-2",
        "How varied the model's own answers are: different pairs among all pairs of neighbouring tokens.",
        "mean over probes of distinct pairs / pairs",
        "share, 0 to 1",
        "above 0.9 for answers of some dozen tokens; below a half the answers are loops",
    ),
    "longest_repeat": Term(
        "longest repeat",
        "The longest run of tokens that an answer says twice; the two may overlap.",
        "mean over probes of max { l : the same l tokens stand at two places }",
        "tokens",
        "a few; near the answer's length it is a loop",
    ),
    "repeat_share": Term(
        "immediate repetition",
        "Tokens of an answer in a run that stands right after itself, such as “very very”.",
        "mean over probes of tokens in such runs / tokens",
        "share, 0 to 1",
        "below 0.1; near 1 the answers are loops",
    ),
    "same_share": Term(
        "same answer to different prompts",
        "How often two different prompts are answered with the very same tokens.",
        "mean over probes of (other prompts with the same answer) / (other prompts)",
        "share, 0 to 1",
        "0 where prompts ask different things; rising means that the model falls back on a phrase",
    ),
    "length": Term(
        "length of answers",
        "Tokens of an answer, without the end-of-turn token.",
        "mean over probes of tokens",
        "tokens, at most probe_sample_tokens",
        "near that of the training answers; at the limit answers never end",
    ),
    "ended": Term(
        "answers that end",
        "Answers that the model ended by itself; the others were cut.",
        "mean over probes of [ended]",
        "share, 0 to 1",
        "constant or rising, if the limit leaves room for a usual answer",
    ),
    "greedy_logp": Term(
        "greedy log-probability",
        "How sure the model is of what it says itself, reading its own tokens; argmax along chosen reads chosen.",
        "mean over probes of Σ max_v log π(v | prompt, own tokens) / tokens",
        "nats per token",
        "rises slowly; loops are nearly certain once they have begun, so near 0 is a warning",
    ),
    "greedy_logp_sum": Term(
        "greedy log-probability of the answer",
        "The same, summed over the answer.",
        "mean over probes of Σ max_v log π(v | prompt, own tokens)",
        "nats per answer",
        "moves with the length of the answers",
    ),
    "distinct_1": Term(
        "distinct-1",
        "Different tokens among all tokens of an answer.",
        "mean over probes of distinct tokens / tokens",
        "share, 0 to 1",
        "constant at about equal length",
    ),
    "distinct_3": Term(
        "distinct-3",
        "Different triples among all triples of neighbouring tokens.",
        "mean over probes of distinct triples / triples",
        "share, 0 to 1",
        "near 1",
    ),
}

# Under a chart of influence, by its name.
HOW_TO_READ: dict[str, str] = {
    "force_map": "A column is one step of the optimiser, a row a type of answer: blue answers would rise, red ones "
    "fall, the number says by how much on average; “batch” is the step that training took, any other column one that "
    "would learn (SFT) the probes' own answers of that type, so DPO's push on rejected is minus its column. Momentum "
    "and weight decay are in “batch” alone.",
    "force_change": "The last map minus the first: in strong cells influence at the end is not what it was at the "
    "start.",
    "predicted_and_true": "A dot is an answer. On the dashed line the step did exactly what its gradient foretold; "
    "a cloud flatter than the line means that steps do less, one without direction that nothing is explained.",
    "first_order_error": "How much of what a step did its prediction misses (grey: all answers together): from the "
    "dashed line (30 %) on only large cells of the force map can be relied on, from 50 % on measured changes alone; "
    "along the dotted line it is rounding.",
    "step_parts": "Where momentum lies above this batch's gradient, what you see at a step was mostly pushed by "
    "earlier batches; parts may cancel, so their curves do not add up to that of the whole step.",
    "accumulated": "Where dashed (predicted) follows solid (measured), single steps explain the learning path of a "
    "type; click names in the legend to keep them.",
    "rank_matrix": "A cell says how alike two steps rank who moves whom (Spearman's correlation; 1: the same order); "
    "pale cells away from the diagonal mean that an explanation holds for its own phase of training only.",
    "rank_line": "Below the dashed line (0.9) the order of who moves whom has changed since the recorded step before; "
    "the bar is the 95 % interval over probes.",
}

TERMS: tuple[Term, ...] = (
    Term("probe set", "A fixed set of prompts, each with responses of several types, scored again and again."),
    Term("probe", "One prompt of the probe set with its responses."),
    Term("response type", "The role of a response, e.g. chosen, rejected, a paraphrase, an unrelated answer."),
    Term("learning path", "The log-probability of a response, or of a response type, over the steps of a run."),
    Term(
        "nat", "Unit of log-probability with the natural logarithm: −0.69 nats halves a probability, +0.69 doubles it."
    ),
    Term(
        "per token",
        "Log-probability of a response divided by its number of tokens; the end-of-turn token is not counted.",
        "logp_mean = log π(response | prompt) / tokens",
        "nats per token",
    ),
    Term("per sequence", "Log-probability of the whole response.", "logp_sum = Σ log π(token)", "nats per sequence"),
    Term(
        "change since start",
        "Value now minus value at the first recorded step, probe by probe, then averaged.",
        "mean over probes of value(step) − value(first step)",
    ),
    Term("band", "The 10 % to 90 % quantile over probes: where four out of five probes lie."),
    Term("±", "Standard error of a mean over probes. It says nothing about other seeds or other data."),
    Term(
        "displacement",
        "Chosen loses probability in training. Benign while paraphrases hold, harmful when they fall too.",
    ),
    Term(
        "squeezing",
        "Pushing an unlikely response down lifts the token that is likeliest already and lowers everything else.",
    ),
    Term(
        "influence",
        "How much one step of the optimiser moves the log-probability of an answer, of the same prompt or of another.",
        "Δ log π(answer) = −η A K G to first order",
        "nats; per token here",
    ),
    Term(
        "first order",
        "The prediction from gradients alone, taken before the step; it is exact for small steps only.",
        "error: ‖predicted − measured‖ / ‖measured‖ over all observed answers",
    ),
    Term(
        "fixed update",
        "A step that was not taken: what the optimiser, as it stands, would do on the probes' answers of one type. "
        "The same at every recorded step, so that its influence can be compared over time.",
    ),
    Term(
        "momentum",
        "The part of a step that the optimiser remembers from earlier batches; AdamW moves by it even where a batch "
        "has no gradient.",
    ),
    Term("greedy answer", "What the model says to a probe's prompt, the likeliest token at every step."),
    *METRIC_TERMS.values(),
    *SAMPLE_TERMS.values(),
)
