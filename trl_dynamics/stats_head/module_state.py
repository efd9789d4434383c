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

    def put_back(self) -> bool:
        """Undo what was written into the tensor itself; whether that could be done."""
        if self.tensor._version == self.version:
            return True
        if self.copy is None:
            return False
        with torch.no_grad():
            self.tensor.copy_(self.copy)
        return True


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

    def put_back(self, where: str) -> list[str]:
        """Make the module hold what it held; the names of large buffers that were written to and stay so."""
        for place, values in self.held:
            for name, value in values.items():
                if place.get(name, place) is not value:
                    place[name] = value
        (buffers, old_buffers), (_, old_attributes) = self.held
        for name in buffers.keys() - old_buffers.keys():
            del buffers[name]
        for name in _plain_attributes(self.module).keys() - old_attributes.keys():
            delattr(self.module, name)
        return [f"{where}.{name}" for name, kept in self.tensors.items() if not kept.put_back()]


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
        lost = [where for name, state in states.items() for where in state.put_back(name)]
        if lost:
            raise ValueError(
                f"a forward in evaluation mode writes to {', '.join(lost)}, a buffer of more than "
                f"{LARGEST_COPY >> 20} MiB, so scoring would change what is trained; train without a probe set and "
                "score checkpoints with `trl-dynamics track`"
            )


def _plain_attributes(module: nn.Module) -> dict[str, object]:
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _LEFT_ALONE and (type(value) in _PLAIN or isinstance(value, torch.Tensor))
    }
