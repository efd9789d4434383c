"""Operations whose derivatives of forward mode torch lacks or has wrong: written out as others, or refused.

A sweep over some 300 operations, against differences in float64, found those below; all others are right.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

Shape = tuple[int, ...]
Values = torch.Tensor | None


def silu(value: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """[`torch.nn.functional.silu`]; never in place."""
    return value * value.sigmoid()


def gelu(value: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    """[`torch.nn.functional.gelu`]."""
    if approximate == "tanh":
        return 0.5 * value * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (value + 0.044715 * value**3)))
    return 0.5 * value * (1 + torch.erf(value / 2**0.5))


def glu(value: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """[`torch.nn.functional.glu`]."""
    linear, gate = value.chunk(2, dim)
    return linear * gate.sigmoid()


def mish(value: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """[`torch.nn.functional.mish`]; never in place."""
    return value * F.softplus(value).tanh()


def layer_norm(
    value: torch.Tensor, normalized_shape: Shape, weight: Values = None, bias: Values = None, eps: float = 1e-5
) -> torch.Tensor:
    """[`torch.nn.functional.layer_norm`]."""
    axes = tuple(range(-len(normalized_shape), 0))
    normed = _normed(value, axes, eps)
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


def batch_norm(
    value: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """[`torch.nn.functional.batch_norm`]; running statistics are not updated."""
    return _channel_norm(value, (0, *range(2, value.dim())), running_mean, running_var, weight, bias, training, eps)


def instance_norm(
    value: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """[`torch.nn.functional.instance_norm`]; running statistics are not updated."""
    axes = tuple(range(2, value.dim()))
    return _channel_norm(value, axes, running_mean, running_var, weight, bias, use_input_stats, eps)


def _channel_norm(value, axes, mean_C, variance_C, weight_C, bias_C, from_input, eps):
    """Statistics over some axes, or given ones, of channels in axis 1."""

    def column(value_C: torch.Tensor) -> torch.Tensor:
        return value_C.view(-1, *[1] * (value.dim() - 2))

    if from_input:
        normed = _normed(value, axes, eps)
    else:
        normed = (value - column(mean_C)) * (column(variance_C) + eps).rsqrt()
    normed = normed if weight_C is None else normed * column(weight_C)
    return normed if bias_C is None else normed + column(bias_C)


def _normed(value: torch.Tensor, axes: Shape, eps: float) -> torch.Tensor:
    centred = value - value.mean(dim=axes, keepdim=True)
    return centred * (centred.square().mean(dim=axes, keepdim=True) + eps).rsqrt()


class Unhooked(TorchFunctionMode):
    """Takes away what is there for backwards alone, and would be in the way of a derivative of forward mode.

    Hooks may call requires_grad_, as transformers' do for checkpointing, which transformed functions refuse. What a
    model detaches, as DoRA does norms of weights, moves all the same when the weights do.

    Raises:
        ValueError: Where an operation is called whose derivative of forward mode is wrong.
    """

    WRITTEN_OUT: ClassVar[dict] = {
        torch.Tensor.requires_grad_: lambda value, requires_grad=True: value,
        torch.Tensor.detach: lambda value: value,
    }
    WRONG: ClassVar[dict] = {
        torch.cholesky_inverse: "torch.linalg.inv",
        torch.Tensor.cholesky_inverse: "torch.linalg.inv",
    }
    ORDER, REMEDY = "", ""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.WRONG:
            instead = f"; compute it by {self.WRONG[function]}" if self.WRONG[function] else ""
            raise ValueError(
                f"the model calls {function.__name__}, whose {self.ORDER}derivative torch's forward mode has wrong"
                f"{instead}{self.REMEDY}"
            )
        return self.WRITTEN_OUT.get(function, function)(*args, **(kwargs or {}))


class Nestable(Unhooked):
    """As [`Unhooked`], where derivatives of forward mode are taken twice."""

    # The second derivatives of torch's norms are wrong without a word, those of the activations are missing.
    WRITTEN_OUT: ClassVar[dict] = {
        **Unhooked.WRITTEN_OUT,
        F.silu: silu,
        F.gelu: gelu,
        F.glu: glu,
        F.mish: mish,
        F.layer_norm: layer_norm,
        F.batch_norm: batch_norm,
        F.instance_norm: instance_norm,
    }
    WRONG: ClassVar[dict] = {
        **Unhooked.WRONG,
        **dict.fromkeys((torch.layer_norm, torch.native_layer_norm), "torch.nn.functional.layer_norm"),
        **dict.fromkeys((torch.batch_norm, torch.native_batch_norm), "torch.nn.functional.batch_norm"),
        torch.instance_norm: "torch.nn.functional.instance_norm",
        **dict.fromkeys((torch.linalg.solve, torch.linalg.solve_ex, torch.linalg.tensorsolve), "torch.linalg.inv"),
        **dict.fromkeys((torch.det, torch.Tensor.det, torch.linalg.det), ""),
        **dict.fromkeys((torch.logdet, torch.Tensor.logdet), ""),
        **dict.fromkeys((torch.slogdet, torch.Tensor.slogdet, torch.linalg.slogdet), ""),
        **dict.fromkeys((torch.linalg.householder_product, torch.orgqr, torch.Tensor.orgqr), ""),
    }
    ORDER, REMEDY = "second ", ", or use influence with order=1, which is exact"
