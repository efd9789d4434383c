"""What a step multiplies its gradient by: other gradients take the place of a part of it, D as it is."""

import copy

import pytest
import torch

from trl_dynamics.akg.steps import UPDATE, step_of, update_scale

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.1, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.95), weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True, maximize=True),
}


def trained(name: str, num_steps: int) -> tuple[torch.optim.Optimizer, dict, dict]:
    """An optimiser after some steps, its parameters, and the gradients of the next one."""
    generator = torch.Generator().manual_seed(num_steps)

    def draw() -> torch.Tensor:
        return torch.randn(3, 2, generator=generator, dtype=torch.float64)

    parameters = {key: torch.nn.Parameter(draw()) for key in ("a", "b")}
    optimizer = OPTIMIZERS[name](list(parameters.values()))
    for _ in range(num_steps):
        for parameter in parameters.values():
            parameter.grad = draw()
        optimizer.step()
    return optimizer, parameters, {key: draw() for key in parameters}


@pytest.mark.parametrize("num_steps", [0, 1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_times_the_gradient_is_the_update_part(name, num_steps):
    optimizer, parameters, gradients = trained(name, num_steps)
    state = copy.deepcopy(optimizer.state_dict())
    scale = update_scale(gradients, parameters, optimizer)
    update = step_of(gradients, parameters, optimizer, None, None).parts[UPDATE]
    for key, gradient in gradients.items():
        torch.testing.assert_close(scale[key] * gradient, update[key], rtol=1e-12, atol=0)
    assert str(optimizer.state_dict()) == str(state)


@pytest.mark.parametrize("num_steps", [0, 1, 3])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("adam", "adamw", "amsgrad")])
def test_a_gradient_added_to_sgds_adds_its_share_to_the_real_step(name, num_steps):
    optimizer, parameters, gradients = trained(name, num_steps)
    other = {key: gradient.flip(0) for key, gradient in gradients.items()}
    scale = update_scale(gradients, parameters, optimizer)
    ends = []
    for extra in (0.0, 1.0):
        model = {key: torch.nn.Parameter(value.detach().clone()) for key, value in parameters.items()}
        copied = OPTIMIZERS[name](list(model.values()))
        copied.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for key, parameter in model.items():
            parameter.grad = gradients[key] + extra * other[key]
        copied.step()
        ends.append(model)
    for key in parameters:
        torch.testing.assert_close((ends[1][key] - ends[0][key]).detach(), scale[key] * other[key])


def test_adams_is_minus_lr_times_its_frozen_diagonal():
    """Element by element from the formula: t steps done, -lr (1 - b1) / (1 - b1^(t+1)) / (sqrt(v_hat) + eps)."""
    optimizer, parameters, gradients = trained("adamw", 3)
    scale = update_scale(gradients, parameters, optimizer)
    for key, parameter in parameters.items():
        squares = optimizer.state[parameter]["exp_avg_sq"]
        for index in range(parameter.numel()):
            old, fresh = float(squares.view(-1)[index]), float(gradients[key].view(-1)[index]) ** 2
            corrected = (0.95 * old + 0.05 * fresh) / (1 - 0.95**4)
            wanted = -0.1 * (1 - 0.8) / (1 - 0.8**4) / (corrected**0.5 + 1e-8)
            assert float(scale[key].view(-1)[index]) == pytest.approx(wanted, rel=1e-12)


def test_parameters_that_the_step_leaves_alone_have_none():
    optimizer, parameters, gradients = trained("adamw", 1)
    assert set(update_scale({"a": gradients["a"]}, parameters, optimizer)) == {"a"}
    with pytest.raises(ValueError, match="holds no parameter of this model that has a gradient"):
        update_scale({}, parameters, optimizer)


def test_other_optimisers_are_told():
    _, parameters, gradients = trained("sgd", 0)
    other = torch.optim.RMSprop(list(parameters.values()), lr=0.1)
    with pytest.raises(ValueError, match="direction is a RMSprop, expected SGD, Adam or AdamW"):
        update_scale(gradients, parameters, other)
