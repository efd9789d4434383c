"""paths/rules: what speaks for or against a run in its learning paths.

registry.py lists every rule and has those about squeezing and entropy; displacement.py, degeneration.py, objective.py
and finiteness.py have the others, remedies.py what several of them recommend. A new rule is a function here and an
entry in RULES.
"""

from typing import TYPE_CHECKING

from trl_dynamics import lazy

if TYPE_CHECKING:
    from trl_dynamics.paths.rules.registry import OBJECTIVE, RULES, calm_text, find

__getattr__, __dir__, __all__ = lazy.exports(
    __name__, {"OBJECTIVE": "registry", "RULES": "registry", "calm_text": "registry", "find": "registry"}
)
