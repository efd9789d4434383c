"""Tiny models, batches and comparisons that the tests of influence share."""

import math

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from tiny import tiny_model
from trl_dynamics.akg.split.differences import CONFIDENCE
from true_float64 import true_float64

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gemma2", "gemma3"]
SIZES = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def language_model(family: str = "llama", **options) -> nn.Module:
    """A causal LM that computes in float64 all the way."""
    options = {"initializer_range": 0.15} | options
    if family == "gpt2":
        torch.manual_seed(0)
        sizes = {"vocab_size": 260, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
        return true_float64(GPT2LMHeadModel(GPT2Config(**sizes, **options)))
    return true_float64(tiny_model(family, **options))


def adapted(**options) -> nn.Module:
    """The same Llama beneath an adapter that is not at its start."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "down_proj", "lm_head"]
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": targets, "init_lora_weights": False} | options)
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama", initializer_range=0.15), config)
    true_float64(model.get_base_model())
    return model.double()


def sequence_classifier(family: str = "llama") -> nn.Module:
    """One label for each text, of three."""
    torch.manual_seed(0)
    options = SIZES | {"num_labels": 3, "initializer_range": 0.15, "pad_token_id": 258}
    if family == "bert":
        return BertForSequenceClassification(BertConfig(**options)).double().eval()
    return true_float64(LlamaForSequenceClassification(LlamaConfig(**options)))


def small_classifier(num_classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, num_classes)).double()


def batch_of(
    num_rows: int, num_tokens: int, seed: int, num_labels: int = 4, vocabulary: int = 250
) -> dict[str, torch.Tensor]:
    """Random tokens of which the last few of each row are labels, one fewer in every row."""
    rng = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(1, vocabulary, (num_rows, num_tokens), generator=rng)
    labels_BT = ids_BT.clone()
    for row in range(num_rows):
        labels_BT[row, : num_tokens - max(1, num_labels - row)] = -100
    return {"input_ids": ids_BT, "labels": labels_BT}


def texts_of(num_rows: int, num_tokens: int, seed: int) -> dict[str, torch.Tensor]:
    """Random tokens with a label of three for each row, the later rows padded on the right."""
    batch = batch_of(num_rows, num_tokens, seed)
    length_B1 = num_tokens - torch.arange(num_rows)[:, None]
    mask_BT = (torch.arange(num_tokens) < length_B1).long()
    ids_BT = torch.where(mask_BT.bool(), batch["input_ids"], 258)
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": torch.arange(num_rows) % 3}


def padded(batch: dict, left: int, right: int) -> dict[str, torch.Tensor]:
    """The batch with columns of padding on either side."""
    ids_BT = nn.functional.pad(batch["input_ids"], (left, right), value=258)
    mask_BT = nn.functional.pad(torch.ones_like(batch["input_ids"]), (left, right), value=0)
    labels_BT = nn.functional.pad(batch["labels"], (left, right), value=-100)
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}


def logp_of(task, batch) -> torch.Tensor:
    """(N, V) ln pi, by the attention kernel that influence uses."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return torch.cat(list(task.logits(task.model, batch))).log_softmax(dim=-1)


def error(found: torch.Tensor, true: torch.Tensor) -> float:
    """Of all entries together, relative."""
    return float(torch.linalg.vector_norm(found - true) / torch.linalg.vector_norm(true))


def most_outside(num_values: int) -> float:
    """How many values may be off by more than is stated: the share that is claimed, and four standard deviations."""
    expected = (1 - CONFIDENCE) * num_values
    return expected + 4 * math.sqrt(expected)
