"""A prediction against the step itself, and what the verdict says is missing."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from akg_models import batch_of, language_model, sequence_classifier, texts_of
from tiny import tiny_model
from trl_dynamics.akg import losses
from trl_dynamics.akg.modes import evaluated
from trl_dynamics.akg.real_step import VERDICTS, moved, verify
from trl_dynamics.akg.task import causal_lm, classifier

UPDATE, OBSERVE = batch_of(2, 8, 0), batch_of(3, 7, 1)


def test_the_truth_is_what_torch_does_and_the_model_is_put_back():
    model = language_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    weights = copy.deepcopy(model.state_dict())
    found = verify(model, UPDATE, OBSERVE, direction=optimizer)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    task = causal_lm(model)
    with torch.no_grad():
        before = torch.cat(list(task.logits(model, OBSERVE))).log_softmax(dim=-1)
    logits = torch.cat(list(task.logits(model, UPDATE)))
    nn.functional.cross_entropy(logits, task.labels(UPDATE)).backward()
    optimizer.step()
    with torch.no_grad():
        after = torch.cat(list(task.logits(model, OBSERVE))).log_softmax(dim=-1)
    true_N = (after - before).gather(1, task.labels(OBSERVE)[:, None])[:, 0]
    torch.testing.assert_close(found.true_N, true_N, rtol=1e-6, atol=1e-10)


def test_a_small_step_is_explained_by_the_first_order():
    found = verify(language_model(), UPDATE, OBSERVE, lr=1e-3)
    assert found.verdict == "first order" and found.errors["second"] < found.errors["first"] < 0.05


def test_a_linear_model_in_one_weight_lacks_the_second_order_of_the_softmax_alone():
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    rows, labels = torch.randn(3, 3, dtype=torch.float64), torch.tensor([0, 1, 2])
    task = classifier(model, losses.sum_cross_entropy, head=model)
    found = verify(task, (rows[:2], labels[:2]), (rows, labels), lr=1.0)
    assert torch.count_nonzero(found.predicted.total.kernel_N.abs() > 1e-14) == 0
    assert found.errors["fixed_features"] == pytest.approx(found.errors["first"])  # the head is the model
    assert found.verdict == "softmax", found.shares


class Product(nn.Module):
    """A logit that is a product of two weights: flat features, all of the curvature in the kernel."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor([0.01])), nn.Parameter(torch.tensor([0.01]))
        self.double()

    def forward(self, rows):
        return torch.cat([rows * self.a * self.b, torch.zeros_like(rows)], dim=-1)


def test_a_product_of_weights_lacks_the_second_order_of_its_logits():
    rows, labels = torch.ones(1, 1, dtype=torch.float64), torch.tensor([0])
    found = verify(classifier(Product()), (rows, labels), (rows, labels), lr=2.0)
    assert found.verdict == "kernel" and found.errors["second"] < 0.01


def test_a_huge_step_is_beyond_the_second_order():
    found = verify(language_model(), UPDATE, OBSERVE, lr=30.0)
    assert found.verdict == "beyond" and found.errors["first"] > 1


def test_a_step_below_the_last_bit_is_rounding():
    model = tiny_model("llama", initializer_range=0.15).to(torch.bfloat16)
    found = verify(model, UPDATE, OBSERVE, lr=1e-6)
    assert found.verdict == "rounding"


def test_a_step_that_diverges_is_beyond_the_second_order():
    assert verify(tiny_model("llama"), UPDATE, OBSERVE, lr=1e30).verdict == "beyond"


def test_a_small_adapter_on_half_precision_weights_is_rounding():
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model("llama", initializer_range=0.15).to(torch.bfloat16), config)
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    found = verify(model, UPDATE, OBSERVE, lr=1e-4)
    assert found.errors["first"] > 0.2 and found.verdict == "rounding", found.shares


def test_checkpointing_models_are_verified_as_well():
    model = language_model()
    plain = verify(model, UPDATE, OBSERVE, lr=1e-3)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    torch.testing.assert_close(verify(model, UPDATE, OBSERVE, lr=1e-3).second_N, plain.second_N)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_classifiers_of_sequences_are_verified_as_well(family):
    model = sequence_classifier(family)
    head = model.score if family == "llama" else model.classifier
    found = verify(classifier(model, head=head), texts_of(2, 8, 0), texts_of(3, 7, 1), lr=1e-3)
    assert found.verdict == "first order" and found.errors["second"] < found.errors["first"] < 0.05
    assert found.errors["fixed_features"] > found.errors["first"]


@pytest.mark.parametrize("tied", [False, True])
def test_fixed_features_are_the_step_of_the_head_alone(tied):
    model = language_model(tie_word_embeddings=tied)
    task = causal_lm(model)
    found = verify(task, UPDATE, OBSERVE, lr=1e-6)
    head = copy.deepcopy(model.lm_head)
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    with torch.no_grad():
        head.weight += found.predicted.step.total[name]
    hidden = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    with torch.no_grad():
        logits = torch.cat(list(task.logits(model, OBSERVE)))
    hook.remove()
    change = head(torch.cat(hidden)).log_softmax(dim=-1) - logits.log_softmax(dim=-1)
    change_N = change.gather(1, task.labels(OBSERVE)[:, None])[:, 0]
    expected = torch.linalg.vector_norm(change_N - found.true_N) / torch.linalg.vector_norm(found.true_N)
    assert found.errors["fixed_features"] == pytest.approx(expected.item(), rel=1e-3)
    assert found.errors["fixed_features"] > 10 * found.errors["first"]


def test_weights_are_put_back_when_something_fails():
    task = classifier(nn.Linear(3, 4))
    before = copy.deepcopy(task.model.state_dict())
    with pytest.raises(RuntimeError, match="on purpose"), moved(task, {"weight": torch.ones(4, 3)}):
        raise RuntimeError("on purpose")
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


def test_every_verdict_has_words():
    assert set(VERDICTS) == {"first order", "softmax", "kernel", "beyond", "rounding"}


class Encoder(nn.Module):
    """torch's own transformer layer, which has a fused path in evaluation mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), nn.Linear(6, 4)
        self.double()

    def forward(self, rows):
        return self.head(self.layer(rows)[:, -1])


def test_torchs_own_transformer_layers_are_predicted():
    rows = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = rows, torch.tensor([0, 1, 2])
    for enabled in (True, False):
        torch.backends.mha.set_fastpath_enabled(enabled)
        try:
            found = verify(classifier(Encoder()), batch, batch, lr=1e-3)
            with evaluated(Encoder()):  # the fused path calls no hook of what is inside, either
                assert not torch.backends.mha.get_fastpath_enabled()
            assert torch.backends.mha.get_fastpath_enabled() == enabled
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        assert found.errors["first"] < 1e-2 and found.errors["second"] < 1e-4
