"""trl_dynamics: see, explain and fix the learning dynamics of fine-tuning, as an extension of Hugging Face TRL.

Public names load on first use, so that reading records or a report needs neither torch nor trl.
"""

from typing import TYPE_CHECKING

from trl_dynamics import lazy, moved

if TYPE_CHECKING:
    from trl_dynamics.influence.kind import load_influence
    from trl_dynamics.paths.records import load_records
    from trl_dynamics.paths.samples import load_samples
    from trl_dynamics.probing.schema import Probe, ProbeSet
    from trl_dynamics.trainers.config import DPOConfig, GRPOConfig, SFTConfig
    from trl_dynamics.trainers.dpo import DPOTrainer
    from trl_dynamics.trainers.grpo import GRPOTrainer
    from trl_dynamics.trainers.sft import SFTTrainer

__getattr__, __dir__, __all__ = lazy.exports(
    __name__,
    {
        "DPOConfig": "trainers.config",
        "DPOTrainer": "trainers.dpo",
        "GRPOConfig": "trainers.config",
        "GRPOTrainer": "trainers.grpo",
        "Probe": "probing.schema",
        "ProbeSet": "probing.schema",
        "SFTConfig": "trainers.config",
        "SFTTrainer": "trainers.sft",
        "load_influence": "influence.kind",
        "load_records": "paths.records",
        "load_samples": "paths.samples",
    },
)

moved.install()
