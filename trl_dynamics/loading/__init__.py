"""Models and tokenizers from a folder or the hub, for every command: whole models, and adapters on their base.

What is loaded is the model that was saved: weights that are missing, or that have no place in the model, are refused.
Every error is one line, a [`NotLoadable`].
"""

from trl_dynamics.loading.adapters import Adapter, find_adapter, merged, weights_file
from trl_dynamics.loading.files import MERGED_FROM, NotLoadable, find_adapter_config, naming
from trl_dynamics.loading.models import (
    context_length,
    end_ids,
    load_causal_lm,
    load_config,
    load_tokenizer,
    require_causal_lm,
    require_whole,
)

__all__ = [
    "MERGED_FROM",
    "Adapter",
    "NotLoadable",
    "context_length",
    "end_ids",
    "find_adapter",
    "find_adapter_config",
    "load_causal_lm",
    "load_config",
    "load_tokenizer",
    "merged",
    "naming",
    "require_causal_lm",
    "require_whole",
    "weights_file",
]
