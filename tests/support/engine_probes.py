"""Probes of many lengths for the engine's tests, and models with and without an adapter."""

import torch
from peft import LoraConfig, get_peft_model

from tiny import tiny_tokenizer
from trl_dynamics import ProbeSet
from trl_dynamics.probing.encode import LengthLimits, encode
from trl_dynamics.probing.schema import Probe

WORDS = "the quick brown fox jumps over a lazy dog while seven small birds sing of rain".split()


def probes(num_probes: int = 5) -> ProbeSet:
    """Prompts and responses of many lengths; the last probe lacks a type."""
    rows = []
    for index in range(num_probes):
        responses = {
            "chosen": " " + " ".join(WORDS[: 2 + index]),
            "rejected": " " + " ".join(WORDS[index : index + 3]),
            "other_test": " " + " ".join(WORDS[-1 - 2 * index :]),
        }
        if index == num_probes - 1:
            del responses["other_test"]
        rows.append(Probe(str(index), "Say: " + " ".join(WORDS[: 1 + 2 * index]), responses))
    return ProbeSet(tuple(rows))


def encoded_probes(limits: LengthLimits = LengthLimits(max_prompt_length=40, max_length=90)):
    return encode(probes(), tiny_tokenizer(), limits)


def adapt(model, lora: bool):
    if not lora:
        return model
    torch.manual_seed(1)
    transposed = model.config.model_type == "gpt2"
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=transposed)
    return get_peft_model(model, config).eval()
