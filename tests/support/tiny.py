"""Tiny models and a byte-level chat tokenizer, made offline; importable from subprocesses of tests as well."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
START, END, PAD = "<|im_start|>", "<|im_end|>", "<pad>"
VOCAB_SIZE = 260
MODEL_TYPES = {"gemma3": "gemma3_text"}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; `<|im_end|>` ends a turn and a text."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), START, END, PAD]
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=PAD, additional_special_tokens=[START]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(family: str = "llama", **overrides) -> PreTrainedModel:
    """A model of two layers from its config, the same weights every time, large enough to be far from uniform."""
    torch.manual_seed(0)
    options = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "pad_token_id": 258,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    if family != "gpt_neox":
        options["num_key_value_heads"] = 2
    if family.startswith(("gemma", "qwen3")):
        options["head_dim"] = 8
    config = AutoConfig.for_model(MODEL_TYPES.get(family, family), **(options | overrides))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
