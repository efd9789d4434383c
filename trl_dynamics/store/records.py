"""The two written schemas. A record is one response of one probe, scored once by one model at one step; a sample is
the greedy answer of one model to one probe's prompt at one step.

Everything is in nats. A response's own tokens are counted without the end-of-turn token, which has a column of
its own. Records are keyed by (model, step, probe_id, response_type), samples by (model, step, probe_id); readers add
`run`.
"""

import pyarrow as pa

# Of the store. 1: a file per step, all of them counted. 2: the manifest says which files count. 3: it also lists files
# of samples.
SCHEMA_VERSION = 3

# Where everything lies, below a run's output_dir.
FOLDER = "dynamics"
RECORDS, SAMPLES = "records", "samples"

KEY_COLUMNS = ("model", "step", "probe_id", "response_type")
# What the engine measures per response, and what each value means.
VALUE_COLUMNS: dict[str, str] = {
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
}

SAMPLE_KEY_COLUMNS = ("model", "step", "probe_id")
# What is measured per greedy answer, and what each value means.
SAMPLE_VALUE_COLUMNS: dict[str, str] = {
    "logp_sum": "log pi(answer | prompt) under the model that wrote it, summed over the answer's own tokens",
    "logp_mean": "logp_sum / num_tokens; NaN for an empty answer",
    "eos_logp": "log pi of the end-of-turn token that ended the answer; NaN where it was cut",
    "distinct_1": "distinct tokens / tokens; NaN for an empty answer",
    "distinct_2": "distinct pairs of neighbouring tokens / all pairs; NaN below 2 tokens",
    "distinct_3": "distinct triples of neighbouring tokens / all triples; NaN below 3 tokens",
    "longest_repeat": "tokens of the longest run that stands at two places of the answer, which may overlap",
    "repeat_share": "share of tokens in a run that stands right after itself; NaN for an empty answer",
    "same_share": "share of the other prompts with the same answer, token by token; NaN for a single prompt",
}

_TYPES = {
    "step": pa.int64(),
    "num_tokens": pa.int32(),
    "truncated": pa.bool_(),
    "ended": pa.bool_(),
    "token_ids": pa.list_(pa.int32()),
    **dict.fromkeys((*VALUE_COLUMNS, *SAMPLE_VALUE_COLUMNS), pa.float64()),
}


def _schema(*names: str) -> pa.Schema:
    """Columns without nulls, text unless `_TYPES` says otherwise."""
    fields = [pa.field(name, _TYPES.get(name, pa.string()), nullable=False) for name in names]
    return pa.schema(fields, metadata={"trl_dynamics_schema_version": str(SCHEMA_VERSION)})


RECORD_SCHEMA = _schema(*KEY_COLUMNS, "num_tokens", "truncated", *VALUE_COLUMNS)
SAMPLE_SCHEMA = _schema(*SAMPLE_KEY_COLUMNS, "num_tokens", "ended", *SAMPLE_VALUE_COLUMNS, "token_ids", "text")
SCHEMAS = {RECORDS: RECORD_SCHEMA, SAMPLES: SAMPLE_SCHEMA}


def to_table(columns: dict[str, list], kind: str = RECORDS) -> pa.Table:
    """Columns as a table in a written schema.

    Args:
        columns (`dict[str, list]`): Values by name.
        kind (`str`, *optional*): `"records"` or `"samples"`.

    Raises:
        ValueError: If a column is missing or not part of the schema.
    """
    expected = SCHEMAS[kind].names
    if set(columns) != set(expected):
        raise ValueError(f"{kind} need exactly the columns {expected}, got {sorted(columns)}")
    return pa.table({name: columns[name] for name in expected}, schema=SCHEMAS[kind])
