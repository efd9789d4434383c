"""The one written schema: a record is one response of one probe, scored once by one model at one step.

Everything is in nats. A response's own tokens are counted without the end-of-turn token, which has a column of
its own. Rows are keyed by (model, step, probe_id, response_type); readers add `run`.
"""

import pyarrow as pa

# Of the store. 1: a file per step, all of them counted. 2: the manifest says which files count.
SCHEMA_VERSION = 2

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

RECORD_SCHEMA = pa.schema(
    [
        pa.field("model", pa.string(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("probe_id", pa.string(), nullable=False),
        pa.field("response_type", pa.string(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        *(pa.field(name, pa.float64(), nullable=False) for name in VALUE_COLUMNS),
    ],
    metadata={"trl_dynamics_schema_version": str(SCHEMA_VERSION)},
)


def to_table(columns: dict[str, list]) -> pa.Table:
    """Columns as a table in the written schema.

    Raises:
        ValueError: If a column is missing or not part of the schema.
    """
    expected = RECORD_SCHEMA.names
    if set(columns) != set(expected):
        raise ValueError(f"records need exactly the columns {expected}, got {sorted(columns)}")
    return pa.table({name: columns[name] for name in expected}, schema=RECORD_SCHEMA)
