"""What a forward in evaluation mode changes on a model's modules, put back.

Rotary embeddings that scale with the length of a row keep frequencies and the longest length seen, as buffers or as
plain attributes. Training goes on from them, so a scoring must leave them as they were.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from trl_dynamics.compat import reset_rope

# A larger buffer is not copied: quantised weights are buffers, and no forward writes to them.
LARGEST_COPY = 1 << 24  # bytes
_PLAIN = frozenset({bool, int, float, complex, str, type(None)})
# `training` is restored by the code that switches modes; the other names are torch's own tables of a module.
_LEFT_ALONE = frozenset({"training", *vars(nn.Module())})


@dataclass(frozen=True)
class _Kept:
    """A tensor that a module holds: its version and, if it is small, a copy."""

    tensor: torch.Tensor
    version: int
    copy: torch.Tensor | None

    @staticmethod
    def of(tensor: torch.Tensor) -> "_Kept":
        small = tensor.numel() * tensor.element_size() <= LARGEST_COPY
        return _Kept(tensor, tensor._version, tensor.detach().clone() if small else None)

    def put_back(self, where: str) -> None:
        """Undo what was written into the tensor itself."""
        if self.tensor._version == self.version:
            return
        if self.copy is None:
            raise ValueError(
                f"a forward in evaluation mode writes to {where}, a buffer of more than {LARGEST_COPY >> 20} MiB, so "
                "scoring would change what is trained; train without a probe set and score checkpoints with "
                "`trl-dynamics track`"
            )
        with torch.no_grad():
            self.tensor.copy_(self.copy)


class _ModuleState:
    """What one module holds: buffers and plain attributes by name, and the tensors among them as they were."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.held = [(module._buffers, dict(module._buffers)), (vars(module), _plain_attributes(module))]
        self.tensors = {
            name: _Kept.of(value)
            for _, values in self.held
            for name, value in values.items()
            if isinstance(value, torch.Tensor) and not value.is_inference()
        }

    def put_back(self, where: str) -> None:
        """Make the module hold what it held."""
        for place, values in self.held:
            for name, value in values.items():
                if place.get(name, place) is not value:
                    place[name] = value
        (buffers, old_buffers), (_, old_attributes) = self.held
        for name in buffers.keys() - old_buffers.keys():
            del buffers[name]
        for name in _plain_attributes(self.module).keys() - old_attributes.keys():
            delattr(self.module, name)
        for name, kept in self.tensors.items():
            kept.put_back(f"{where}.{name}")


@contextlib.contextmanager
def kept_state(model: nn.Module) -> Iterator[None]:
    """Forwards inside start from fresh rotary frequencies; every buffer and plain attribute is put back at the end.

    Plain attributes are the tensors, numbers and strings that modules hold besides their parameters.

    Raises:
        ValueError: At the end, if a forward wrote to a buffer that is too large to be kept.
    """
    states = {name: _ModuleState(module) for name, module in model.named_modules()}
    reset_rope(model)
    try:
        yield
    finally:
        for name, state in states.items():
            state.put_back(name)


def _plain_attributes(module: nn.Module) -> dict[str, object]:
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _LEFT_ALONE and (type(value) in _PLAIN or isinstance(value, torch.Tensor))
    }
