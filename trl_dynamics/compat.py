"""Every name of TRL, transformers and accelerate that is not public API, in one place (versions.py lists them).

Each name has a contract test in tests/integration/test_compat.py. Nothing else in the package may import such names.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from functools import partial

from trl_dynamics import versions

INSTALLED = versions.installed_versions(tuple(versions.ACCEPTED))
versions.check_versions(INSTALLED)
versions.check_private_names(INSTALLED)

import torch  # noqa: E402
from accelerate import Accelerator, DistributedType  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback  # noqa: E402
from transformers import Trainer as HFTrainer  # noqa: E402
from transformers.cache_utils import Cache, DynamicLayer  # noqa: E402
from trl import RichProgressCallback  # noqa: E402
from trl.trainer.utils import add_fused_lm_head, maybe_gather_lm_head_ctx  # noqa: E402

# What TRL's DPO asks its fused head for, and what its loss and metrics read.
DPO_HEAD_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
DISPLAYS = (PrinterCallback, ProgressCallback, RichProgressCallback)

# The main process alone: every process imports this.
if os.environ.get("RANK", "0") == "0" and (untested := versions.untested(INSTALLED)):
    logging.getLogger(__name__).warning(untested)


class _PromptLayer(DynamicLayer):
    """Keys and values of one layer's prompts: kept once per prompt, given out once per row that continues one."""

    prompt_B: torch.Tensor | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if self.prompt_B is None:
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = self.keys[self.prompt_B], self.values[self.prompt_B]
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


class PromptCache(Cache):
    """A key/value cache for prompts that many rows continue: filled by one forward over the prompts, then read only.

    A row's own keys are not kept, and a layer's keys exist row by row only while that layer runs.
    """

    def __init__(self):
        super().__init__(layer_class_to_replicate=_PromptLayer)

    def continue_from(self, prompt_B: torch.Tensor) -> None:
        """The rows of the next forward continue these prompts, by index among the rows of the first forward."""
        for layer in self.layers:
            layer.prompt_B = prompt_B


def can_share_prompts(model: nn.Module) -> bool:
    """Whether rows may continue prompts through a key/value cache: plain or sliding attention in every layer.

    Recurrent and hybrid models keep a state instead, chunked attention counts its chunks from the padded start, and
    adapters that learn a prompt put keys of their own in front.
    """
    if any(getattr(config, "is_prompt_learning", False) for config in getattr(model, "peft_config", {}).values()):
        return False
    base = base_causal_lm(model)
    config = base.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    shared_kv = getattr(config, "num_kv_shared_layers", 0)
    return kinds <= {"full_attention", "sliding_attention"} and not base._is_stateful and not shared_kv


@contextlib.contextmanager
def without_zero3() -> Iterator[None]:
    """Load models whole on this process, also where training arguments have switched on ZeRO-3 for all loading."""
    zero3 = sys.modules.get("transformers.integrations.deepspeed")
    if zero3 is None:
        yield
        return
    reference, zero3._hf_deepspeed_config_weak_ref = zero3._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        zero3._hf_deepspeed_config_weak_ref = reference


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
    # TRL's function takes for granted that ZeRO-3 splits every model of a process; one that it does not is whole.
    with maybe_gather_lm_head_ctx(*(part for part in (weight, bias) if hasattr(part, "ds_status"))):
        yield weight, bias


def is_plain_linear(head: nn.Module) -> bool:
    """Whether the module is its `weight` and `bias` and nothing more, wherever accelerate's hooks have moved it.

    Adapters, quantised layers and heads with a forward of their own, on the class or on the instance, are not.
    """
    own = vars(head)
    forward = own.get("_old_forward" if "_hf_hook" in own else "forward")
    if forward is not None and getattr(forward, "__func__", None) is not nn.Linear.forward:
        return False
    is_linear = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    return is_linear and head.weight.device.type != "meta"


def whole_numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, of which ZeRO-3 leaves none in sight outside a forward."""
    return getattr(parameter, "ds_numel", parameter.numel())


def shards_or_casts_parameters(accelerator: Accelerator, *, half_weights: bool) -> bool:
    """Whether FSDP or DeepSpeed decides what dtype a forward computes in, and it is not float32."""
    wrapped = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return wrapped and (half_weights or accelerator.mixed_precision != "no")


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


def reset_rope(model: nn.Module) -> None:
    """Put rotary embeddings of type dynamic back to where a fresh model starts.

    They keep the frequencies of the longest row that they have seen, until a row below the trained length comes: a
    row of just that length would else be scored with the frequencies of whatever ran before.
    """
    for module in model.modules():
        trained = getattr(module, "original_max_seq_len", None)
        if trained is None:
            continue
        for name in [name for name in (*vars(module), *module._buffers) if name.endswith("max_seq_len_cached")]:
            prefix = name.removesuffix("max_seq_len_cached")
            original = getattr(module, f"{prefix}original_inv_freq", None)
            if original is not None and getattr(module, name) > trained:
                frequencies = getattr(module, f"{prefix}inv_freq")
                setattr(module, f"{prefix}inv_freq", original.to(frequencies.device).clone())
                setattr(module, name, trained)


def longrope_boundaries(config) -> tuple[int, ...]:
    """Lengths above which LongRoPE takes its long factors for a whole batch; none for other models."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    found = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    return tuple(sorted({int(boundary) for boundary in found if boundary}))


def base_causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal LM whose forward runs backbone and head: the model itself, or the one inside a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def add_sum_sq_to_head(base: PreTrainedModel) -> None:
    """Put a fused head over the one of TRL's DPO whose output also has `log_sum_sq_probs`; the rest is the same bits.

    Calls without `fused_lm_head=True` go to the forward that was there.
    """
    add_fused_lm_head(base, outputs=(*DPO_HEAD_OUTPUTS, "log_sum_sq_probs"))


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


@contextlib.contextmanager
def checkpointing_without_reentry(model: nn.Module) -> Iterator[None]:
    """Inside, layers that checkpoint by torch's reentrant function, which autograd.grad refuses, use the other one."""
    kept = {}
    for module in model.modules():
        function = vars(module).get("_gradient_checkpointing_func")
        if getattr(function, "func", None) is checkpoint and function.keywords.get("use_reentrant", True):
            kept[module] = function
            module._gradient_checkpointing_func = partial(checkpoint, **(function.keywords | {"use_reentrant": False}))
    try:
        yield
    finally:
        for module, function in kept.items():
            module._gradient_checkpointing_func = function
