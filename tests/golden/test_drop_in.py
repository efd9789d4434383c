"""Drop-in: with probes off and with probes on, training is bit for bit that of TRL's own trainers.

Loss history, weights, optimiser state and random-number state after 20 steps are compared, in one process with a fixed
number of threads, from a fresh model and a fresh seed per arm.
"""

import random

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed

import trl_dynamics
from tiny import tiny_model, tiny_tokenizer
from trl_dynamics.tracking.callback import is_own_line

TIMINGS = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime")
TIMINGS += ("eval_samples_per_second", "eval_steps_per_second")
PAIRS = [
    {"prompt": f"What is {a} plus {b}?", "chosen": f" It is {a + b}.", "rejected": f" Maybe {a * b}, who knows?"}
    for a in range(5)
    for b in range(4)
]
PROBES = [row | {"other_test": " Paris."} for row in PAIRS[:3]]


def completions() -> Dataset:
    return Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS])


def train(method: str, arm: str, output_dir, lora: bool, **options):
    """One run; returns the trainer after its 20 steps and the random-number state it left."""
    package = trl if arm == "trl" else trl_dynamics
    config_class, trainer_class = {
        "sft": (package.SFTConfig, package.SFTTrainer),
        "dpo": (package.DPOConfig, package.DPOTrainer),
    }[method]
    set_seed(7)
    args = config_class(
        output_dir=str(output_dir / arm),
        max_steps=20,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=8,
        save_strategy="steps",
        save_steps=10,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        seed=7,
        **options,
        **({"probe_every": 6} if arm == "probed" else {}),
    )
    model = tiny_model("llama", attention_dropout=0.2)
    data = completions() if method == "sft" else Dataset.from_list(PAIRS)
    # Both arms draw the adapter's weights and dropout from the same seed.
    peft_config = LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear") if lora else None
    reference = {"ref_model": tiny_model("llama")} if method == "dpo" and not lora else {}
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
        **reference,
        **({"probe_set": PROBES} if arm == "probed" else {}),
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


def test_plain_trl_configs_are_accepted(tmp_path):
    args = trl.DPOConfig(output_dir=str(tmp_path), max_steps=2, use_cpu=True, bf16=False, report_to="none")
    data = Dataset.from_list(PAIRS)
    common = {"args": args, "train_dataset": data, "processing_class": tiny_tokenizer()}
    common["ref_model"] = tiny_model("llama")
    assert trl_dynamics.DPOTrainer(model=tiny_model("llama"), **common).probe_callback is None
    trainer = trl_dynamics.DPOTrainer(model=tiny_model("llama"), probe_set=PROBES, **common)
    trainer.train()
    assert sorted(trl_dynamics.load_records(tmp_path)["step"].unique()) == [0, 1, 2]
