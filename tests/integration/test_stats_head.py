"""The stats head is put on an instance, leaves every other call as it was, and comes off again."""

import copy
import inspect

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from tiny import tiny_model
from tiny_runs import PROBES, make_trainer
from trl_dynamics import stats_head

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def request(num_columns: int = 4) -> stats_head.StatsRequest:
    return stats_head.StatsRequest(torch.tensor([0, 1]), torch.tensor([1, 2]), torch.tensor([7, 12]), num_columns)


def test_install_is_idempotent_and_removable():
    model = tiny_model("llama")
    before = model(IDS).logits
    stats_head.install(model)
    assert stats_head.is_installed(model)
    wrapped = model.forward
    stats_head.install(model)
    assert model.forward.__func__ is wrapped.__func__
    assert torch.equal(model(IDS).logits, before)
    assert inspect.signature(model.forward) == inspect.signature(type(model).forward.__get__(model))
    stats_head.remove(model)
    stats_head.remove(model)
    assert "forward" not in vars(model)
    assert not stats_head.is_installed(model)


def test_removal_puts_back_an_earlier_wrapper():
    model = tiny_model("llama")
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)
    earlier = model.forward
    stats_head.install(model)
    stats_head.remove(model)
    assert model.forward is earlier


def test_generate_works_with_the_head_installed():
    model = tiny_model("llama")
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False)
    stats_head.install(model)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), expected)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2", "gemma2"])
def test_log_probabilities_are_those_of_the_models_logits(family):
    model = tiny_model(family)
    logp = model(IDS).logits.float().log_softmax(-1)
    stats_head.install(model)
    stats = model(IDS, stats_request=request())
    expected = torch.stack([logp[0, 1, 7], logp[1, 2, 12]])
    torch.testing.assert_close(stats["target_logp"], expected, atol=1e-5, rtol=0)


def test_lora_and_prompt_learning_adapters():
    for config in (
        LoraConfig(target_modules="all-linear", init_lora_weights=False),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        model = get_peft_model(tiny_model("llama"), config).eval()
        logp = model(IDS).logits[:, -4:].float().log_softmax(-1)
        stats_head.install(model)
        stats = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), stats_request=request())
        expected = torch.stack([logp[0, 1, 7], logp[1, 2, 12]])
        torch.testing.assert_close(stats["target_logp"], expected, atol=1e-5, rtol=0)


def assert_a_copy_uses_its_own_weights(model, output) -> None:
    """What `output` gives of a changed deep copy is what it gives of the model with the copy's weights."""
    before = output(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    of_twin = output(twin)
    assert torch.equal(output(model), before) and not torch.allclose(of_twin, before)
    model.load_state_dict(twin.state_dict())
    assert torch.equal(output(model), of_twin)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "output",
    [
        lambda model: model(input_ids=IDS).logits,
        lambda model: model(input_ids=IDS, stats_request=request())["target_logp"],
    ],
    ids=["logits", "statistics"],
)
def test_a_deep_copy_uses_its_own_weights(output, lora):
    model = tiny_model("llama")
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    stats_head.install(model)
    assert_a_copy_uses_its_own_weights(model, output)


def test_removal_from_a_deep_copy_leaves_the_original_as_it_is():
    model = tiny_model("llama")
    stats_head.install(model)
    twin = copy.deepcopy(model)
    stats_head.remove(twin)
    assert not stats_head.is_installed(twin) and torch.equal(twin(IDS).logits, model(IDS).logits)
    assert stats_head.is_installed(model) and "target_logp" in model(IDS, stats_request=request())


def test_a_deep_copy_of_a_trainers_model_uses_its_own_weights_under_autocast(tmp_path):
    """Accelerate has put its autocast around the head, TRL its fused head below."""
    trainer = make_trainer("sft", tmp_path, probes=PROBES, max_steps=1, bf16=True)
    trainer.train()
    model = trainer.model.eval()
    for output in (
        lambda model: model(IDS, labels=IDS, fused_lm_head=True).log_probs,
        lambda model: model(IDS, stats_request=request())["target_logp"],
    ):
        assert_a_copy_uses_its_own_weights(model, output)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="no LM head"):
        stats_head.install(tiny_model("llama").base_model)
