"""The one forward that gives per-token statistics, whether it is the model's own, and what it leaves behind: nothing.

`forward.py` wraps a causal LM, `ways.py` says how the LM head is applied, `check.py` compares with the model's own
logits, `module_state.py` puts back what a forward changes on the model's modules.
"""

from trl_dynamics.stats_head.check import confirm, settle
from trl_dynamics.stats_head.forward import (
    StatsRequest,
    TokenStats,
    install,
    is_installed,
    prompts_only,
    remove,
    whole_head,
)
from trl_dynamics.stats_head.module_state import kept_state
from trl_dynamics.stats_head.ways import length_boundaries, own_forward_tokens

__all__ = [
    "StatsRequest",
    "TokenStats",
    "confirm",
    "install",
    "is_installed",
    "kept_state",
    "length_boundaries",
    "own_forward_tokens",
    "prompts_only",
    "remove",
    "settle",
    "whole_head",
]
