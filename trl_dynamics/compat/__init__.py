"""compat: every name of TRL, transformers, accelerate and DeepSpeed that is not public API, in one place.

models.py has what a model's forward and head do, training.py what the trainers do, zero.py where DeepSpeed keeps
weights (import the module for what is done with an engine). versions.py lists the names, each with a contract test in
tests/integration/test_compat.py; methods that a trainer overrides stay in trainers/. Nothing else may use such a name
(tests/test_private_names.py). Of ours, this room imports versions and lazy alone. Loading it refuses versions that
lack a name.
"""

import logging
import os
from typing import TYPE_CHECKING

from trl_dynamics import lazy, versions

INSTALLED = versions.installed_versions(tuple(versions.ACCEPTED))
versions.check_versions(INSTALLED)
versions.check_private_names(INSTALLED)

# The main process alone: every process imports this.
if os.environ.get("RANK", "0") == "0" and (untested := versions.untested(INSTALLED)):
    logging.getLogger(__name__).warning(untested)

if TYPE_CHECKING:
    from trl_dynamics.compat.models import (
        PromptCache,
        attention_of,
        base_causal_lm,
        can_share_prompts,
        checkpointing_without_reentry,
        full_head_weights,
        is_plain_linear,
        logit_transform,
        longrope_boundaries,
        reset_rope,
    )
    from trl_dynamics.compat.training import (
        DISPLAYS,
        DPO_HEAD_OUTPUTS,
        add_sum_sq_to_head,
        log_apart,
        log_metric,
        shards_or_casts_parameters,
        waits_for_log,
    )
    from trl_dynamics.compat.zero import is_in_pieces, whole_numel, whole_shape, without_zero3

__getattr__, __dir__, __all__ = lazy.exports(
    __name__,
    {
        "DISPLAYS": "training",
        "DPO_HEAD_OUTPUTS": "training",
        "PromptCache": "models",
        "add_sum_sq_to_head": "training",
        "attention_of": "models",
        "base_causal_lm": "models",
        "can_share_prompts": "models",
        "checkpointing_without_reentry": "models",
        "full_head_weights": "models",
        "is_in_pieces": "zero",
        "is_plain_linear": "models",
        "log_apart": "training",
        "log_metric": "training",
        "logit_transform": "models",
        "longrope_boundaries": "models",
        "reset_rope": "models",
        "shards_or_casts_parameters": "training",
        "waits_for_log": "training",
        "whole_numel": "zero",
        "whole_shape": "zero",
        "without_zero3": "zero",
    },
)
