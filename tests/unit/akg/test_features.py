"""Hidden states that a step moves, against real steps and the kernel of features."""

import copy

import pytest
import torch
from torch import nn

from akg_models import batch_of, language_model, sequence_classifier, texts_of
from trl_dynamics.akg.features import features, movement
from trl_dynamics.akg.kernel import Kernel
from trl_dynamics.akg.one_step import influence, update_gradient
from trl_dynamics.akg.real_step import moved
from trl_dynamics.akg.task import causal_lm, classifier

UPDATE, OBSERVE = (batch_of(2, 6, seed, num_labels=3, vocabulary=24) for seed in (0, 1))
# A module's name, and which of transformers' own hidden states its output is.
PLACES = [(None, -1), ("model.layers.0", 1), ("model.embed_tokens", 0)]


def small_model():
    """Few labels, so that K can be formed."""
    return language_model(vocab_size=24, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def hidden_of(model, batch, index: int) -> torch.Tensor:
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        states = model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[index]
    return states[(batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)]


@pytest.mark.parametrize("direction", ["sgd", "adamw"])
@pytest.mark.parametrize("module, index", PLACES)
def test_the_predicted_movement_is_that_of_a_real_step_but_for_the_second_order(module, index, direction):
    model, errors = small_model(), []
    for rate in (1e-3, 1e-4, 1e-5):
        rate = rate if direction == "sgd" else rate / 30
        step = influence(model, UPDATE, OBSERVE, direction=direction, lr=rate).step
        found = movement(model, step, OBSERVE, module)
        torch.testing.assert_close(found.before_ND, hidden_of(model, OBSERVE, index), rtol=1e-10, atol=1e-12)
        other = copy.deepcopy(model)
        optimizer = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[direction](other.parameters(), lr=rate)
        other(input_ids=UPDATE["input_ids"], labels=UPDATE["labels"]).loss.backward()
        optimizer.step()
        true_ND = hidden_of(other, OBSERVE, index) - hidden_of(model, OBSERVE, index)
        errors.append(float((found.change_ND - true_ND).norm() / true_ND.norm()))
    if module == "model.embed_tokens":  # linear in the weights: no second order
        assert max(errors) < 1e-6
    else:
        assert errors[1] < 0.15 * errors[0] and errors[2] < 0.15 * errors[1] and errors[2] < 1e-3


def test_it_is_the_kernel_of_features_times_the_force_that_enters_the_backbone():
    model, rate = small_model(), 0.1
    model.lm_head.requires_grad_(False)
    task = causal_lm(model)
    kernel = Kernel(features(task), UPDATE, OBSERVE)
    hidden_UD = hidden_of(model, UPDATE, -1)
    logits_UV = hidden_UD @ model.lm_head.weight.T
    label_U = task.labels(UPDATE)
    force_UV = (logits_UV.softmax(-1) - nn.functional.one_hot(label_U, logits_UV.shape[1])) / len(label_U)
    expected_ND = -rate * kernel.apply(force_UV @ model.lm_head.weight.detach())
    found = movement(task, influence(task, UPDATE, OBSERVE, lr=rate).step, OBSERVE)
    torch.testing.assert_close(found.change_ND, expected_ND, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(
        kernel.apply(torch.ones(kernel.shape_u, dtype=torch.float64)),
        kernel.exact().sum(dim=(2, 3)),
        rtol=1e-8,
        atol=1e-10,
    )


def test_chosen_layers_alone_move_what_comes_after_them():
    model = small_model()
    step = influence(model, UPDATE, OBSERVE, lr=0.1).step
    late = {name: change for name, change in step.total.items() if "layers.1." in name}
    assert late and not movement(model, type(step)({"update": late}), OBSERVE, "model.layers.0").change_ND.any()
    assert movement(model, type(step)({"update": late}), OBSERVE).change_ND.any()


def test_energy_and_cosine_are_of_each_position():
    model = small_model()
    found = movement(model, influence(model, UPDATE, OBSERVE, lr=0.1).step, OBSERVE)
    first, second = found.before_ND[2], found.change_ND[2]
    assert found.energy_N[2] == pytest.approx(float(second.square().sum().sqrt()))
    assert found.cosine_N[2] == pytest.approx(float(first @ second / first.norm() / second.norm()))
    assert found.item_N.tolist() == [0, 0, 0, 1, 1]


def test_classifiers_have_features_too():
    model, batch = sequence_classifier("bert"), texts_of(2, 6, 0)
    task = classifier(model, head=model.classifier)
    step = influence(task, batch, batch, lr=1e-5).step
    found, before = movement(task, step, batch), []
    hook = model.classifier.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    with torch.no_grad():
        next(task.logits(model, batch))
        with moved(task, step.total):
            next(task.logits(model, batch))
    hook.remove()
    torch.testing.assert_close(found.before_ND, before[0])
    torch.testing.assert_close(found.change_ND, before[1] - before[0], rtol=1e-3, atol=1e-9)


class ScaledInPlace(nn.Module):
    """Doubles what its body returned, in place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 7), nn.Linear(7, 4)
        self.double()

    def forward(self, rows):
        return self.head(self.body(rows).mul_(2.0))


def test_what_a_module_returned_is_taken_before_it_is_changed_in_place():
    model, rows = ScaledInPlace(), torch.randn(3, 6, dtype=torch.float64)
    batch, task = (rows, torch.tensor([0, 1, 2])), classifier(model, head=model.head)
    step = influence(task, batch, batch, lr=0.1).step
    body, before = movement(task, step, batch, "body"), model.body(rows).detach()
    torch.testing.assert_close(body.before_ND, before)
    torch.testing.assert_close(movement(task, step, batch).before_ND, 2 * before)
    moved_ND = rows @ step.total["body.weight"].T + step.total["body.bias"]
    torch.testing.assert_close(body.change_ND, moved_ND)


def test_what_has_no_features_is_told():
    model = small_model()
    with pytest.raises(ValueError, match="no module 'model.layers.9'"):
        features(model, "model.layers.9")
    with pytest.raises(ValueError, match="no head whose input"):
        features(classifier(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match="expected 5 rows, one per label"):
        movement(model, influence(model, UPDATE, OBSERVE, lr=0.1).step, OBSERVE, "model.rotary_emb")
    with pytest.raises(ValueError, match="have no loss"):
        update_gradient(features(model), UPDATE)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
