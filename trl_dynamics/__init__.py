"""trl_dynamics: see, explain and fix the learning dynamics of fine-tuning, as an extension of Hugging Face TRL.

Public names load on first use, so that reading records or a report needs neither torch nor trl.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl_dynamics.influence.kind import load_influence
    from trl_dynamics.paths.samples import load_samples
    from trl_dynamics.probing.schema import Probe, ProbeSet
    from trl_dynamics.store.store import load_records
    from trl_dynamics.trainers.config import DPOConfig, GRPOConfig, SFTConfig
    from trl_dynamics.trainers.dpo import DPOTrainer
    from trl_dynamics.trainers.grpo import GRPOTrainer
    from trl_dynamics.trainers.sft import SFTTrainer

_HOMES = {
    "DPOConfig": "trl_dynamics.trainers.config",
    "DPOTrainer": "trl_dynamics.trainers.dpo",
    "GRPOConfig": "trl_dynamics.trainers.config",
    "GRPOTrainer": "trl_dynamics.trainers.grpo",
    "Probe": "trl_dynamics.probing.schema",
    "ProbeSet": "trl_dynamics.probing.schema",
    "SFTConfig": "trl_dynamics.trainers.config",
    "SFTTrainer": "trl_dynamics.trainers.sft",
    "load_influence": "trl_dynamics.influence.kind",
    "load_records": "trl_dynamics.store.store",
    "load_samples": "trl_dynamics.paths.samples",
}
__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "Probe",
    "ProbeSet",
    "SFTConfig",
    "SFTTrainer",
    "load_influence",
    "load_records",
    "load_samples",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
