"""What a model is put into while akg computes with it, and put back from: evaluation mode, frozen parameters."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trl_dynamics.compat import checkpointing_without_reentry
from trl_dynamics.stats_head import kept_state


@contextlib.contextmanager
def evaluated(model: nn.Module, *, checkpointing: bool = False) -> Iterator[None]:
    """Evaluation mode, and attention by operations that have derivatives of forward mode; all put back at the end, and
    what forwards changed in the modules' buffers and plain attributes as well.

    With `checkpointing`, the modules that checkpoint their activations still do so, which transformers makes them do
    in training mode only; what is inside of them stays in evaluation mode. Reentrant ones do it the other way, since
    autograd.grad cannot go through them. Models that are configured to drop anything do without, since some of their
    layers drop by their own mode.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    if checkpointing and not _may_drop(model):
        for module in modes:
            module.training = bool(getattr(module, "gradient_checkpointing", False))
    fused = torch.backends.mha.get_fastpath_enabled()  # nn.TransformerEncoderLayer's own, with no derivative at all
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with kept_state(model), sdpa_kernel(SDPBackend.MATH), checkpointing_without_reentry(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes.items():
            module.training = mode


def _may_drop(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    rates = [value for name, value in settings.items() if "drop" in name and not name.startswith("classifier")]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient, so that none is computed; at the end those that did do so again."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
