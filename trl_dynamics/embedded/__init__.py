"""The default that needs no hub: a small synthetic world, its tokenizer and its small base model.

Names load on first use, so that drawing data needs neither torch nor transformers.
"""

from typing import TYPE_CHECKING

from trl_dynamics import lazy

if TYPE_CHECKING:
    from trl_dynamics.embedded.base_model import model_path
    from trl_dynamics.embedded.data import preference_rows, probe_set, style_rows
    from trl_dynamics.embedded.recogniser import is_grammatical
    from trl_dynamics.embedded.world import AnswerCheck, check_answer

__getattr__, __dir__, __all__ = lazy.exports(
    __name__,
    {
        "AnswerCheck": "world",
        "check_answer": "world",
        "is_grammatical": "recogniser",
        "model_path": "base_model",
        "preference_rows": "data",
        "probe_set": "data",
        "style_rows": "data",
    },
)
