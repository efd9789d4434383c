"""What one optimiser step does to the parameters, in parts that add up to it, before it is taken.

SGD's step is linear in the gradient and in what it remembers. Adam's is not; its parts freeze the diagonal
D = 1 / (sqrt(v_hat) + eps) at the value that this very step will use, and so add up to the step all the same, but are
linear only given D and the clipping factor: the part of one example does not say what the step without it would do.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

Tensors = dict[str, torch.Tensor]
UPDATE, MOMENTUM, DECAY = "update", "momentum", "decay"


@dataclass(frozen=True)
class Step:
    """A parameter step, split.

    Args:
        parts (`dict[str, dict]`): Per part (`update`: this gradient's, `momentum`: what earlier ones left, `decay`:
            weight decay's) the change of each parameter. Parts that are zero are left out.
        clip (`float`): The factor that clipping put on the gradient, 1 where nothing was clipped.
    """

    parts: dict[str, Tensors]
    clip: float = 1.0

    @property
    def total(self) -> Tensors:
        """The whole change of each parameter."""
        total: Tensors = {}
        for part in self.parts.values():
            for name, change in part.items():
                total[name] = total[name] + change if name in total else change
        return total


def step_of(
    gradients: Mapping[str, torch.Tensor],
    parameters: Mapping[str, nn.Parameter],
    direction: "str | torch.optim.Optimizer | Callable[[Tensors], Tensors]",
    lr: float | None,
    max_grad_norm: float | None,
) -> Step:
    """The step that a direction takes for these gradients; of half precision in float32, where it does not vanish.

    Args:
        gradients, parameters: By name; a parameter that has no gradient is not moved, as by torch's optimisers.
        direction: `"sgd"` or `"adamw"` for a fresh optimiser of torch with this `lr` and torch's other defaults, an
            optimiser as it stands (`SGD`, `Adam` or `AdamW`; its state, rates and groups count, and nothing of it is
            changed), or a function from gradients to changes.
        lr (`float`, *optional*): The rate; needed by name, otherwise the optimiser's own.
        max_grad_norm (`float`, *optional*): Clips the whole gradient first, as `clip_grad_norm_` does. None and 0 do
            not clip, as in transformers' Trainer.

    Raises:
        ValueError: If the direction is unknown, a rate is missing or given twice, or an optimiser holds none of the
            parameters, or one of them twice.
    """
    gradients = {name: g.to(torch.promote_types(g.dtype, torch.float32)) for name, g in gradients.items()}
    clip = _clip_factor(gradients, max_grad_norm)
    gradients = {name: gradient * clip for name, gradient in gradients.items()}
    if isinstance(direction, str):
        direction = _fresh(direction, parameters, lr)
    elif lr is not None:
        raise ValueError("lr is given beside a direction that has its own; leave it out")
    if not isinstance(direction, torch.optim.Optimizer):
        return Step({UPDATE: dict(direction(gradients))}, clip)
    return Step(_parts_of(plain(direction), gradients, parameters), clip)


def plain(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser of torch, which accelerate and DeepSpeed wrap.

    Raises:
        ValueError: If it is none whose step is known here.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    _kind(optimizer)
    return optimizer


def split_of(optimizer: torch.optim.Optimizer) -> Callable:
    """What of [`PARTS`] splits the steps of an optimiser, for gradients and states that it does not hold itself.

    Raises:
        ValueError: As [`plain`].
    """
    return PARTS[_kind(optimizer)]


def _kind(optimizer: torch.optim.Optimizer) -> type:
    """The class of torch whose steps an optimiser takes; it may not only inherit from it.

    Raises:
        ValueError: If there is none.
    """
    for kind in PARTS:
        if isinstance(optimizer, kind) and inspect.unwrap(type(optimizer).step) is inspect.unwrap(kind.step):
            return kind
    raise ValueError(
        f"direction is a {type(optimizer).__name__}, expected SGD, Adam or AdamW of torch.optim; give a function "
        "from gradients to parameter changes for another optimiser"
    )


def _parts_of(
    optimizer: torch.optim.Optimizer, gradients: Tensors, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensors]:
    names, split = {id(parameter): name for name, parameter in parameters.items()}, split_of(optimizer)
    parts: dict[str, Tensors] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name not in gradients:
                continue
            if name in parts.get(UPDATE, {}):
                raise ValueError(f"the optimiser holds {name!r} twice, and so would move it twice; give it once")
            state, value = _widened(optimizer.state.get(parameter, {}), gradients[name]), parameter.detach()
            for part, change in split(gradients[name], value.to(gradients[name].dtype), group, state):
                parts.setdefault(part, {})[name] = change
    if not parts:
        raise ValueError("the optimiser holds no parameter of this model that has a gradient; was it made for a copy?")
    return parts


def _widened(state: Mapping, gradient: torch.Tensor) -> dict:
    """What an optimiser remembers of a parameter in its gradient's dtype: half precision loses what is small."""
    return {
        name: value.to(gradient.dtype) if isinstance(value, torch.Tensor) and value.shape == gradient.shape else value
        for name, value in state.items()
    }


def sgd_parts(gradient: torch.Tensor, value: torch.Tensor, group: dict, state: dict) -> list[tuple[str, torch.Tensor]]:
    """torch.optim.SGD: -lr (g + wd theta) and what the momentum buffer adds, with dampening and Nesterov."""
    lr, momentum, buffer = group["lr"], group["momentum"], state.get("momentum_buffer")
    fresh, kept = 1.0, 0.0
    if momentum and buffer is None:
        fresh = 1.0 + momentum if group["nesterov"] else 1.0
    elif momentum:
        fresh, kept = 1.0 - group["dampening"], momentum
        if group["nesterov"]:
            fresh, kept = 1.0 + momentum * fresh, momentum**2
    sign = -1.0 if group["maximize"] else 1.0
    parts = [(UPDATE, -lr * fresh * sign * gradient)]
    if kept:
        parts.append((MOMENTUM, -lr * kept * buffer))
    if group["weight_decay"]:
        parts.append((DECAY, -lr * fresh * group["weight_decay"] * value))
    return parts


def adam_parts(
    gradient: torch.Tensor, value: torch.Tensor, group: dict, state: dict
) -> list[tuple[str, torch.Tensor]]:
    """torch.optim.Adam and AdamW, bias correction and eps where torch puts them.

    With t steps done: update = -lr (1 - b1) / (1 - b1^(t+1)) D g, momentum = -lr b1 / (1 - b1^(t+1)) D m_t, decay =
    -lr wd theta (AdamW) or, for Adam, what wd theta adds to the gradient.
    """
    lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
    decoupled = group.get("decoupled_weight_decay", False)
    gradient = -gradient if group["maximize"] else gradient
    whole = gradient if decoupled or not decay else gradient + decay * value
    done = float(state["step"]) if "step" in state else 0.0
    mean = state.get("exp_avg")
    square = (1 - beta2) * whole.square() + (beta2 * state["exp_avg_sq"] if mean is not None else 0.0)
    if group["amsgrad"]:
        square = torch.maximum(state["max_exp_avg_sq"], square) if mean is not None else square
    unbiased1, unbiased2 = 1 - beta1 ** (done + 1), 1 - beta2 ** (done + 1)
    scale = lr / unbiased1 / (square.sqrt() / unbiased2**0.5 + group["eps"])
    parts = [(UPDATE, -(1 - beta1) * scale * gradient)]
    if mean is not None:
        parts.append((MOMENTUM, -beta1 * scale * mean))
    if decay:
        parts.append((DECAY, -lr * decay * value if decoupled else -(1 - beta1) * decay * scale * value))
    return parts


PARTS: dict[type, Callable] = {torch.optim.SGD: sgd_parts, torch.optim.Adam: adam_parts}
FRESH = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


def _fresh(name: str, parameters: Mapping[str, nn.Parameter], lr: float | None) -> torch.optim.Optimizer:
    if name not in FRESH:
        raise ValueError(f"direction is {name!r}, expected one of {sorted(FRESH)}, an optimiser or a function")
    if lr is None:
        raise ValueError(f"direction {name!r} needs lr, the learning rate of the step")
    if not isinstance(lr, int | float) or not 0 <= lr < math.inf:
        raise ValueError(f"lr is {lr!r}, expected a number of at least 0")
    return FRESH[name](list(parameters.values()), lr=lr)


def _clip_factor(gradients: Mapping[str, torch.Tensor], max_norm: float | None) -> float:
    if max_norm is None or max_norm <= 0 or not gradients:
        return 1.0
    return min(1.0, float(max_norm / (whole_norm(gradients) + 1e-6)))


def whole_norm(gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The Euclidean norm of all gradients together."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]))
