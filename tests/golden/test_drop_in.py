"""Drop-in: with probes off and with probes on, training is bit for bit that of TRL's own trainers.

Loss history, weights, optimiser state and random-number state after 20 steps are compared, in one process with a fixed
number of threads, from a fresh model and a fresh seed per arm; dropout is on.
"""

import random

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset

import trl_dynamics
from tiny_runs import PAIRS, PROBES, make_trainer
from trl_dynamics.tracking.callback import is_own_line

TIMINGS = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime")
TIMINGS += ("eval_samples_per_second", "eval_steps_per_second")


def train(method: str, arm: str, tmp_path, lora: bool, **options):
    """One run of 20 steps; returns its trainer and the random-number state it left."""
    trainer = make_trainer(
        method,
        tmp_path / arm,
        package=trl if arm == "trl" else trl_dynamics,
        lora=lora,
        probes=PROBES if arm == "probed" else None,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=8,
        save_strategy="steps",
        save_steps=10,
        **options,
        **({"probe_every": 6} if arm == "probed" else {}),
    )
    trainer.train()
    return trainer, (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())


def history(trainer) -> list[dict]:
    lines = [entry for entry in trainer.state.log_history if not is_own_line(entry)]
    return [{key: value for key, value in entry.items() if key not in TIMINGS} for entry in lines]


def assert_same(ours, theirs) -> None:
    (trainer, rng), (expected, expected_rng) = ours, theirs
    assert history(trainer) == history(expected)
    weights, expected_weights = trainer.model.state_dict(), expected.model.state_dict()
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(value, expected_weights[name]) for name, value in weights.items())
    state, expected_state = trainer.optimizer.state_dict()["state"], expected.optimizer.state_dict()["state"]
    assert state.keys() == expected_state.keys() and len(state) > 0
    for index, slots in state.items():
        assert all(torch.equal(torch.as_tensor(slots[k]), torch.as_tensor(expected_state[index][k])) for k in slots)
    assert torch.equal(rng[0], expected_rng[0]) and rng[1:] == expected_rng[1:]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_probes_off_and_on_equal_trl(method, lora, tmp_path):
    theirs = train(method, "trl", tmp_path, lora)
    assert_same(train(method, "unprobed", tmp_path, lora), theirs)
    probed = train(method, "probed", tmp_path, lora)
    assert_same(probed, theirs)
    frame = trl_dynamics.load_records(tmp_path / "probed")
    assert sorted(frame["step"].unique()) == [0, 1, 2, 4, 6, 10, 12, 18, 20]
    assert any(is_own_line(entry) for entry in probed[0].state.log_history)
    assert not (tmp_path / "unprobed" / "dynamics").exists()


@pytest.mark.parametrize(
    "options",
    [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}],
    ids=["packing", "padding_free"],
)
def test_sft_packing_and_padding_free(options, tmp_path):
    assert_same(train("sft", "probed", tmp_path, False, **options), train("sft", "trl", tmp_path, False, **options))


def test_dpo_with_precomputed_reference(tmp_path):
    options = {"precompute_ref_log_probs": True}
    assert_same(train("dpo", "probed", tmp_path, False, **options), train("dpo", "trl", tmp_path, False, **options))


def test_a_log_line_falls_on_a_probed_step(tmp_path):
    """A probe's own log event must not swallow the training line of the same step."""
    trainer = make_trainer("sft", tmp_path, probes=PROBES, max_steps=4, logging_steps=2, probe_every=2)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4]


def test_plain_trl_configs_are_accepted(tmp_path):
    args = trl.DPOConfig(output_dir=str(tmp_path), max_steps=2, use_cpu=True, bf16=False, report_to="none")
    reference = make_trainer("dpo", tmp_path)
    common = {"args": args, "train_dataset": Dataset.from_list(PAIRS), "ref_model": reference.ref_model}
    common |= {"model": reference.model, "processing_class": reference.processing_class}
    assert trl_dynamics.DPOTrainer(**common).probe_callback is None
    trl_dynamics.DPOTrainer(**common, probe_set=PROBES).train()
    assert sorted(trl_dynamics.load_records(tmp_path)["step"].unique()) == [0, 1, 2]
