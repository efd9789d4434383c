"""Probing, the gauge and recorded influence never disturb: training is bit for bit TRL's own, with a probe set and
without one.

Losses of every micro-step, log lines, weights, optimiser state, module modes and random-number states after 20 steps
are compared, in one process with one thread, from a fresh model and a fresh seed per run. Dropout is on everywhere;
the cases together meet every other feature once per trainer that has it, probed at every step or every other one.
"""

import pytest
import torch

import trl_dynamics
from small_stores import influence_steps
from traces import Trace, assert_equal, trace

LAYOUTS = ("padded", "shared_prefix")

REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
NON_REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
STORED = {"gradient_checkpointing": False}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 5, "probe_on_evaluate": True}
BEST = EVALUATED | {"save_strategy": "steps", "save_steps": 5, "load_best_model_at_end": True}
BF16_WEIGHTS = {"dtype": torch.bfloat16}
REUSED = {"num_iterations": 2, "steps_per_generation": 2}
EVERY, EVERY_OTHER = {"probe_every": 1}, {"probe_every": 2}
INFLUENCE = {"akg_every": 2, "akg_updates": ["batch", "rejected"], "akg_max_probes": 2}

CASES = {
    "sft": STORED | {"gradient_accumulation_steps": 2} | EVERY_OTHER,
    "sft-packing-checkpointing": NON_REENTRANT | {"packing": True, "max_length": 64} | EVERY,
    "sft-padding_free-bf16-influence": STORED
    | {"padding_free": True, "max_length": None, "bf16": True}
    | EVERY
    | INFLUENCE,
    "sft-bf16_weights-reentrant-influence": REENTRANT | BF16_WEIGHTS | EVERY_OTHER | INFLUENCE,
    "sft-bf16_weights-probes_in_float32": STORED | BF16_WEIGHTS | {"probe_dtype": "float32"} | EVERY_OTHER,
    "sft-greedy_answers": STORED | EVALUATED | {"probe_samples": 2, "probe_sample_tokens": 6} | EVERY_OTHER,
    "sft-lora-best": NON_REENTRANT | BEST | {"lora": True} | EVERY,
    "dpo": STORED | {"gradient_accumulation_steps": 2} | EVERY_OTHER | INFLUENCE,
    "dpo-checkpointing-bf16": NON_REENTRANT | {"bf16": True} | EVERY_OTHER,
    "dpo-bf16_weights-reentrant": REENTRANT | BF16_WEIGHTS | EVERY_OTHER,
    "dpo-precomputed_reference": STORED | EVALUATED | {"precompute_ref_log_probs": True} | EVERY_OTHER,
    "dpo-lora-best-influence": NON_REENTRANT | BEST | {"lora": True} | EVERY | INFLUENCE,
    "grpo": STORED | {"gradient_accumulation_steps": 2, "temperature": 0.7} | EVERY_OTHER,
    "grpo-reused_generations-checkpointing-influence": NON_REENTRANT
    | REUSED
    | {"logging_steps": 1}
    | EVERY
    | INFLUENCE,
    "grpo-reference-bf16": STORED | {"beta": 0.1, "bf16": True, "logging_steps": 1} | EVERY_OTHER,
    "grpo-bf16_weights-reentrant": REENTRANT | BF16_WEIGHTS | EVERY_OTHER,
    "grpo-lora-best": NON_REENTRANT | BEST | REUSED | {"lora": True, "beta": 0.1} | EVERY,
}
# Without a probe set, the first and the last case of each trainer.
UNPROBED = [case for case in CASES if "-" not in case or "lora" in case]
RUNS = [(case, arm) for case in CASES for arm in (*LAYOUTS, "off") if arm != "off" or case in UNPROBED]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """TRL's own run of a case, trained once for all that are compared with it."""
    known: dict[str, Trace] = {}

    def of(case: str) -> Trace:
        if case not in known:
            known.clear()  # The arms of a case follow one another.
            known[case] = trace(case.split("-")[0], "trl", tmp_path_factory.mktemp("trl"), **CASES[case])
        return known[case]

    return of


@pytest.mark.parametrize(("case", "arm"), RUNS, ids=["-".join(run) for run in RUNS])
def test_training_is_trls(case, arm, expected, tmp_path):
    assert_equal(trace(case.split("-")[0], arm, tmp_path, **CASES[case]), expected(case))
    if arm == "off":
        assert not (tmp_path / "dynamics").exists()
    else:
        assert len(trl_dynamics.load_records(tmp_path)["step"].unique()) > 10
        assert len(influence_steps(tmp_path)) == (10 if "akg_every" in CASES[case] else 0)


@pytest.mark.parametrize("case", ["sft", "dpo", "grpo"])
def test_training_is_trls_with_the_default_schedule(case, expected, tmp_path):
    """Whatever the clock leaves out."""
    options = CASES[case] | {"probe_every": None}
    assert_equal(trace(case, "padded", tmp_path, **options), expected(case))
    steps = sorted(trl_dynamics.load_records(tmp_path)["step"].unique())
    assert (steps[0], steps[-1]) == (0, 20)
