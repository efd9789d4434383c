"""Every name of TRL, transformers and accelerate that is not public API, in one place, with the versions it holds for.

Each name has a contract test in tests/integration/test_compat.py. Nothing else in the package may import such names.
"""

import contextlib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

SUPPORTED = {"trl": ">=1.16,<1.17", "transformers": ">=5.23,<5.24", "torch": ">=2.13"}


def check_versions(installed: dict[str, str | None]) -> None:
    """Refuse versions outside the tested ranges, all of them named in one message.

    Args:
        installed (`dict[str, str | None]`): Version per package, None where it is not installed.

    Raises:
        ImportError: If a package is missing or outside its range.
    """
    wrong = [
        f"{name}{wanted} (found {installed.get(name) or 'none'})"
        for name, wanted in SUPPORTED.items()
        if not installed.get(name) or not SpecifierSet(wanted, prereleases=True).contains(installed[name])
    ]
    if wrong:
        raise ImportError(
            f"trl-dynamics needs {', '.join(wrong)}. Install the tested versions: pip install -c constraints.txt "
            "trl-dynamics, or " + " ".join(f"pip install '{name}{wanted}'" for name, wanted in SUPPORTED.items())
        )


def installed_versions(names: tuple[str, ...]) -> dict[str, str | None]:
    """Installed version of each package, None where it is missing."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


check_versions(installed_versions(tuple(SUPPORTED)))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback  # noqa: E402
from transformers import Trainer as HFTrainer  # noqa: E402
from trl import RichProgressCallback  # noqa: E402
from trl.trainer.utils import maybe_gather_lm_head_ctx  # noqa: E402

DISPLAYS = (PrinterCallback, ProgressCallback, RichProgressCallback)


@contextlib.contextmanager
def full_head_weights(head: nn.Linear) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Weight (V, D) and bias (V,) of the LM head, whole on this process whatever shards them.

    Only valid inside the model's own forward: FSDP2 holds the head as DTensors there, ZeRO-3 as empty parameters that
    no hook gathers because the head module itself is never called.
    """
    weight, bias = head.weight, getattr(head, "bias", None)
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
        bias = bias.full_tensor() if bias is not None else None
    with maybe_gather_lm_head_ctx(weight, bias):
        yield weight, bias


def logit_transform(model: PreTrainedModel) -> tuple[float, float | None]:
    """What a model does to its raw logits: (factor, soft cap), the cap applied after the factor, None for no cap."""
    config = model.config.get_text_config()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name)), getattr(config, "final_logit_softcapping", None)
    scaling = getattr(config, "logits_scaling", None)
    factor = 1.0
    if scaling is not None:
        factor = float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)
    return factor, getattr(config, "final_logit_softcapping", None)


def base_causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal LM whose forward runs backbone and head: the model itself, or the one inside a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def log_apart(trainer: HFTrainer, scalars: dict[str, float]) -> None:
    """Log `scalars` as a line of their own: into the log history and to trackers, not to the progress display.

    TRL's `log` would average and clear the training metrics collected so far, and any log event resets the flag that
    asks for the training line of this very step; both are left as they were.
    """
    handler, should_log = trainer.callback_handler, trainer.control.should_log
    everyone = handler.callbacks
    handler.callbacks = [callback for callback in everyone if not isinstance(callback, DISPLAYS)]
    try:
        HFTrainer.log(trainer, dict(scalars))
    finally:
        handler.callbacks = everyone
        trainer.control.should_log = should_log
