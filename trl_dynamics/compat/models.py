"""What transformers, PEFT and accelerate do to a model that their public API does not say."""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from trl.trainer.utils import maybe_gather_lm_head_ctx

from trl_dynamics.compat.zero import is_in_pieces


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
    with maybe_gather_lm_head_ctx(*(part for part in (weight, bias) if is_in_pieces(part))):
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


def longrope_boundaries(config: PretrainedConfig) -> tuple[int, ...]:
    """Lengths above which LongRoPE takes its long factors for a whole batch; none for other models."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    found = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    return tuple(sorted({int(boundary) for boundary in found if boundary}))


def base_causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal LM whose forward runs backbone and head: the model itself, or the one inside a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def attention_of(model: PreTrainedModel) -> str:
    """The attention implementation that a model runs, such as `"sdpa"`."""
    return model.config._attn_implementation


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
