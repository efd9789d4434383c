"""Contracts of the private names in compat.py: each does what we rely on, in the supported versions."""

import pytest
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from tiny import tiny_model
from tiny_runs import make_trainer
from trl_dynamics import compat


def test_installed_versions_are_supported():
    compat.check_versions(compat.installed_versions(tuple(compat.SUPPORTED)))


@pytest.mark.parametrize("found", ["1.15.0", "1.17.0", None])
def test_other_versions_are_refused(found):
    with pytest.raises(ImportError, match=rf"trl>=1.16,<1.17 \(found {found or 'none'}\)"):
        compat.check_versions({"trl": found, "transformers": "5.23.1", "torch": "2.13.0+cpu"})


def test_importing_the_trainers_checks_the_versions(monkeypatch):
    import importlib
    import importlib.metadata

    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.22.0" if name == "transformers" else real(name))
    with pytest.raises(ImportError, match="transformers"):
        importlib.reload(compat)
    monkeypatch.undo()
    importlib.reload(compat)


@pytest.mark.parametrize("bias", [False, True])
def test_full_head_weights(bias):
    head = nn.Linear(4, 7, bias=bias)
    with compat.full_head_weights(head) as (weight, given):
        assert weight is head.weight and given is head.bias


def test_a_head_that_zero_3_does_not_split_is_whole():
    zero3 = HfDeepSpeedConfig({"train_batch_size": 1, "zero_optimization": {"stage": 3}})
    try:
        head = nn.Linear(4, 7)
        with compat.full_head_weights(head) as (weight, bias):
            assert zero3.is_zero3() and weight is head.weight and bias is head.bias
        # What ZeRO-3 does split is compared in tests/distributed.
        assert compat.whole_numel(head.weight) == 28
    finally:
        unset_hf_deepspeed_config()


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("llama", {}, (1.0, None)),
        ("gemma2", {"final_logit_softcapping": 30.0}, (1.0, 30.0)),
        ("cohere", {"logit_scale": 0.25}, (0.25, None)),
        ("granite", {"logits_scaling": 8.0}, (0.125, None)),
    ],
)
def test_logit_transform_is_what_the_model_does(family, options, expected):
    model = tiny_model(family, **options)
    assert compat.logit_transform(model) == expected
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        raw = model.get_output_embeddings()(model.base_model(ids).last_hidden_state)
        factor, softcap = expected
        raw = raw * factor
        logits = raw if softcap is None else softcap * torch.tanh(raw / softcap)
        torch.testing.assert_close(model(ids).logits, logits)


def test_base_causal_lm_looks_through_adapters(tmp_path):
    trainer = make_trainer("sft", tmp_path, lora=True)
    assert type(compat.base_causal_lm(trainer.model)).__name__ == "LlamaForCausalLM"
    assert compat.base_causal_lm(tiny_model()).__class__.__name__ == "LlamaForCausalLM"


def test_log_apart_keeps_training_metrics_and_flags(tmp_path):
    class Tracker(TrainerCallback):
        seen: list = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    trainer = make_trainer("sft", tmp_path)
    trainer.add_callback(Tracker())
    displays = [c for c in trainer.callback_handler.callbacks if isinstance(c, compat.DISPLAYS)]
    trainer._metrics["train"]["entropy"].append(1.0)
    trainer.control.should_log = True
    compat.log_apart(trainer, {"probe/chosen/logp_mean": -1.0})
    assert trainer._metrics["train"]["entropy"] == [1.0]
    assert trainer.control.should_log
    assert trainer.state.log_history[-1]["probe/chosen/logp_mean"] == -1.0
    assert Tracker.seen[-1]["probe/chosen/logp_mean"] == -1.0
    assert displays and displays == [c for c in trainer.callback_handler.callbacks if isinstance(c, compat.DISPLAYS)]


def test_trl_still_has_what_the_subclasses_override():
    import inspect

    import trl

    parameters = list(inspect.signature(trl.SFTTrainer._prepare_dataset).parameters)
    expected = ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"]
    assert parameters == expected
    assert list(inspect.signature(trl.SFTTrainer.__init__).parameters)[1:5] == [
        "model",
        "args",
        "data_collator",
        "train_dataset",
    ]
    assert list(inspect.signature(trl.DPOTrainer.__init__).parameters)[1:4] == ["model", "ref_model", "args"]
    assert list(inspect.signature(trl.GRPOTrainer.__init__).parameters)[1:4] == ["model", "reward_funcs", "args"]
    assert trl.SFTTrainer._tag_names and trl.DPOTrainer._tag_names and trl.GRPOTrainer._tag_names


def test_grpo_divides_by_its_temperature_in_the_fused_head_alone(tmp_path):
    """Why probes need a head of their own, and why it can still read plain logits from the same model."""
    trainer = make_trainer("grpo", tmp_path, temperature=0.5)
    ids, plain = torch.tensor([[5, 6, 7, 8]]), tiny_model()
    with torch.no_grad():
        logits = plain(ids).logits
        model = trainer.model.eval()
        torch.testing.assert_close(model(ids).logits, logits)
        fused = model(ids, labels=ids, fused_lm_head=True).log_probs
    expected = (logits[:, :-1] / 0.5).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(fused, expected)


def test_grpo_fills_in_both_sizes_of_a_generation_and_refuses_both(tmp_path):
    """So a config that replays a run must name one of them only."""
    args = make_trainer("grpo", tmp_path, steps_per_generation=2).args
    assert (args.steps_per_generation, args.generation_batch_size) == (2, 4)
    with pytest.raises(ValueError, match="can not be both configured"):
        make_trainer("grpo", tmp_path, steps_per_generation=2, generation_batch_size=4)
