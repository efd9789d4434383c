"""The default that needs no hub: a small synthetic world, its tokenizer and its small base model.

Names load on first use, so that drawing data needs neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl_dynamics.embedded.base_model import model_path
    from trl_dynamics.embedded.data import preference_rows, probe_set, style_rows
    from trl_dynamics.embedded.recogniser import is_grammatical
    from trl_dynamics.embedded.world import AnswerCheck, check_answer

_HOMES = {
    "AnswerCheck": "trl_dynamics.embedded.world",
    "check_answer": "trl_dynamics.embedded.world",
    "is_grammatical": "trl_dynamics.embedded.recogniser",
    "model_path": "trl_dynamics.embedded.base_model",
    "preference_rows": "trl_dynamics.embedded.data",
    "probe_set": "trl_dynamics.embedded.data",
    "style_rows": "trl_dynamics.embedded.data",
}
__all__ = ["AnswerCheck", "check_answer", "is_grammatical", "model_path", "preference_rows", "probe_set", "style_rows"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
