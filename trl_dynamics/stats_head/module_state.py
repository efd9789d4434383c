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
_PLAIN = (torch.Tensor, bool, int, float, complex, str, type(None))
# `training` belongs to whoever switches modes; torch keeps its own tables of each module under these names.
_LEFT_ALONE = frozenset({"training", *vars(nn.Module())})


@dataclass(frozen=True)
class _Kept:
    """A tensor or a number that a module holds; of a tensor its version and, if it is small, a copy."""

    value: object
    version: int | None
    copy: torch.Tensor | None

    @staticmethod
    def of(value: object) -> "_Kept":
        if not isinstance(value, torch.Tensor) or value.is_inference():
            return _Kept(value, None, None)
        small = value.numel() * value.element_size() <= LARGEST_COPY
        return _Kept(value, value._version, value.detach().clone() if small else None)

    def put_back(self, where: str) -> None:
        """Undo what was written into the tensor itself."""
        if self.version is None or self.value._version == self.version:
            return
        if self.copy is None:
            raise ValueError(
                f"a forward in evaluation mode writes to {where}, a buffer of more than {LARGEST_COPY >> 20} MiB, so "
                "scoring would change what is trained; train without a probe set and score checkpoints with "
                "`trl-dynamics track`"
            )
        with torch.no_grad():
            self.value.copy_(self.copy)


@contextlib.contextmanager
def kept_state(model: nn.Module) -> Iterator[None]:
    """Forwards inside start from fresh rotary frequencies; every buffer and plain attribute is put back at the end.

    Plain attributes are the tensors, numbers and strings that modules hold besides their parameters.

    Raises:
        ValueError: At the end, if a forward wrote to a buffer that is too large to be kept.
    """
    modules = dict(model.named_modules())
    kept = {name: _state_of(module) for name, module in modules.items()}
    reset_rope(model)
    try:
        yield
    finally:
        for name, module in modules.items():
            _restore(module, name, *kept[name])


def _state_of(module: nn.Module) -> tuple[dict[str, _Kept], dict[str, _Kept]]:
    buffers = {name: _Kept.of(value) for name, value in module._buffers.items()}
    return buffers, {name: _Kept.of(value) for name, value in _plain_attributes(module).items()}


def _plain_attributes(module: nn.Module) -> dict[str, object]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN) and name not in _LEFT_ALONE and not isinstance(value, nn.Parameter)
    }


def _restore(module: nn.Module, where: str, buffers: dict[str, _Kept], attributes: dict[str, _Kept]) -> None:
    for held, kept in ((module._buffers, buffers), (vars(module), attributes)):
        for name, before in kept.items():
            if held.get(name, held) is not before.value:
                held[name] = before.value
            before.put_back(f"{where}.{name}")
    for name in module._buffers.keys() - buffers.keys():
        del module._buffers[name]
    for name in _plain_attributes(module).keys() - attributes.keys():
        delattr(module, name)
