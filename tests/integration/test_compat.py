"""Contracts of the private names in compat.py: each does what we rely on, in the supported versions."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, OFTConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)

from tiny import tiny_model
from tiny_runs import make_trainer
from trl_dynamics import compat


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


@pytest.mark.parametrize("lora", [False, True])
def test_sum_sq_is_added_to_the_head_of_dpo_and_changes_nothing_else(lora, tmp_path):
    trainer = make_trainer("dpo", tmp_path, lora=lora, gauge_every=0)
    model, ids = trainer.model.eval(), torch.tensor([[5, 6, 7, 8, 9]])

    def forward() -> tuple:
        output = model(ids, labels=ids, fused_lm_head=True)
        return output, torch.autograd.grad(output.log_probs.sum(), [p for p in model.parameters() if p.requires_grad])

    plain, gradients = forward()
    fields = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    assert {name for name in fields if getattr(plain, name) is not None} == set(compat.DPO_HEAD_OUTPUTS)
    with torch.no_grad():
        logp = model(ids).logits.double()[:, :-1].log_softmax(-1)
    compat.add_sum_sq_to_head(compat.base_causal_lm(model))
    ours, same_gradients = forward()
    for name in (*compat.DPO_HEAD_OUTPUTS, "loss", "label_mask"):
        assert torch.equal(plain[name], ours[name]), name
    assert all(torch.equal(*pair) for pair in zip(gradients, same_gradients, strict=True))
    assert not ours.log_sum_sq_probs.requires_grad
    torch.testing.assert_close(ours.log_sum_sq_probs.double(), logp.mul(2).logsumexp(-1), atol=1e-5, rtol=0)
    assert model(ids).logits.shape == (1, 5, 260)


def test_dpo_still_computes_its_loss_as_the_recorder_expects(tmp_path):
    """One fused call of the model it is given, loss types read from the trainer, the reference from its own module."""
    import inspect

    import trl

    assert list(inspect.signature(trl.DPOTrainer._compute_loss).parameters) == [
        "self",
        "model",
        "inputs",
        "return_outputs",
    ]
    trainer = make_trainer("dpo", tmp_path, gauge_every=0)
    inputs, calls = next(iter(trainer.get_train_dataloader())), []

    def model(*args, **kwargs):
        calls.append(kwargs.get("fused_lm_head"))
        return trainer.model(*args, **kwargs)

    trainer.ref_model.register_forward_hook(lambda module, args, output: calls.append(type(output).__name__))
    assert trainer._compute_loss(model, inputs, False) > 0
    assert calls == [True, "FusedCausalLMOutput"]
    trainer.loss_types, trainer.loss_weights = [], []
    assert trainer._compute_loss(model, inputs, False) == 0


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


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_a_metric_comes_out_as_the_mean_of_its_values_since_the_last_line(method, tmp_path):
    trainer = make_trainer(method, tmp_path)
    trainer.model.train()
    assert not compat.waits_for_log(trainer, "train", "ours/mean")
    for value in (1.0, 4.0):
        compat.log_metric(trainer, "train", "ours/mean", value)
        compat.log_metric(trainer, "train", "ours/last", value, replace=True)
    compat.log_metric(trainer, "eval", "ours/other", 7.0)
    assert compat.waits_for_log(trainer, "train", "ours/mean")
    trainer.log({"loss": 0.5})
    line = trainer.state.log_history[-1]
    assert (line["ours/mean"], line["ours/last"]) == (2.5, 4.0) and "ours/other" not in line
    assert not compat.waits_for_log(trainer, "train", "ours/mean")
    trainer.model.eval()
    trainer.log({"eval_loss": 0.5})
    assert trainer.state.log_history[-1]["eval_ours/other"] == 7.0


def test_the_attention_that_a_model_runs_is_known():
    model = tiny_model("llama")
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert compat.attention_of(model) == name


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


@pytest.mark.parametrize("max_grad_norm", [0.1, 0.0])
def test_the_norm_before_clipping_is_known_right_before_a_step(max_grad_norm, tmp_path, monkeypatch):
    """Which recorded influence takes from `_get_grad_norm`; `.grad` is clipped by then."""
    seen, known = [], Trainer._get_grad_norm

    def noted(self, *args, **kwargs):
        seen.append(float(known(self, *args, **kwargs)))
        return seen[-1]

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.append(float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()))

    monkeypatch.setattr(Trainer, "_get_grad_norm", noted)
    trainer = make_trainer("sft", tmp_path, max_steps=1, max_grad_norm=max_grad_norm)
    trainer.add_callback(Norms())
    trainer.train()
    whole, clipped = seen
    assert whole > 0.2 and clipped == pytest.approx(max_grad_norm or whole, rel=1e-4)


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


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_checkpoint_without_reentry_and_as_before_afterwards(reentrant):
    model = tiny_model("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    layers = [m for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    before = [m._gradient_checkpointing_func for m in layers]
    with compat.checkpointing_without_reentry(model):
        assert len(layers) > 1
        assert all(m._gradient_checkpointing_func.keywords["use_reentrant"] is False for m in layers)
    assert [m._gradient_checkpointing_func for m in layers] == before


def test_models_load_whole_where_arguments_have_switched_on_zero3():
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        assert is_deepspeed_zero3_enabled()
        with compat.without_zero3():
            assert not is_deepspeed_zero3_enabled()
        assert is_deepspeed_zero3_enabled() and config.is_zero3()
    finally:
        unset_hf_deepspeed_config()


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("runtime/zero/stage_1_and_2.py", "bit16_groups single_partition_of_fp32_groups _hp_mapping"),
        ("runtime/zero/stage3.py", "fp16_groups fp32_partitioned_groups_flat sub_group_to_group_id"),
        ("runtime/zero/stage3.py", "empty_partition_cache swap_optimizer params_in_nvme_and_cpu"),
        ("runtime/zero/partition_parameters.py", "ds_tensor ds_numel ds_status ds_shape ds_process_group"),
        ("utils/tensor_fragment.py", "lp_fragment_address hp_fragment_address get_lp_grad_fragment"),
        ("utils/tensor_fragment.py", "_index_in_param_group"),
        ("runtime/engine.py", "zero_hpz_partition_size zero_quantized_weights zero_quantized_nontrainable_weights"),
    ],
)
def test_deepspeed_still_has_the_names_by_which_zero_is_read(module, names):
    """What they hold is compared with whole models in tests/distributed."""
    folder = Path(importlib.util.find_spec("deepspeed").origin).parent
    source = (folder / module).read_text()
    assert [name for name in names.split() if not re.search(rf"\b{name}\b", source)] == []


def test_a_parameter_that_zero_3_does_not_split_is_not_in_pieces():
    head = nn.Linear(4, 7)
    assert not compat.is_in_pieces(head.weight)
    head.weight.ds_status = "available"
    assert compat.is_in_pieces(head.weight)


def test_a_plain_linear_head_is_known():
    head = nn.Linear(4, 7)
    assert compat.is_plain_linear(head) and not compat.is_plain_linear(nn.Sequential(head))
    assert not compat.is_plain_linear(nn.Linear(4, 7, device="meta"))
    head.forward = lambda hidden: 2 * hidden
    assert not compat.is_plain_linear(head)


def test_a_head_that_accelerate_has_moved_is_plain_unless_its_weights_are_elsewhere():
    head = nn.Linear(4, 7)
    add_hook_to_module(head, AlignDevicesHook("cpu"))
    assert compat.is_plain_linear(head)
    remove_hook_from_module(head)
    add_hook_to_module(head, AlignDevicesHook("cpu", offload=True, weights_map=dict(head.state_dict())))
    assert not compat.is_plain_linear(head) and head(torch.ones(1, 4)).shape == (1, 7)


def test_adapters_on_the_head_make_it_no_plain_linear():
    for config in (
        LoraConfig(target_modules=["lm_head"]),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        OFTConfig(target_modules=["lm_head"], oft_block_size=4),
    ):
        model = get_peft_model(tiny_model("llama"), config)
        assert not compat.is_plain_linear(model.get_base_model().get_output_embeddings())


def test_dynamic_rope_keeps_the_longest_row_until_it_is_reset():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model("llama", max_position_embeddings=16, rope_parameters=rope)
    rotary = model.model.rotary_emb
    fresh = rotary.inv_freq.clone()
    with torch.no_grad():
        model(torch.arange(40)[None])
    assert int(rotary.max_seq_len_cached) == 40 and not torch.equal(rotary.inv_freq, fresh)
    compat.reset_rope(model)
    assert int(rotary.max_seq_len_cached) == 16 and torch.equal(rotary.inv_freq, fresh)


def test_boundaries_of_longrope():
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0, "rope_theta": 10000.0}
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 40} | factors
    assert compat.longrope_boundaries(tiny_model("llama", rope_parameters=longrope).config) == (40,)
    assert compat.longrope_boundaries(tiny_model("llama").config) == ()
    assert compat.longrope_boundaries(tiny_model("gemma3").config) == ()
    assert compat.longrope_boundaries(tiny_model("gpt2").config) == ()
