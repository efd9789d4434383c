"""The error that central differences state holds at the confidence that they claim."""

import copy

import pytest
import torch

from akg_models import batch_of, most_outside
from tiny import tiny_model
from trl_dynamics.akg.one_step import Change, predict, update_gradient
from trl_dynamics.akg.split.differences import CentralDifferences, derivative, whole
from trl_dynamics.akg.steps import Step, step_of
from trl_dynamics.akg.task import Task, causal_lm, label_logp

NUM_DRAWS = 216
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
MODELS = [("llama", False), ("llama", True), ("gpt_neox", False)]
SPREADS, DIRECTIONS = (0.1, 0.2, 0.4), (("sgd", 0.1), ("adamw", 1e-3), ("adamw", 1e-5))


def drawn(task: Task, seed: int) -> tuple[Step, dict]:
    """Other weights for a model, a step of it, and observers."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in task.model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, SPREADS[seed % 3], generator=rng)
    direction, lr = DIRECTIONS[seed // 3 % 3]
    gradients = update_gradient(task, batch_of(2, 8, 2 * seed)).gradients
    step = step_of(gradients, task.trainable(), direction, lr, 1.0)
    return Step({"update": step.parts["update"]}), batch_of(6, 16, 2 * seed + 1, num_labels=12)


def found_by_differences(task: Task, step: Step, observe: dict) -> Change:
    differences = CentralDifferences(whole(task.model), step)
    return differences.predict(lambda: label_logp(task, observe), task.labels(observe), task.items(observe)).total


def test_999_of_1000_values_are_within_the_stated_error():
    outside, num_values, ratios = 0, 0, []
    for index, (family, tied) in enumerate(MODELS):
        task = causal_lm(tiny_model(family, tie_word_embeddings=tied, **SIZES))
        double = causal_lm(copy.deepcopy(task.model).double())
        for draw in range(NUM_DRAWS // len(MODELS)):
            step, observe = drawn(task, 100 * index + draw)
            double.model.load_state_dict(task.model.state_dict())
            found = found_by_differences(task, step, observe)
            wide = Step({"update": {name: change.double() for name, change in step.parts["update"].items()}})
            exact_N = predict(double, None, wide, observe).total.target_N
            off_N = (found.target_N.double() - exact_N).abs()
            outside, num_values = outside + int((off_N > found.error_N).sum()), num_values + len(off_N)
            ratios.append(float(found.error_N.norm() / exact_N.norm()))
    assert num_values > 10_000 and outside <= most_outside(num_values)
    assert max(ratios) < 0.03, "what is stated says nothing"


@pytest.mark.parametrize("num_labels", [1, 2, 3, 7, 12, 40])
def test_it_holds_of_few_labels_with_unequal_rounding(num_labels):
    """Rounding whose variances are scaled inverse chi-squares of three degrees of freedom, in units of the values'."""
    num_draws, distance = 5_000 // num_labels, 1.0
    rng = torch.Generator().manual_seed(num_labels)
    degrees_DN3 = torch.randn(num_draws, num_labels, 3, generator=rng, dtype=torch.float64)
    spread_DN = (3 / degrees_DN3.square().sum(dim=-1)).sqrt()
    noise_5DN = torch.randn(5, num_draws, num_labels, generator=rng, dtype=torch.float64) * spread_DN
    outside = 0
    for up, down, far_up, far_down, here in noise_5DN.unbind(1):
        near, far = ((distance, up), (-distance, down)), ((2 * distance, far_up), (-2 * distance, far_down))
        value_N, error_N = derivative(near, far, here, distance)
        correction_N = ((up - down) / 2 - (far_up - far_down) / 4).abs() / 3
        outside += int((value_N.abs() > error_N - correction_N).sum())
    assert outside <= most_outside(num_draws * num_labels)


def test_values_that_agree_by_chance_state_the_rounding_of_a_value():
    """One label at 8 nats in float32, where neighbours are 9.5e-7 apart, on a line that the fourth difference fits."""
    here = torch.tensor([-8.0], dtype=torch.float64)
    near, far = ((1.0, here + 1e-3), (-1.0, here - 1e-3)), ((2.0, here + 2e-3), (-2.0, here - 2e-3))
    _, error_N = derivative(near, far, here, 1.0, dtype=torch.float32)
    assert float(error_N) > 9.5e-7
