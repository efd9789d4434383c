"""The two kinds of row of learning paths. A record is one response of one probe, scored once by one model at one step;
a sample is the greedy answer of one model to one probe's prompt at one step.

Everything is in nats. A response's own tokens are counted without the end-of-turn token, which has a column of
its own. Readers add `run` to the keys.
"""

import pyarrow as pa

from trl_dynamics.store.kind import Kind

RECORDS = Kind(
    "records",
    keys=("model", "step", "probe_id", "response_type"),
    columns={
        "num_tokens": pa.int32(),
        "truncated": pa.bool_(),
        "logp_sum": "log pi(response | prompt), summed over the response's tokens",
        "logp_mean": "logp_sum / num_tokens",
        "prob_mean": "mean over tokens of pi(token)",
        "argmax_logp_sum": "sum over positions of max_v log pi(v | prompt, response prefix)",
        "argmax_match_mean": "share of positions where the response's token is the argmax",
        "entropy_mean": "mean over positions of the entropy of the next-token distribution",
        "sum_sq_mean": "mean over positions of sum_v pi(v)^2",
        "topk_mass_mean": "mean over positions of the probability of the k most likely tokens",
        "star_logp_sum": "sum over positions of log pi(y*), y* = likeliest other token at the baseline",
        "rest_mass_mean": "mean over positions of 1 - pi(token) - pi(y*): what is left for every other token",
        "eos_logp": "log pi of the end-of-turn token right after the response; NaN where the response was cut",
    },
)
SAMPLES = Kind(
    "samples",
    keys=("model", "step", "probe_id"),
    columns={
        "num_tokens": pa.int32(),
        "ended": pa.bool_(),
        "logp_sum": "log pi(answer | prompt) under the model that wrote it, summed over the answer's own tokens",
        "logp_mean": "logp_sum / num_tokens; NaN for an empty answer",
        "eos_logp": "log pi of the end-of-turn token that ended the answer; NaN where it was cut",
        "distinct_1": "distinct tokens / tokens; NaN for an empty answer",
        "distinct_2": "distinct pairs of neighbouring tokens / all pairs; NaN below 2 tokens",
        "distinct_3": "distinct triples of neighbouring tokens / all triples; NaN below 3 tokens",
        "longest_repeat": "tokens of the longest run that is found at two places of the answer, which may overlap",
        "repeat_share": "share of tokens in a run that follows right after itself; NaN for an empty answer",
        "same_share": "share of the other prompts with the same answer, token by token; NaN for a single prompt",
        "token_ids": pa.list_(pa.int32()),
        "text": pa.string(),
    },
)
