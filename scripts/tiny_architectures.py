"""Tiny random models of every causal LM that transformers has a config for, with logits far from uniform."""

import inspect
from collections.abc import Iterator

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE, MAX_PARAMETERS = 96, 8_000_000
# Standard deviation of the logits: what a head does to them must show.
LEAST_SPREAD = 5.0

# What makes a model small, by the names that configs give it; a config gets those that it has.
_WIDTH = dict.fromkeys(
    ("hidden_size", "d_model", "n_embd", "dim_model", "word_embed_proj_dim", "attention_hidden_size", "embedding_size")
    + ("linear_value_dim", "lru_width", "emb_dim", "output_embedding_size", "input_embedding_size", "embed_dim"),
    32,
)
_LAYERS = dict.fromkeys(
    ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "num_decoder_layers")
    + ("encoder_layers", "num_blocks", "num_encoder_layers"),
    2,
)
_HEADS = dict.fromkeys(
    ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads", "num_heads")
    + ("num_decoder_attention_heads", "num_encoder_attention_heads"),
    4,
)
_KEYS = dict.fromkeys(("num_key_value_heads", "kv_n_heads", "num_kv_heads", "swa_num_key_value_heads"), 2)
_HEAD_WIDTH = dict.fromkeys(
    ("head_dim", "kv_channels", "qk_nope_head_dim", "v_head_dim", "global_head_dim", "attention_head_dim", "d_kv")
    + ("mamba_head_dim", "mamba_d_head", "linear_key_head_dim", "linear_value_head_dim", "index_head_dim")
    + ("swa_head_dim", "swa_v_head_dim"),
    8,
)
_INNER = dict.fromkeys(
    ("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "d_inner", "dim_ff", "dff")
    + ("moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size", "feed_forward_size", "d_ff")
    + (
        "expert_ffn_hidden_size",
        "shared_intermediate_size",
        "intermediate_size_mlp",
        "moe_shared_expert_intermediate_size",
    ),
    48,
)
_EXPERTS = dict.fromkeys(
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts", "n_expert"), 4
)
_CHOSEN = dict.fromkeys(
    ("num_experts_per_tok", "top_k", "moe_topk", "moe_k", "num_experts_per_token", "moe_top_k", "top_k_experts"), 2
)
_OTHERS = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "is_decoder": True,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "sliding_window": 16,
    "attention_chunk_size": 16,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 8,
    "state_size": 8,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "n_mamba_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_kv_shared_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "scale_embedding": True,
    "causal": True,
    "use_cache": True,
}


def names() -> list[str]:
    """Every model type with a causal LM."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(name: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A tiny model of this type in float32 and evaluation mode, its weights random, no bias zero.

    Logits are spread out by [`LEAST_SPREAD`] at least; the other matrices mix gently, since a model that amplifies
    rounding would hide what is looked for.

    Raises:
        ValueError: If no way of making its config small gives a model.
    """
    errors: list[str] = []
    for options in _attempts(name):
        try:
            model = _make(name, seed, options | overrides)
            _disturb(model)
            _spread(model)
            return model
        except Exception as error:  # Any error of a config or of a model means: not with these sizes.
            errors.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.150}")
    raise ValueError(errors[0])


def _attempts(name: str) -> Iterator[dict]:
    """Sizes to try, the usual ones first: some architectures need as many keys as heads, more layers, or a list."""
    base = _WIDTH | _LAYERS | _HEADS | _KEYS | _HEAD_WIDTH | _INNER | _EXPERTS | _CHOSEN | _OTHERS
    base |= _BY_NAME.get(name, {})
    yield base
    yield base | dict.fromkeys(_KEYS, 4)
    yield base | dict.fromkeys(_LAYERS, 4)
    yield base | dict.fromkeys(_LAYERS, 6)
    without = {key: value for key, value in base.items() if key not in _HEAD_WIDTH}
    yield without
    yield without | dict.fromkeys(_KEYS, 4)
    yield base | dict.fromkeys(_WIDTH, 64) | dict.fromkeys(_HEAD_WIDTH, 16)


# What one architecture needs besides.
_BY_NAME: dict[str, dict] = {
    "bamba": {"layers_block_type": ["mamba", "attention"], "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "layers_block_type": ["mamba", "attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 2},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "roc_bert": {"pronunciation_vocab_size": 96, "shape_vocab_size": 96, "pronunciation_embed_dim": 8}
    | {"shape_embed_dim": 8},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0, "chunk_size": 16, "num_heads": 2},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 8},
}


def _make(name: str, seed: int, options: dict) -> PreTrainedModel:
    config_class = CONFIG_MAPPING[name]
    config = _small(config_class, options)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size:,} parameters are left when everything with a known name is small")
    torch.manual_seed(seed)
    return model_class(_small(config_class, options)).float().eval()


def _small(config_class: type[PreTrainedConfig], options: dict, depth: int = 0) -> PreTrainedConfig:
    default = config_class()
    chosen = {name: value for name, value in options.items() if hasattr(default, name)}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig) and depth < 3:
            chosen[name] = _small(type(value), options, depth + 1)
        elif isinstance(value, list) and name in (
            "layer_types",
            "layers_block_type",
            "mlp_layer_types",
            "block_types",
        ):
            chosen[name] = _few(value, chosen)
    taken = inspect.signature(config_class.__init__).parameters
    if not any(kind.kind == kind.VAR_KEYWORD for kind in taken.values()):
        chosen = {name: value for name, value in chosen.items() if name in taken}
    return config_class(**chosen)


def _few(kinds: list, chosen: dict) -> list:
    """As many layers as wanted, of as many kinds as possible."""
    number = next((chosen[name] for name in _LAYERS if name in chosen), 2)
    different = list(dict.fromkeys(kinds))
    return (different * number)[:number]


@torch.no_grad()
def _disturb(model: nn.Module) -> None:
    """No weight is at its start: matrices mix, biases and adapters are not zero."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and not name.endswith(("A_log", "dt_bias")):
            parameter.normal_(0, 0.4 * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))


@torch.no_grad()
def _spread(model: PreTrainedModel) -> None:
    """Scale the head until the logits are spread out; tied weights go with it."""
    ids = torch.randint(3, VOCAB_SIZE, (1, 24), generator=torch.Generator().manual_seed(0))
    for _ in range(8):
        spread = float(model(input_ids=ids).logits.float().std())
        if not spread < LEAST_SPREAD:
            break
        for parameter in model.get_output_embeddings().parameters():
            parameter.mul_(1.05 * LEAST_SPREAD / spread if spread > 1 else 5.0)
    if not spread >= LEAST_SPREAD:
        raise ValueError(f"its logits cannot be spread out (standard deviation {spread:.3g})")
